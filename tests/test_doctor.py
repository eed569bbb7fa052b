"""The doctor: a healthy installation passes, faults and broken parts are named. Commands reach their modules."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import mtjax
from mtjax import __main__ as command
from mtjax import _compat, doctor

ROOT = Path(__file__).parent.parent


def wrong(lines):
    return [line.wrong for line in lines if line.wrong]


def test_this_installation_is_healthy(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert text.endswith("Nothing is wrong.\n") and "!!" not in text
    assert f"jax                  {jax.__version__}\n" in text and f"8 x {jax.devices()[0].device_kind}" in text
    assert [title for title in doctor.CHECKS if f"\n{title}\n" not in f"\n{text}"] == []
    assert "on cpu               right, relative error" in text


def test_the_computed_check_sees_a_wrong_row(monkeypatch):
    """A Jacobian whose rows but the first are 20 % off, as by the faulty release."""
    right = mtjax.value_and_jacobian

    def faulty(loss_fn):
        def with_fault(params):
            losses, jacobian = right(loss_fn)(params)
            return losses, jax.tree.map(lambda leaf: leaf.at[1:].multiply(1.2), jacobian)

        return with_fault

    monkeypatch.setattr(mtjax.gradients, "value_and_jacobian", faulty)
    assert doctor.jacobian_error() == pytest.approx(0.2, rel=1e-3)
    (line,) = doctor.jacobian_check()
    assert line.wrong == "Per-task gradients are wrong on cpu: do not train with this jaxlib"


def test_known_faults():
    broken = {"jaxlib": _compat.BROKEN_JAXLIB}
    (line,) = doctor.faults(broken, ["cpu"], "")
    assert "wrong per-task gradients on CPU (jax-ml/jax#39103)" in line.wrong and _compat.WORKAROUND in line.wrong
    assert wrong(doctor.faults(broken, ["cpu"], f"--xla_dump_to=x {_compat.WORKAROUND}")) == []
    assert len(wrong(doctor.faults({"jaxlib": "0.11.0"}, ["cpu"], _compat.WORKAROUND))) == 1
    assert list(doctor.faults({"jaxlib": "0.10.1"}, ["cpu"], "")) == []
    assert list(doctor.faults(broken, ["tpu"], "")) == []


def test_a_version_outside_of_what_is_declared(monkeypatch):
    real = importlib.metadata.version
    versions = {"optax": "0.1.9", "flax": None}

    def version(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    assert wrong(doctor.versions()) == []
    monkeypatch.setattr(importlib.metadata, "version", version)
    sentences = wrong(doctor.versions())
    assert len(sentences) == 2 and sentences[0] == "flax is needed: pip install flax"
    assert sentences[1].startswith("mtjax declares optax") and ">=0.2.8" in sentences[1]


def test_folders_with_their_sizes(monkeypatch, tmp_path):
    compiled = tmp_path / "data" / "jax"
    compiled.mkdir(parents=True)
    (compiled / "program").write_bytes(bytes(3000))
    (tmp_path / "data" / "rooms.npz").write_bytes(bytes(500))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    monkeypatch.setenv("MTJAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))
    programs, data, tfds = doctor.caches()
    assert programs.value == f"{compiled}: 3 kB in 1 files" and data.value == f"{tmp_path / 'data'}: 500 B in 1 files"
    assert programs.wrong == data.wrong == ""
    assert tfds.wrong == f"{tmp_path / 'file'} cannot be written; name another folder by TFDS_DATA_DIR"


def test_optional_packages_are_installed_by_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in doctor.OPTIONAL:
        if "mtjax[" in package.install:
            names = "".join(extras[package.install.split("[")[1].split("]")[0]])
            assert package.module.split(".")[0] in names
    lines = {line.name: line.value for line in doctor.optional()}
    assert lines["tyro"] == "the command lines of the experiments"


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", (doctor.Optional("no_such.module", "no-such", "nothing"),))
    assert list(doctor.optional()) == [("no_such.module", "nothing (not installed: pip install no-such)", "")]


def test_launchers_are_told_apart():
    assert "no launcher" in next(doctor.cluster({})).value
    assert next(doctor.cluster({"SLURM_JOB_ID": "7"})).value == "SLURM (SLURM_JOB_ID=7)"


def test_a_part_that_breaks_is_a_sentence(monkeypatch, capsys):
    def broken():
        yield doctor.Line("first", "fine")
        raise RuntimeError("no\n  backend")

    monkeypatch.setattr(doctor, "CHECKS", {"Devices": broken})
    assert doctor.main(["--quick"]) == 1
    assert capsys.readouterr().out.endswith("Wrong:\n  devices: RuntimeError: no backend\n")


# The command `mtjax`.


def test_commands_are_modules_with_a_command_line(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (module, _) in command.COMMANDS.items():
        assert f"  {name} " in text
        assert 'if __name__ == "__main__":' in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mtjax {mtjax.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_no_command_is_an_error(arguments, capsys):
    assert command.main(arguments) == 2
    shown = "".join(capsys.readouterr())
    assert all(name in shown for name in command.COMMANDS)


def test_python_m_mtjax_runs_a_command():
    words = [sys.executable, "-m", "mtjax", "doctor", "--quick"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is wrong." in done.stdout and "Per-task gradients" not in done.stdout


def test_the_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mtjax": "mtjax.__main__:main"}
