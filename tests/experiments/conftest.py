"""Scripts as a user runs them: loaded from their files, called with arguments, in their smallest form."""

import importlib
import importlib.util
import pathlib
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def load_script():
    """`("family/system.py") -> module`; the files beside it are importable, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "Agg")

        def load(path: str):
            path = EXPERIMENTS / path
            patch.syspath_prepend(path.parent)
            name = f"{path.parent.name}_{path.stem}_script"
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(scope="module")
def import_beside():
    """`(names, *folders) -> module` of the first name, imported anew with the folders importable; all are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        forget = []

        def load(names: tuple[str, ...], *folders: str):
            for folder in folders:
                patch.syspath_prepend(EXPERIMENTS / folder)
            for name in names:
                patch.delitem(sys.modules, name, raising=False)
            forget.extend(names)
            return importlib.import_module(names[0])

        yield load
        for name in forget:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run_smoke(tmp_path_factory):
    """`(module, *arguments) -> run directory` of its smoke preset, which leaves the committed results alone."""

    def stamps():
        return {path: path.stat().st_mtime_ns for path in (EXPERIMENTS / "results").rglob("*")}

    def smoke(module, *arguments: str) -> pathlib.Path:
        run, before = tmp_path_factory.mktemp("smoke") / "run", stamps()
        assert module.main(["--preset", "smoke", "--run", str(run), *arguments]) == 0
        assert stamps() == before
        return run

    return smoke


@pytest.fixture
def call_script(capsys):
    """`(module, *arguments) -> exit status, stdout, stderr`."""

    def call(module, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call
