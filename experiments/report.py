r"""RESULTS.md: every committed result on one page, and whether the code behind it is still the same.

    python -m experiments.report            # writes experiments/RESULTS.md from experiments/results/*.json
    python -m experiments.report --check    # exit status 1 if the page is not what would be written now

A result is listed as stale if its commit is not in the repository, if its working tree was not that commit, or if code
that it rests on has changed since (see `freshness.py`); its numbers are still shown, marked. A page is a function of
the reports, the figures, the heads of the scripts, and one mark per system: `read_marks` gives those of a written page.
"""

import argparse
import dataclasses
import html
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from experiments import freshness
from mtjax.train.report import Report

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = "experiments/RESULTS.md"
SHORT = 10
"""Digits of a commit that are shown."""
VERDICTS = {True: "yes", False: "no", None: "open"}
_CARD = re.compile(r"^(\w+): +")

HEAD = """\
# Results

Written by `python -m experiments.report` from `experiments/results/*.json`: do not edit. Numbers are mean ± standard
error over seeds. A claim holds if a two-sided t-test at 95 % says so, or by the rule that its line names; "open" means
that this run cannot tell. All of the numbers, per model, task and metric, are in the JSON files.

A result is **stale** if its commit is not in this repository, if it was measured on a tree with other changes, or if
code that it rests on has changed since it was measured: its script, and the definitions in this repository that it
reaches through imports, compared without comments, docstrings and formatting. A stale result was true of its commit; it
may or may not be true of the code as it is now. `python -m experiments.report --check` says whether the marks on this
page are up to date."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A committed report and the script that made it."""

    report: Report
    script: str
    """Path in the repository."""
    card: dict[str, str]
    """Head of the script: 'Title', then 'Paper', 'Claims', 'Data', ..."""
    figures: list[str]
    """Paths beside the page."""

    @property
    def system(self) -> str:
        return self.report.system


def read_results(root: pathlib.Path = ROOT) -> list[Result]:
    """The committed results in the order of their systems.

    Raises:
      ValueError: if a file is not a report, is called otherwise than its system, its command names no script of this
        repository, or a figure belongs to no system.
    """
    folder = root / "experiments" / "results"
    reports = {path: Report.read(path) for path in sorted(folder.glob("*.json"))}
    systems = [report.system for report in reports.values()]
    figures = {system: [] for system in systems}
    for figure in sorted((folder / "figures").glob("*.png")):
        owners = [s for s in systems if figure.stem == s or figure.stem.startswith(f"{s}_")]
        if not owners:
            raise ValueError(f"{figure.relative_to(root)} belongs to no system of {folder.relative_to(root)}")
        figures[max(owners, key=len)].append(f"results/figures/{figure.name}")
    found = []
    for path, report in reports.items():
        if path.stem != report.system:
            raise ValueError(
                f"{path.relative_to(root)} holds the system '{report.system}'; it should be called after it"
            )
        words = shlex.split(report.command)
        script = next((word for word in words if word.endswith(".py")), "")
        if not (root / script).is_file():
            raise ValueError(
                f"{path.relative_to(root)}: its command names no script of this repository: {report.command}"
            )
        card = read_card((root / script).read_text(encoding="utf-8"))
        found.append(Result(report, script, card, figures[report.system]))
    return found


def read_card(source: str) -> dict[str, str]:
    """The head of a script as one paragraph per entry.

    >>> read_card('\"\"\"One network.\\n\\nPaper:   "A Title",\\n         2025.\\nData:    none.\\n\\nMore.\\n\"\"\"')
    {'Title': 'One network.', 'Paper': '"A Title", 2025.', 'Data': 'none.'}
    """
    lines = source.split('"""', 2)[1].splitlines()
    card, entry = {"Title": lines[0].strip()}, None
    for line in lines[1:]:
        match = _CARD.match(line)
        if match:
            entry = match[1]
            card[entry] = line[match.end() :].strip()
        elif line.startswith(" ") and entry:
            card[entry] += f" {line.strip()}"
        else:
            entry = None
    return card


def marks_now(results: Iterable[Result], root: pathlib.Path = ROOT) -> dict[str, str]:
    """System -> why its result is stale, a line and then what changed, or '' if it is not.

    Raises:
      freshness.NoHistoryError: if there is no git or no history to compare with.
    """
    now = freshness.working_tree(root)
    return {result.system: _mark(result, root, now) for result in results}


def _mark(result: Result, root: pathlib.Path, now: freshness.Read) -> str:
    commit, dirty = result.report.commit, result.report.dirty
    if commit is None:
        return "it was measured outside of a repository, so that its code is not known"
    try:
        before = freshness.at_commit(root, commit)
    except freshness.UnknownCommitError as error:
        return str(error)
    if dirty:
        return f"it was measured on a working tree that differed from commit {commit[:SHORT]}"
    changes = freshness.changes(result.script, before, now)
    if changes:
        what = f"{len(changes)} file{'s' * (len(changes) != 1)} that it rests on changed since commit {commit[:SHORT]}"
        return "\n".join([what, *(f"- {change}" for change in changes)])
    if dirty is None:
        return f"it was measured on a copy of commit {commit[:SHORT]}; whether that had other changes is not known"
    return ""


def render(results: Sequence[Result], marks: Mapping[str, str]) -> str:
    """The page.

    Args:
      results: see `read_results`.
      marks: system -> why it is stale, '' if it is not.

    Returns:
      Markdown.
    """
    fresh = [result for result in results if not marks[result.system]]
    stale = [result for result in results if marks[result.system]]
    parts = [HEAD, "\n".join(_overview(results, marks)), "## Measured with the code as it is"]
    parts += [_section(result, "") for result in fresh] or ["None: see below."]
    parts += ["## Stale"]
    parts += [_section(result, marks[result.system]) for result in stale] or ["None."]
    parts += ["## Figures", *(_gallery(result) for result in results if result.figures)]
    return "\n\n".join(parts) + "\n"


def _overview(results: Iterable[Result], marks: Mapping[str, str]) -> Iterator[str]:
    yield "| system | what | claims that hold | that do not | open | seeds | measured with |"
    yield "|---|---|---|---|---|---|---|"
    for result in results:
        verdicts = [finding["holds"] for finding in _findings(result.report)]
        counts = " | ".join(str(verdicts.count(verdict)) for verdict in VERDICTS)
        code = "other code: stale" if marks[result.system] else "the code as it is"
        title = _cell(result.card["Title"].rstrip("."))
        name = f"[{result.system}](#{result.system})"
        yield f"| {name} | {title} | {counts} | {len(result.report.seeds)} | {code} |"


def _section(result: Result, mark: str) -> str:
    report = result.report
    lines = [f"### {result.system}", "", result.card["Title"], ""]
    if mark:
        reason, *changed = mark.split("\n")
        lines += [f"**Stale**: {reason}.", ""]
        lines += ["<details><summary>What changed</summary>", "", *changed, "", "</details>", ""] if changed else []
    for entry in ("Paper", "Papers", "Data", "Setting", "Note"):
        if entry in result.card:
            lines += [f"- {entry}: {result.card[entry]}"]
    commit = "unknown" if report.commit is None else f"`{report.commit[:SHORT]}`"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    seeds = ", ".join(map(str, report.seeds))
    lines += [
        f"- Measured: preset {report.preset}, seeds {seeds}, on {report.device} in {_duration(report.wall_s)}, "
        f"commit {commit}; {versions}",
        f"- Again: `{rerun(report)}`",
        f"- All numbers: [results/{result.system}.json](results/{result.system}.json)",
        "",
        "| claim | baseline | ours | holds? | why |",
        "|---|---|---|---|---|",
    ]
    for f in _findings(report):
        cells = (f["claim"], f["baseline"], f["ours"], VERDICTS[f["holds"]], f["reason"])
        lines += [f"| {' | '.join(map(_cell, cells))} |"]
    return "\n".join(lines)


def _gallery(result: Result) -> str:
    lines = [f"### Figures of {result.system}", ""]
    return "\n".join(lines + [f"![{pathlib.PurePosixPath(path).stem}]({path})" for path in result.figures])


def _findings(report: Report) -> list[Mapping]:
    """The claims one by one; a report that was not made of findings has one."""
    whole = {"claim": report.claim, "baseline": "", "ours": "", **report.holds}
    return (report.details or {}).get("findings") or [whole]


def rerun(report: Report) -> str:
    """The command that measures it again: that of the report, but from the start if that went on with a run."""
    words = shlex.split(report.command)
    if "--resume" in words:
        words.remove("--resume")
        if not any(word.startswith("--preset") for word in words):
            words += ["--preset", report.preset]
    return shlex.join(words)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def read_marks(page: str) -> dict[str, str]:
    """The marks of a page: `render(results, read_marks(render(results, marks))) == render(results, marks)`."""
    marks = {}
    for section in re.split(r"^### ", page.split("\n## Figures\n")[0], flags=re.MULTILINE)[1:]:
        system, rest = section.split("\n", 1)
        stale = re.search(r"^\*\*Stale\*\*: (.*)\.$", rest, flags=re.MULTILINE)
        changed = re.search(r"^<details>.*\n\n((?:- .*\n)+)", rest, flags=re.MULTILINE)
        marks[system] = (stale[1] if stale else "") + ("\n" + changed[1].rstrip() if changed else "")
    return marks


def main(argv: Sequence[str] | None = None, root: pathlib.Path = ROOT) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page would change")
    args = parser.parse_args(argv)
    try:
        results = read_results(root)
        marks = marks_now(results, root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except freshness.NoHistoryError as error:
        print(
            f"error: {error}. Results are compared with the code of their commits, which takes git and the history of "
            f"this repository; {PAGE} is left as it is.",
            file=sys.stderr,
        )
        return 2
    text, page = render(results, marks), root / PAGE
    stale = [system for system, mark in marks.items() if mark]
    if not args.check:
        page.write_text(text, encoding="utf-8")
        print(f"{PAGE}: {len(results)} results, {len(stale)} of them stale{': ' * bool(stale)}{', '.join(stale)}")
        return 0
    written = page.read_text(encoding="utf-8") if page.is_file() else ""
    if written == text:
        print(f"{PAGE} is up to date")
        return 0
    known = read_marks(written)
    differing = [system for system, mark in marks.items() if known.get(system) != mark]
    why = f"what changed since these results differs: {', '.join(differing)}" if differing else "its text differs"
    print(f"{PAGE} is not up to date: {why}. Run python -m experiments.report", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
