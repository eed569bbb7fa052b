"""Rates of data generation and of inference for `operators.py`.

Darcy: solutions on the disk with 64 x 64 nodes, by the library's batched conjugate gradients and by a loop over SciPy's
sparse LU on the same matrices (SuperLU with the ordering for symmetric matrices, its fastest here). Fisher: instances
of the paper's three forms, fields drawn and equations solved, beside a loop over `scipy.integrate.solve_ivp` (DOP853 on
the same Fourier discretisation, which draws nothing). The loops run on a few instances and count by the instance; how
far the two sides' solutions differ is measured.

Inference: query points per second of `small_deeponet`, the network of the demo studies (branch 68, N = 1,280 to 65,536
points), for one function, for a batch on a common set of points, for points of each function's own, and for a trunk
that was evaluated before. A query point is one value of one function at one point. Many points at once leave the cache:
taking them in chunks, one after the other, is faster.

Letters: B functions, N points, n nodes along an axis.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from operators_measure import Timed, in_turns, milliseconds, say

from mtjax.data.pde import darcy, fisher, gaussian_process
from mtjax.data.pde.geometry import Grid, discretize, named
from mtjax.models.deeponet import predict_at
from mtjax.models.mt_deeponet import small_deeponet

TOLERANCE = 1e-6  # of the solver and of `solve_ivp`


def missing_scipy() -> str | None:
    """Why there is no SciPy side, or None."""
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def generation(
    *, fields: int, nodes: int, per_form: int, turns: int, few: int, chunk: int, patience: float
) -> list[dict]:
    """Rows of both equations, ours and SciPy's."""
    timing = {"turns": turns, "patience": patience}
    return darcy_rows(fields, nodes, few, chunk, timing) + fisher_rows(per_form, few, timing)


def _rows(problem: str, functions: list[tuple[str, Timed]], timing: dict, unit: str, deviation: float | None) -> list:
    results = in_turns([function for _, function in functions], **timing)
    rows = []
    for side, function in functions:
        result = results[function.name]
        row = {"problem": problem, "side": side, "unit": unit, "counted": function.work, **result}
        rows.append(row | {"per_s": round(1e3 / result["ms"], 1)})
        say(f"{problem}, {side}: {rows[-1]['per_s']:,} {unit}/s")
    if len(rows) > 1:
        rows[-1]["deviation"] = deviation
        say(f"{problem}: the sides differ by at most {deviation:.1e}")
    return rows


# Darcy.


def darcy_fields(count: int, nodes: int) -> np.ndarray:
    """K f32[B, n, n] of the demo study."""
    ticks = np.linspace(0.0, 1.0, nodes)
    sampler = gaussian_process.karhunen_loeve(darcy.FIELD, (ticks, ticks), terms=min(100, nodes**2))
    return np.exp(np.asarray(jax.jit(jax.vmap(sampler))(jax.random.split(jax.random.key(0), count))))


def darcy_rows(fields: int, nodes: int, few: int, chunk: int, timing: dict) -> list[dict]:
    grid, permeability = discretize(named("disk"), nodes), darcy_fields(fields, nodes)
    found = {}

    def ours():
        found["ours"] = darcy.solve(permeability, grid, tolerance=TOLERANCE, chunk=chunk).values

    functions = [("mtjax", Timed("solve", ours, fields))]
    deviation = None
    if missing_scipy() is None:

        def theirs():
            found["theirs"] = sparse_lu(permeability[:few], grid)

        functions.append(("SciPy", Timed("sparse LU", theirs, few)))
        theirs()
        ours()
        scale = np.abs(found["theirs"]).max()
        deviation = float(np.abs(found["ours"][:few] - found["theirs"]).max() / scale)
    return _rows(f"Darcy {nodes} x {nodes}", functions, timing, "solutions", deviation)


def sparse_lu(permeability: np.ndarray, grid: Grid) -> np.ndarray:
    """u f64[B, n, n] for f = 1, u = 0 on the boundary: the matrices at once, then a factorization for each."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    log_k = jnp.moveaxis(jnp.log(permeability), 0, -1)
    matrix, _ = darcy.assemble(
        log_k, jnp.asarray(grid.theta, jnp.float32), jnp.asarray(grid.mask), jnp.zeros((4, 1, 1))
    )
    diagonal, first, second = (np.asarray(part, np.float64) for part in (matrix.diagonal, *matrix.links))
    inside = np.flatnonzero(grid.mask)
    number = np.full(grid.mask.shape, -1)
    number[grid.mask] = np.arange(len(inside))
    entries = []  # (mask of nodes with a link to the next along the axis, numbers of its ends)
    for axis in (0, 1):
        joined = grid.mask & np.roll(grid.mask, -1, axis)
        entries.append((joined, number[joined], np.roll(number, -1, axis)[joined]))
    rows = np.concatenate([np.arange(len(inside)), *(part for _, low, high in entries for part in (low, high))])
    columns = np.concatenate([np.arange(len(inside)), *(part for _, low, high in entries for part in (high, low))])
    forcing = np.full(len(inside), float(grid.spacing[0]) ** 2)
    u = np.zeros(permeability.shape)
    for index in range(len(permeability)):
        links = [-link[..., index][joined] for link, (joined, _, _) in zip((first, second), entries, strict=True)]
        values = np.concatenate([diagonal[..., index][grid.mask], links[0], links[0], links[1], links[1]])
        system = csc_matrix((values, (rows, columns)), shape=(len(inside), len(inside)))
        factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        u[index].flat[inside] = factors.solve(forcing)
    return u


# Fisher.


def fisher_rows(per_form: int, few: int, timing: dict) -> list[dict]:
    config = fisher.FisherConfig()
    found = {}

    def ours():
        found["data"] = fisher.generate(config, train_per_form=per_form, validation_per_form=0, test_per_form=0)

    ours()
    train = found["data"]["train"]
    count = len(train["values"])
    functions, deviation = [("mtjax", Timed("generate", ours, count))], None
    if missing_scipy() is None:
        chosen = np.linspace(0, count - 1, few).astype(int)  # of all forms

        def theirs():
            found["theirs"] = np.stack([one_by_one(config, train, row) for row in chosen])

        functions.append(("SciPy", Timed("solve_ivp", theirs, few)))
        theirs()
        difference = np.linalg.norm(found["theirs"] - train["values"][chosen], axis=1)
        deviation = float((difference / np.linalg.norm(found["theirs"], axis=1)).max())
    return _rows(f"Fisher, {config.num_nodes} nodes", functions, timing, "instances", deviation)


def one_by_one(config: fisher.FisherConfig, data: dict, row: int) -> np.ndarray:
    """u f64[N] of an instance by `solve_ivp`."""
    from scipy.integrate import solve_ivp

    form = config.forms[data["task"][row]]
    a, b = (float(data["parameters"][name][row]) for name in ("a", "b"))
    pattern = a * np.array((*reversed(form.pattern), 0.0))
    waves = 2 * np.pi * np.arange(config.num_nodes // 2 + 1) / config.length
    decay = -config.diffusion * waves**2

    def slope(_, u):
        source = np.polyval(pattern, u)
        if form.damped:
            source = source * np.exp(-b * (1 - u))
        return np.fft.irfft(decay * np.fft.rfft(u), config.num_nodes) + source

    initial = data["inputs"]["initial"][row].astype(np.float64)
    times = np.linspace(0, config.horizon, config.num_times)
    solution = solve_ivp(slope, (0, config.horizon), initial, "DOP853", times, rtol=TOLERANCE, atol=1e-3 * TOLERANCE)
    return solution.y.T.ravel()


# Inference.


def inference(*, points: int, functions: int, turns: int, seconds: float, patience: float) -> list[dict]:
    """Query points per second of the demo network, jitted, for each layout.

    Args:
      points: N of one function; a batch has N / 16 points in common, or N / B of each function's own.
      functions: B of the batches.
      turns: of each.
      seconds: length of a turn.
      patience: seconds to wait for quiet moments.
    """
    model = small_deeponet()
    rng = np.random.default_rng(0)

    def batch(count, *shape):
        return {
            "inputs": jnp.asarray(rng.normal(size=(count, 68)), jnp.float32),
            "points": jnp.asarray(rng.uniform(size=(*shape, 2)), jnp.float32),
        }

    variables = jax.jit(model.init)(jax.random.key(0), batch(1, 8))
    common = batch(functions, points // 16)
    basis = jax.jit(lambda variables, points: model.apply(variables, points, method="basis"))
    before = {"inputs": common["inputs"], "basis": basis(variables, common["points"])}

    def apply(variables, batch):
        return model.apply(variables, batch)["u"]

    def combine(variables, batch):
        coefficients = model.apply(variables, batch, method="encode")
        return model.apply(variables, coefficients, batch["basis"], batch, method="combine")

    def in_chunks(variables, batch):
        return predict_at(model, variables, batch)["u"]

    single = batch(1, points)
    cases = {
        "one function": (in_chunks, single),
        "one function, all points at once": (apply, single),
        "batch x common points": (apply, common),
        "points of their own": (apply, batch(functions, functions, points // functions)),
        "trunk evaluated before": (combine, before),
        "one field of 1,280 points": (apply, batch(1, 1280)),
    }
    timed = []
    for name, (function, arguments) in cases.items():
        timed.append(_timed_call(name, function, (variables, arguments), seconds))
    results = in_turns(timed, turns=turns, patience=patience)
    rows = []
    for name, (function, arguments) in cases.items():
        values = jax.eval_shape(function, variables, arguments).size
        row = {"layout": name, "functions": len(arguments["inputs"]), "values": values, **results[name]}
        row |= {"per_s": round(1e3 * values / row["ms"]), "per_cpu_s": round(1e3 * values / max(row["cpu_ms"], 1e-9))}
        rows.append(row)
        say(f"inference, {name}: {row['per_s']:,} query points/s ({milliseconds(row['ms'] / 1e3):g} ms for {values:,})")
    return rows


def _timed_call(name: str, function: Callable, arguments: tuple, seconds: float) -> Timed:
    """Calls of a jitted function, as many as fit in `seconds`."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - began
    jax.block_until_ready(compiled(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, min(100, int(seconds / (time.perf_counter() - began))))

    def run():
        for _ in range(calls):
            out = compiled(*arguments)
        jax.block_until_ready(out)

    return Timed(name, run, calls, compile_s)
