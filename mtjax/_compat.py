"""Refuses the one jaxlib release that silently computes wrong per-task gradients.

XLA:CPU of jaxlib 0.10.2 miscompiles reductions inside `vmap(vjp)`: the Jacobian of losses behind a layer norm is off by
20-30 % for all rows but the first, at sizes that small tests do not reach (jax-ml/jax#39103). Per-task gradients are
what this library is about, so it does not start with that release unless the faulty fusion is switched off.
"""

import os
import pathlib
import sys

import jaxlib

BROKEN_JAXLIB = "0.10.2"
WORKAROUND = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


def doctor_asked(argv: list[str]) -> bool:
    """Whether this is `mtjax doctor` or `python -m mtjax doctor`, which says what is wrong, and so is not refused.

    Args:
      argv: sys.argv as it is while this package is imported.
    """
    return argv[1:2] == ["doctor"] and pathlib.Path(argv[0]).name in ("mtjax", "mtjax.exe", "-m")


def check_jaxlib(version: str = jaxlib.__version__, flags: str | None = None) -> None:
    """Raises ImportError for the broken release, unless the workaround is set in XLA_FLAGS.

    Args:
      version: version of jaxlib.
      flags: value of XLA_FLAGS; by default that of the environment.
    """
    flags = os.environ.get("XLA_FLAGS", "") if flags is None else flags
    if version == BROKEN_JAXLIB and WORKAROUND not in flags and not doctor_asked(sys.argv):
        raise ImportError(
            f"jaxlib {BROKEN_JAXLIB} computes wrong per-task gradients on CPU (jax-ml/jax#39103) and mtjax refuses to "
            f"run on it. Install another release (pip install 'jax!={BROKEN_JAXLIB}' 'jaxlib!={BROKEN_JAXLIB}'), or "
            f"set XLA_FLAGS={WORKAROUND} before Python starts."
        )
