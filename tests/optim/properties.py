"""The table of all methods, and what each of them does, measured: shared by tests, and the source of PROPERTIES.md.

    python tests/optim/properties.py          # writes mtjax/optim/PROPERTIES.md
    python tests/optim/properties.py --check  # exits with 1 if that file is not what is measured

To add a method, add a line to METHODS, and to VARIANTS one for each option that changes what it computes. Properties
are those of the first update, measured on random matrices; a cross in the table is a counterexample that was found.

Letters: K tasks, P parameters, N matrices; g_k the rows of J, n_k their norms; d the update.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import optim

K, P, N = 4, 6, 40
TABLE_FILE = pathlib.Path(__file__).parents[2] / "mtjax" / "optim" / "PROPERTIES.md"

uniform = lambda k: np.full(k, 1.0 / k)  # noqa: E731

# name -> the method for k tasks
LOSSES = {
    "linear": lambda k: optim.linear(),
    "scale_invariant": lambda k: optim.scale_invariant(),
    "uncertainty": lambda k: optim.uncertainty(),
    "dwa": lambda k: optim.dwa(),
    "gls": lambda k: optim.gls(),
    "rlw": lambda k: optim.rlw(),
    "imtl_l": lambda k: optim.imtl_l(),
    "stch": lambda k: optim.stch(1.0),
    "tchebycheff": lambda k: optim.tchebycheff(),
    "cosmos": lambda k: optim.cosmos(None, 1.0),
    "pbi": lambda k: optim.pbi(None),
    "famo": lambda k: optim.famo(),
}
GRAMIAN = {
    "mgda": lambda k: optim.mgda(),
    "pcgrad": lambda k: optim.pcgrad(),
    "gradvac": lambda k: optim.gradvac(),
    "cagrad": lambda k: optim.cagrad(),
    "imtl_g": lambda k: optim.imtl_g(),
    "nash_mtl": lambda k: optim.nash_mtl(),
    "fairgrad": lambda k: optim.fairgrad(),
    "aligned_mtl": lambda k: optim.aligned_mtl(),
    "config": lambda k: optim.config(),
    "upgrad": lambda k: optim.upgrad(),
    "dual_proj": lambda k: optim.dual_proj(),
    "pcd": lambda k: optim.pcd(),
    "krum": lambda k: optim.krum(num_byzantine=0),
    "gradnorm": lambda k: optim.gradnorm(),
    "ntk_balance": lambda k: optim.ntk_balance(),
    "rgw": lambda k: optim.rgw(),
    "cr_mogm": lambda k: optim.cr_mogm(optim.mgda()),
    "epo": lambda k: optim.epo(np.ones(k)),
    "pmtl": lambda k: optim.pmtl(np.eye(k) + 0.2, 0),
    "modo": lambda k: optim.modo(),
    "sdmgrad": lambda k: optim.sdmgrad(),
    "auto_lambda": lambda k: optim.auto_lambda(),
    "moml": lambda k: optim.moml(),
    "forum": lambda k: optim.forum(),
}
ENTRIES = {
    "graddrop": lambda k: optim.graddrop(),
    "trimmed_mean": lambda k: optim.trimmed_mean(min(1, (k - 1) // 2)),
    "moco": lambda k: optim.moco(),
    "db_mtl": lambda k: optim.db_mtl(),
    "excess_mtl": lambda k: optim.excess_mtl(),
    "momentum_config": lambda k: optim.momentum_config(),
}
METHODS = LOSSES | GRAMIAN | ENTRIES
VARIANTS = {
    "linear('mean')": lambda k: optim.linear("mean"),
    "linear(given)": lambda k: optim.linear(np.linspace(0.5, 2.0, k).tolist()),
    "uncertainty(scale=given)": lambda k: optim.uncertainty(scale=[0.5] * (k - 1) + [1.0]),
    "mgda('l2')": lambda k: optim.mgda("l2"),
    "mgda('loss')": lambda k: optim.mgda("loss"),
    "mgda('loss+')": lambda k: optim.mgda("loss+"),
    "pcgrad(reduction='mean')": lambda k: optim.pcgrad(reduction="mean"),
    "cagrad(c=2)": lambda k: optim.cagrad(c=2.0),
    "nash_mtl(max_norm=None)": lambda k: optim.nash_mtl(max_norm=None),
    "fairgrad(2)": lambda k: optim.fairgrad(2.0),
    "aligned_mtl('median')": lambda k: optim.aligned_mtl("median"),
    "aligned_mtl('rmse')": lambda k: optim.aligned_mtl("rmse"),
    "every(mgda, 2)": lambda k: optim.every(optim.mgda(), 2),
    "ema(upgrad, of='gramian')": lambda k: optim.ema(optim.upgrad(), of="gramian"),
    "clip_weights(imtl_g)": lambda k: optim.clip_weights(optim.imtl_g()),
    "krum(1)": lambda k: optim.krum(1),
    "per_group(mgda)": lambda k: optim.per_group(optim.mgda()),
}
TABLE = METHODS | VARIANTS
FEWEST = {"krum": 3, "krum(1)": 4}  # tasks that a method needs; the others take one
# Their plain update needs what a Jacobian does not hold; they have tests of their own.
ROUTE_ONLY = ("cosreg", "rotograd", "sam", "asam", "flat_regions")

PROPERTIES = {
    "plain": "K = 1: d = g",
    "scale": "scaling all gradients scales d",
    "linear": "linear under scaling: d is linear in the row norms (c > 0)",
    "permutation": "does not depend on the order of tasks",
    "conflict-free": "non-conflicting: no loss rises to first order, J d >= 0",
    "stationary": "d = 0 where a positive combination of the gradients is zero",
    "moves": "d is not 0 elsewhere",
}


@functools.cache
def method_of(name: str, num_tasks: int = K) -> optim.Method:
    return TABLE[name](num_tasks)


@functools.cache
def updater(name: str, num_tasks: int = K) -> Callable:
    """jitted (matrices [n, K, P], losses [n, K]) -> (directions [n, P], states after the first update)."""
    method = method_of(name, num_tasks)

    def update(rows, losses):
        params = jnp.zeros(rows.shape[1:])
        return method.update(rows, optim.init(method, params, num_tasks=num_tasks), params, losses=losses)

    return jax.jit(jax.vmap(update))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Random matrices [n, K, P] of each kind, and losses [n, K]."""

    generic: np.ndarray
    stationary: np.ndarray
    losses: np.ndarray
    order: np.ndarray
    factors: tuple[np.ndarray, np.ndarray]


@functools.cache
def samples() -> Samples:
    rng = np.random.default_rng(0)
    generic = rng.normal(size=(N, K, P)) * 10 ** rng.uniform(-0.5, 0.5, (N, K, 1))
    # Rows whose positive combination is exactly zero (integers), of rank K - 1.
    whole = rng.integers(-8, 9, size=(N, K - 1, P)).astype(float)
    stationary = np.concatenate([whole, -(whole * rng.integers(1, 4, size=(N, K - 1, 1))).sum(1, keepdims=True)], 1)
    losses = rng.uniform(0.2, 3.0, (N, K))
    factors = tuple(10 ** rng.uniform(-1, 1, (2, N, K, 1)))
    return Samples(generic, stationary, losses, rng.permutation(K)[::-1], factors)


POWER = 12  # of two, for scale equivariance


@functools.cache
def measured(name: str) -> dict[str, bool]:
    """Property -> whether it holds for all samples; one compiled call."""
    s = samples()
    first, second = s.factors
    stack = {
        "as is": s.generic,
        "small": s.generic * 2.0**-POWER,
        "large": s.generic * 2.0**POWER,
        "permuted": s.generic[:, s.order],
        "first": first * s.generic,
        "second": second * s.generic,
        "both": (2.0 * first + 0.5 * second) * s.generic,
        "stationary": s.stationary,
    }
    losses = {key: s.losses[:, s.order] if key == "permuted" else s.losses for key in stack}
    rows = jnp.asarray(np.concatenate(list(stack.values())), jnp.float32)
    directions, _ = updater(name)(rows, jnp.asarray(np.concatenate(list(losses.values())), jnp.float32))
    d = dict(zip(stack, np.split(np.asarray(directions, np.float64), len(stack)), strict=True))
    size = {key: np.linalg.norm(matrix, axis=2).sum(1) for key, matrix in stack.items()}

    def equal(a, b, scale, tolerance=2e-3):
        """Within a share of the larger of |a| and (a little of) the rows; methods differ in how much cancels."""
        reach = np.maximum(np.linalg.norm(b, axis=1), 1e-3 * scale)
        return bool((np.linalg.norm(a - b, axis=1) <= tolerance * reach).all())

    one_task = s.generic[:, :1]
    plain = np.full((N, P), np.nan)
    if name not in FEWEST:
        plain, _ = updater(name, 1)(jnp.asarray(one_task, jnp.float32), jnp.asarray(s.losses[:, :1], jnp.float32))
    inner = np.einsum("nkp,np->nk", s.generic, d["as is"])
    allowed = 1e-3 * np.linalg.norm(s.generic, axis=2) * np.linalg.norm(d["as is"], axis=1)[:, None]
    return {
        "plain": equal(np.asarray(plain), one_task[:, 0], size["as is"]),
        "scale": equal(d["small"] * 2.0**POWER, d["as is"], size["as is"])
        and equal(d["large"] * 2.0**-POWER, d["as is"], size["as is"]),
        "linear": equal(2.0 * d["first"] + 0.5 * d["second"], d["both"], size["both"]),
        "permutation": equal(d["permuted"], d["as is"], size["as is"]),
        "conflict-free": bool((inner >= -allowed).all()),
        "stationary": bool((np.linalg.norm(d["stationary"], axis=1) <= 2e-3 * size["stationary"]).all()),
        "moves": bool((np.linalg.norm(d["as is"], axis=1) > 1e-6 * size["as is"]).all()),
    }


def needs(name: str) -> str:
    """What a method looks at."""
    method = method_of(name)
    if method.weighting is None:
        return "entries"
    parts = ["losses"] * method.weighting.needs_losses + ["Gramian"] * method.weighting.needs_gramian
    if method.weighting.observe is not None:
        parts.append("losses after the step")
    if method.route is not None:
        parts.append("several batches")
    return ", ".join(parts) or "nothing"


def state_size(name: str) -> str:
    """The order of a method's own state."""
    size = 1000
    params = jax.ShapeDtypeStruct((size,), jnp.float32)
    method = method_of(name)
    inner = jax.eval_shape(lambda p: optim.init(method, jnp.zeros(p.shape), num_tasks=K), params).inner
    numbers = max((leaf.size for leaf in jax.tree.leaves(inner)), default=0)
    if numbers >= size:
        return "K P" if numbers >= K * size else "P"
    if numbers >= K * K:
        return "K²"
    return "K" if numbers >= K else "1" if numbers else "none"


def render() -> str:
    """PROPERTIES.md."""
    short = {
        "plain": "K = 1 is plain",
        "scale": "scale",
        "linear": "linear",
        "permutation": "order",
        "conflict-free": "non-conflicting",
        "stationary": "stops",
        "moves": "moves",
    }
    lines = [
        "# What the methods do",
        "",
        "Measured on random matrices by `tests/optim/properties.py`, which writes this file; tests fail if it differs.",
        f"Properties are those of the first update ({N} matrices of {K} tasks, float32); a cross is a counterexample",
        "that was found. (Krum needs more than one task.)",
        "",
        *(f"- **{short[key]}**: {text}." for key, text in PROPERTIES.items()),
        "",
        "| method | looks at | own state | " + " | ".join(short[key] for key in PROPERTIES) + " |",
        "|---|---|---|" + ":-:|" * len(PROPERTIES),
    ]
    for name in TABLE:
        marks = ["✓" if measured(name)[key] else "✗" for key in PROPERTIES]
        lines.append(f"| `{name}` | {needs(name)} | {state_size(name)} | " + " | ".join(marks) + " |")
    lines += [
        "",
        "`cosreg`, `rotograd`, `sam`, `asam` and `flat_regions` need more than a Jacobian and are tested on their own.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        sys.exit(text != TABLE_FILE.read_text())
    TABLE_FILE.write_text(text)
    print(f"{len(TABLE)} methods -> {TABLE_FILE}")
