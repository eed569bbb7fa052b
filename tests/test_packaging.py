"""The package: what a wheel and a source distribution hold, one version, and lowest versions that can be installed."""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import mtjax

ROOT = pathlib.Path(__file__).parent.parent
CONTENT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONTENT["project"]
# What the tests read beside the package itself.
FOR_TESTS = ("tests/conftest.py", "tests/train/toy.py", "experiments/tabular/multitab.py", "experiments/RESULTS.md")
FOR_TESTS += ("experiments/results/multitab.json", "colab/operators.ipynb", ".ci/core_tests", "README.md", "LICENSE")


def files(root: pathlib.Path, *patterns: str) -> set[str]:
    """Paths under a folder; not those that only lie around."""
    skipped = ("__pycache__", ".ipynb_checkpoints")
    return {
        path.relative_to(root).as_posix()
        for pattern in patterns
        for path in root.glob(pattern)
        if path.is_file() and not any(part in skipped for part in path.parts)
    }


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert CONTENT["tool"]["hatch"]["version"] == {"path": "mtjax/__init__.py"}
    # hatchling reads it without importing the package, which takes a plain assignment.
    source = (ROOT / "mtjax" / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', source, flags=re.MULTILINE) == [mtjax.__version__]


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "mtjax" / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0].split()[0] == mtjax.__version__


def test_every_requirement_has_a_lower_bound_that_can_be_pinned():
    """.ci/min_versions turns `name>=version` into `name==version`."""
    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        assert re.match(r"[\w.-]+(\[.*\])?>=[\d.]+", requirement), requirement


def test_the_version_jobs_run_tests_that_exist():
    script = (ROOT / ".ci" / "core_tests").read_text()
    named = re.findall(r"tests/\S+\.py", script)
    assert len(named) > 10 and [name for name in named if not (ROOT / name).is_file()] == []
    for job in ("min_versions", "newest_versions"):
        assert ".ci/core_tests" in (ROOT / ".ci" / job).read_text()
        subprocess.run(["bash", "-n", str(ROOT / ".ci" / job)], check=True, timeout=60)


def run(*words: str, cwd: pathlib.Path) -> str:
    done = subprocess.run(words, check=False, cwd=cwd, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the files, since a build writes beside them."""
    copy = tmp_path_factory.mktemp("source")
    for path in files(ROOT, "*", ".ci/*", "mtjax/**/*", "tests/**/*", "experiments/**/*", "colab/**/*", ".gitignore"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    return copy


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(source, tmp_path):
    """Built, installed into a fresh environment without its dependencies, imported from another folder."""
    python = sys.executable
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), ".", cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mtjax-{mtjax.__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("mtjax-")}
    assert held == files(source, "mtjax/**/*.py", "mtjax/**/*.md", "mtjax/py.typed")

    run(python, "-m", "venv", "fresh", cwd=tmp_path)
    fresh = str(tmp_path / "fresh" / "bin" / "python")
    run(fresh, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # Its dependencies are those of the environment of this test, behind its own packages.
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    outer = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "outer.pth").write_text(f"import sys; sys.path.append({outer!r})\n")
    program = (
        "import pkgutil, importlib, mtjax; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(mtjax.__path__, 'mtjax.') "
        "if m.name != 'mtjax.__main__']; print(mtjax.__version__, mtjax.__file__)"
    )
    version, file = run(fresh, "-c", program, cwd=tmp_path).split()[-2:]
    assert version == mtjax.__version__ and pathlib.Path(file).is_relative_to(site)
    tool = str(tmp_path / "fresh" / "bin" / "mtjax")
    assert run(tool, "--version", cwd=tmp_path) == f"mtjax {mtjax.__version__}\n"
    assert "Nothing is wrong." in run(tool, "doctor", "--quick", cwd=tmp_path)


@pytest.mark.slow
def test_a_source_distribution_holds_what_the_tests_read(source, tmp_path):
    run(sys.executable, "-m", "venv", "builder", cwd=tmp_path)
    builder = str(tmp_path / "builder" / "bin" / "python")
    run(builder, "-m", "pip", "install", "--quiet", *CONTENT["build-system"]["requires"], cwd=tmp_path)
    backend = f"from hatchling import build; print(build.build_sdist({str(tmp_path)!r}))"
    name = run(builder, "-c", backend, cwd=source).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert held >= set(FOR_TESTS) | files(
        source, "mtjax/**/*.py", "tests/**/*.py", "experiments/**/*.py", "experiments/**/*.md"
    )
    assert held >= files(source, "experiments/**/*.json", "experiments/**/*.png", "mtjax/**/*.md", "mtjax/py.typed")
    assert not any("__pycache__" in path or path.startswith("runs/") for path in held)
