"""The training step on a GPU for `operators.py`: what share of the device's own ceilings it reaches.

The ceilings are measured in the same run: the rate of a large square matrix product at the same precision, and of
adding a number to a large array (read and written once). The step's arithmetic is that of its matrix products
(`operators_steps.multiply_adds`, two operations each), its traffic what XLA says that the compiled step reads and
writes. The *bound* is the time that either ceiling alone would allow, whichever is longer.

Precisions: 'float32' is full single precision; 'tensorfloat32' rounds the factors of a product to 10 bits of mantissa,
which is JAX's default on such devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from operators_measure import Timed, in_turns, say
from operators_steps import Size, chunked, fused, library, multiply_adds, timed_training

PRECISIONS = ("float32", "tensorfloat32")


def ceilings(matrix: int, megabytes: int, turns: int) -> dict[str, Any]:
    """{'flops': {precision: per second}, 'bytes': per second}."""
    found: dict[str, Any] = {"flops": {}}
    x = jnp.ones((megabytes * 2**18,), jnp.float32)  # 4 bytes each
    timed = [_repeated("copy", lambda x: x + 1, x)]
    square = jnp.full((matrix, matrix), 1 / matrix, jnp.float32)
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            timed.append(_repeated(precision, lambda a: a @ a, square))
    results = in_turns(timed, turns=turns)
    found["bytes"] = 2 * x.nbytes / (1e-3 * results["copy"]["ms"])
    for precision in PRECISIONS:
        found["flops"][precision] = 2 * matrix**3 / (1e-3 * results[precision]["ms"])
    return found


def _repeated(name: str, function, x: jax.Array, count: int = 10) -> Timed:
    """`count` calls, each on the result of the one before."""
    program = jax.jit(function).lower(x).compile()

    def run():
        y = x
        for _ in range(count):
            y = program(y)
        jax.block_until_ready(y)

    return Timed(name, run, count)


def training(sizes: Sequence[Size], *, turns: int, steps: int, matrix: int, megabytes: int, torch_side: Any) -> list:
    """Rows of every size, precision and form, and of PyTorch on the same device if it has it."""
    limits = ceilings(matrix, megabytes, turns)
    say("ceilings: " + ", ".join(f"{p} {f / 1e12:.1f} TFLOP/s" for p, f in limits["flops"].items()))
    say(f"ceilings: memory {limits['bytes'] / 1e9:.0f} GB/s")
    rows = []
    for size in sizes:
        model, params, batch = size.model(), size.params(), size.batch()
        batches = {"library": jax.tree.map(jnp.asarray, batch), "by hand": jax.tree.map(jnp.asarray, chunked(batch))}
        timed, about = [], {}
        for precision in PRECISIONS:
            for form, make in (("library", library), ("by hand", fused)):
                key = f"mtjax, {form}, {precision}"
                with jax.default_matmul_precision(precision):
                    timed.append(timed_training(key, make(model), params, batches[form], steps=steps, scan=True))
                about[key] = ("mtjax", form, precision, timed[-1].traffic)
        if torch_side is not None and torch_side.torch.cuda.is_available():
            for precision, allowed in zip(PRECISIONS, ("highest", "high"), strict=True):
                key = f"PyTorch, {precision}"
                timed.append(_with_precision(torch_side, allowed, key, size, params, batch, steps))
                about[key] = ("PyTorch", "as written", precision, None)
        results = in_turns(timed, turns=turns)
        for key, (side, form, precision, traffic) in about.items():
            rows.append(_row(size, side, form, precision, traffic, results[key], limits))
            row = rows[-1]
            say(
                f"{size.name}, B = {size.functions}, {key}: {row['ms']} ms, {row['tflops']:.1f} TFLOP/s "
                f"({row['of_matmul']:.0%} of the matmul ceiling), at {row.get('of_bound', 0):.0%} of the bound"
            )
        del timed, batches
    return rows


def _with_precision(torch_side: Any, allowed: str, key: str, size: Size, params: Any, batch: dict, steps: int) -> Timed:
    """The bare loop on the GPU, its precision set before each run."""
    timed = torch_side.bare(key, size, params, batch, steps=steps, device="cuda")

    def run():
        torch_side.torch.set_float32_matmul_precision(allowed)
        return timed.run()

    return timed._replace(run=run)


def _row(size: Size, side: str, form: str, precision: str, traffic: float | None, result: dict, limits: dict) -> dict:
    seconds = 1e-3 * result["ms"]
    operations = 2 * multiply_adds(size, fused=side == "mtjax")
    peak = limits["flops"][precision]
    row = {"size": size.name, "functions": size.functions, "points": size.points, "side": side, "form": form}
    row |= {"precision": precision, **result, "tflops": operations / seconds / 1e12, "matmul_tflops": peak / 1e12}
    row |= {"of_matmul": operations / seconds / peak, "copy_gb_per_s": limits["bytes"] / 1e9}
    if traffic is not None:
        bound = max(operations / peak, traffic / limits["bytes"])
        row |= {"gb_per_s": traffic / seconds / 1e9, "of_copy": traffic / seconds / limits["bytes"]}
        row |= {"of_bound": bound / seconds}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
