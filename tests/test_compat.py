"""The jaxlib release with wrong per-task gradients: refused at import, excluded by the package's requirements."""

import pathlib
import re
import sys
import tomllib

import jaxlib
import pytest

from mtjax import _compat

PYPROJECT = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def test_the_broken_release_is_refused():
    with pytest.raises(ImportError) as error:
        _compat.check_jaxlib("0.10.2", flags="")
    message = str(error.value)
    assert message.startswith("jaxlib 0.10.2 computes wrong per-task gradients on CPU (jax-ml/jax#39103)")
    assert "pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'" in message  # the cure, ready to paste
    assert "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce" in message


@pytest.mark.parametrize(
    "flags",
    [
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",
        "--xla_dump_to=/tmp/x --xla_cpu_experimental_ynn_fusion_type=-reduce --xla_cpu_use_thunk_runtime=true",
    ],
)
def test_the_workaround_lets_it_pass(flags, monkeypatch):
    _compat.check_jaxlib("0.10.2", flags=flags)
    monkeypatch.setenv("XLA_FLAGS", flags)
    _compat.check_jaxlib("0.10.2")


def test_flags_come_from_the_environment(monkeypatch):
    for flags in (None, "", "--xla_force_host_platform_device_count=8"):
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        if flags is not None:
            monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(ImportError):
            _compat.check_jaxlib("0.10.2")


def test_the_doctor_is_not_refused(monkeypatch):
    """It is to say what is wrong: sys.argv as it is while `python -m mtjax doctor` or `mtjax doctor` import us."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for argv in (["-m", "doctor"], ["/usr/bin/mtjax", "doctor", "--quick"]):
        monkeypatch.setattr(sys, "argv", argv)
        _compat.check_jaxlib("0.10.2")
    for argv in (["-m", "inspect"], ["train.py", "doctor"], ["-c"], [""], []):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(ImportError):
            _compat.check_jaxlib("0.10.2")


@pytest.mark.parametrize("version", ["0.10.0", "0.10.1", "0.10.20", "0.11.0", "0.12.0.1", jaxlib.__version__])
def test_other_releases_pass(version):
    _compat.check_jaxlib(version, flags="")


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_requirements_exclude_it(package):
    (requirement,) = (r for r in PYPROJECT["dependencies"] if re.match(rf"{package}\b", r))
    assert "!=0.10.2" in requirement.removeprefix(package).split(",")


@pytest.mark.parametrize("extra", ["cuda", "tpu"])
def test_accelerator_extras_exclude_it_too(extra):
    for requirement in PYPROJECT["optional-dependencies"][extra]:
        assert "!=0.10.2" in requirement.split("]")[1].split(",")
