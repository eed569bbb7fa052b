"""The page of results: the committed one is what is generated, and code that changed marks what rests on it.

What the committed page says about changed code is taken from the page itself: a test that fails whenever a library file
changes would say nothing. `python -m experiments.report --check` compares that too.
"""

import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    """The module experiments.report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("experiments.report")


@pytest.fixture(scope="module")
def freshness(page):
    return page.freshness


@pytest.fixture(scope="module")
def results(page):
    return page.read_results()


# The committed page.


def test_the_committed_page_is_what_is_generated(page, results):
    text = (ROOT / page.PAGE).read_text()
    marks = page.read_marks(text)
    assert marks.keys() == {result.system for result in results}
    assert page.render(results, marks) == text, "run python -m experiments.report"


def test_its_links_and_figures_exist(page):
    text = (ROOT / page.PAGE).read_text()
    paths = re.findall(r"\]\((?!#)([^)]*)\)", text)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / "experiments" / path).is_file()] == []
    headings = re.findall(r"^### (\w+)$", text, flags=re.MULTILINE)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) == set(headings) and len(headings) == len(set(headings))


def test_every_claim_has_its_line(results, page):
    text = page.render(results, {result.system: "" for result in results})
    for result in results:
        section = re.split(r"\n##+ ", text.split(f"### {result.system}\n")[1])[0]
        findings = result.report.details["findings"]
        verdicts = re.findall(r"\| (yes|no|open) \|", section)
        assert verdicts == [page.VERDICTS[finding["holds"]] for finding in findings]
        assert "Stale" not in section and result.card["Title"] in section and "Paper" in section


def test_marks_come_back(page, results):
    marks = {result.system: "" for result in results}
    first, second, third = list(marks)[:3]
    marks |= {first: "2 files changed\n- `a.py` (f, on import)\n- `b.py`", second: "its commit is unknown to git"}
    text = page.render(results, marks)
    assert page.read_marks(text) == marks
    fresh, stale = text.split("\n## Stale\n")
    assert f"### {third}\n" in fresh and f"### {first}\n" in stale and f"### {second}\n" in stale
    assert text.count("other code: stale") == 2


def test_a_command_that_went_on_with_a_run_starts_anew(page, results):
    report = dataclasses.replace(results[0].report, command="python x.py --resume --run runs/x", preset="study")
    assert page.rerun(report) == "python x.py --run runs/x --preset study"
    report = dataclasses.replace(report, command="python x.py --preset paper")
    assert page.rerun(report) == "python x.py --preset paper"


# Which changes count. The script is s/run.py, which imports from a package and from the file beside it.

TREE = {
    "s/run.py": '''
import lib
from helper import scale
from lib import tools, train as learn

STEPS = 3

def main():
    """Runs."""
    from lib.late import later
    return scale(lib.fit(STEPS)) + learn.epoch() + later()
''',
    "s/helper.py": "def scale(x):\n    return 2 * x\n\ndef unused(x):\n    return x\n",
    "lib/__init__.py": "from lib.core import fit, other\n",
    "lib/core.py": "import lib.effects\n\ndef fit(n: Kind):\n    return _inner(n)\n\n"
    "def _inner(n):\n    return n + 1\n\ndef other():\n    return 0\n\nclass Kind:\n    size = 1\n",
    "lib/effects.py": "print('imported')\n",
    "lib/train.py": "from lib.core import fit\n\ndef epoch():\n    return 1\n\ndef spare():\n    return fit(2)\n",
    "lib/late.py": "configure(1)\n\ndef later():\n    return 5\n",
    "lib/tools/__init__.py": "from lib.tools.hammer import hit\n",
    "lib/tools/hammer.py": "def hit():\n    return 7\n",
}


def changed(freshness, edits):
    """Changes after replacements (old, new) in files; None deletes the file."""
    tree = dict(TREE)
    for path, edit in edits.items():
        text = tree.pop(path)
        if edit is not None:
            assert edit[0] in text
            tree[path] = text.replace(*edit)
    return {change.path: change.names for change in freshness.changes("s/run.py", TREE.get, tree.get)}


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {"s/run.py": ('"""Runs."""', '"""Runs it all."""')},
        {"s/run.py": ("STEPS = 3", "# a comment\nSTEPS   =   3")},
        {"s/helper.py": ("return x\n", "return x + 1\n")},  # nothing calls it
        {"lib/core.py": ("return 0", "return 1")},
        {"lib/core.py": ("size = 1", "size = 2")},  # named in an annotation only
        {"lib/train.py": ("fit(2)", "fit(3)")},
        {"lib/tools/hammer.py": ("return 7", "return 8")},  # imported, not used
        {"lib/tools/hammer.py": None},
        {"lib/__init__.py": ("import fit, other", "import other, fit")},
    ],
)
def test_what_is_no_change(freshness, edits):
    assert changed(freshness, edits) == {}


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"s/run.py": ("STEPS = 3", "STEPS = 4")}, {"s/run.py": ["STEPS"]}),
        ({"s/helper.py": ("2 * x", "3 * x")}, {"s/helper.py": ["scale"]}),
        ({"lib/core.py": ("n + 1", "n + 2")}, {"lib/core.py": ["_inner"]}),  # through the package's __init__
        ({"lib/train.py": ("return 1", "return 2")}, {"lib/train.py": ["epoch"]}),  # through an alias of a module
        ({"lib/late.py": ("return 5", "return 6")}, {"lib/late.py": ["later"]}),  # imported inside a function
        ({"lib/late.py": ("configure(1)", "configure(2)")}, {"lib/late.py": ["on import"]}),
        ({"lib/late.py": None}, {"lib/late.py": []}),
        ({"lib/core.py": ("_inner(n)\n\n", "other()\n\n")}, {"lib/core.py": ["_inner", "fit", "other"]}),
        ({"s/run.py": ("learn.epoch()", "len(dir(tools))")}, {"lib/tools/hammer.py": ["hit"], "s/run.py": ["main"]}),
    ],
)
def test_what_is_a_change(freshness, edits, expected):
    found = changed(freshness, edits)
    assert {path: found.get(path) for path in expected} == expected
    assert set(found) - set(expected) <= {"lib/train.py"}  # the line that no longer calls epoch()


def test_figures_and_where_it_ran_cannot_change_numbers(freshness):
    before = {
        "s.py": "from mtjax import plots\nfrom mtjax.train import report as r\nplots.bars(r.provenance(), r.mean())",
        "mtjax/__init__.py": "__version__ = '1'\n",
        "mtjax/plots.py": "def bars(x):\n    return 1\n",
        "mtjax/train/__init__.py": "",
        "mtjax/train/report.py": "def provenance():\n    return 1\n\ndef mean():\n    return 2\n",
    }
    after = {path: text.replace("return 1", "return 9").replace("'1'", "'2'") for path, text in before.items()}
    assert freshness.changes("s.py", before.get, after.get) == []
    after["mtjax/train/report.py"] = after["mtjax/train/report.py"].replace("return 2", "return 3")
    assert freshness.changes("s.py", before.get, after.get) == [("mtjax/train/report.py", ["mean"])]


@pytest.mark.parametrize("family", ["tabular/multitab", "operators/fisher", "vision/m3vit"])
def test_the_real_scripts_reach_what_they_use(freshness, family):
    found = freshness.reached(f"experiments/{family}.py", freshness.working_tree(ROOT))
    assert ("mtjax/train/loop.py", "fit_problem") in found and ("mtjax/train/step.py", "make_train_step") in found
    assert ("mtjax/models/fno.py", "FNO") not in found and "mtjax/plots.py" not in {d.path for d in found}
    known = [pattern.split(":")[0] for pattern in freshness.CANNOT_CHANGE_NUMBERS]
    assert all(list(ROOT.glob(pattern)) for pattern in known)


# With git: a repository of one script and one result.


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture
def repository(tmp_path, results):
    root = tmp_path / "repository"
    script = root / "experiments" / "toy" / "run.py"
    script.parent.mkdir(parents=True)
    script.write_text('"""A toy.\n\nPaper:   none.\n"""\n\nSTEPS = 3\n')
    git(tmp_path, "init", "-q", "repository")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "script")
    save(results, root, commit=git(root, "rev-parse", "HEAD"))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "result")
    return root


def save(results, root, **fields):
    fields = {"system": "toy", "command": "python experiments/toy/run.py", "dirty": False} | fields
    return dataclasses.replace(results[0].report, **fields).write(root / "experiments" / "results" / "toy.json")


def test_a_result_becomes_stale_and_the_check_says_so(page, repository, capsys):
    assert page.main([], repository) == 0
    text = (repository / page.PAGE).read_text()
    assert "None." in text.split("\n## Stale\n")[1] and page.main(["--check"], repository) == 0
    script = repository / "experiments" / "toy" / "run.py"
    script.write_text(script.read_text().replace("STEPS = 3", "STEPS = 3  # few"))
    assert page.main(["--check"], repository) == 0
    script.write_text(script.read_text().replace("STEPS = 3", "STEPS = 4"))
    capsys.readouterr()
    assert page.main(["--check"], repository) == 1
    assert "is not up to date: what changed since these results differs: toy" in capsys.readouterr().err
    assert (repository / page.PAGE).read_text() == text
    assert page.main([], repository) == 0 and page.main(["--check"], repository) == 0
    stale = (repository / page.PAGE).read_text().split("\n## Stale\n")[1]
    assert "1 file that it rests on changed since commit" in stale and "- `experiments/toy/run.py` (STEPS)" in stale
    assert "### toy" in stale and "| yes |" in stale  # the numbers are still shown


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"commit": "0" * 40}, "its commit 0000000000 is unknown to git"),
        ({"commit": None, "dirty": None}, "measured outside of a repository"),
        ({"dirty": True}, "on a working tree that differed from commit"),
        ({"dirty": None}, "on a copy of commit"),
    ],
)
def test_results_without_known_code_are_refused(page, repository, results, fields, why):
    commit = git(repository, "rev-parse", "HEAD~1")
    save(results, repository, **{"commit": commit} | fields)
    assert page.main([], repository) == 0
    assert why in (repository / page.PAGE).read_text().split("\n## Stale\n")[1]


def test_without_history_it_says_so_and_leaves_the_page(page, repository, tmp_path, capsys):
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    bare = tmp_path / "no_git"
    (tmp_path / "shallow").joinpath("experiments").rename(tmp_path / "kept")
    bare.mkdir()
    (tmp_path / "kept").rename(bare / "experiments")
    git(tmp_path / "shallow", "checkout", "-q", "--", ".")
    for root, words in ((tmp_path / "shallow", "shallow and lacks commit"), (bare, "not a git repository")):
        assert page.main([], root) == 2 and page.main(["--check"], root) == 2
        error = capsys.readouterr().err
        assert words in error and "is left as it is" in error and not (root / page.PAGE).exists()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root: (root / "experiments/results/toy.json").rename(root / "experiments/results/b.json"), "'toy'"),
        (lambda root: (root / "experiments/results/toy.json").write_text("{}"), "is not a report"),
        (lambda root: (root / "experiments/toy/run.py").unlink(), "names no script of this repository"),
        (lambda root: (root / "experiments/results/figures").mkdir() or
         (root / "experiments/results/figures/other_x.png").write_bytes(b""), "belongs to no system"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_errors(page, repository, capsys, break_it, words):
    break_it(repository)
    assert page.main([], repository) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_from_the_root():
    command = [sys.executable, "-m", "experiments.report", "--check"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr  # stale marks may have to be renewed
