r"""Mixed precision: products in bfloat16 from float32 parameters; losses, per-task gradients, Gramians in float32.

    L(theta, batch)  ->  L(c(theta), batch)        c: float32 -> bfloat16, leaf by leaf

The parameters that the optimiser holds stay as they are; the cast is part of the loss function, so its transpose brings
every row of the Jacobian back to float32, and a method sees nothing of it. (A product's gradient has been rounded to
bfloat16 once. What is summed after that, over tasks or micro-batches, is summed in float32.)

Inputs follow the parameters: a Linen module whose own parameters are bfloat16 casts the arrays that it is called with.
Activations which something promoted (a norm, a gate, a constant) come back that way at the next map. Labels, masks and
weights never enter a map, so they stay as they are; of a batch that is handed on as a dictionary only the entries
`INPUTS` are cast.

What stays float32, as is usual (`KEEP`, and `FEW_INPUTS`):

* norms, whose statistics flax computes in float32 anyway, and the softmax of attention;
* routers and gates: rounded logits choose other experts (Switch Transformers call this selective precision);
* the last map of a head: logits and fields are read by the loss to more than three digits;
* maps of a few inputs, such as a trunk's of coordinates: no work, and 0.501 and 0.502 are one number in bfloat16.

References: Micikevicius et al., "Mixed Precision Training", ICLR 2018. Fedus et al., "Switch Transformers", JMLR 2022,
section 2.4.

>>> import flax.linen as nn
>>> model, x = nn.Dense(1), jnp.ones((1, 8))
>>> params = model.init(jax.random.key(0), x)["params"]
>>> loss_fn = lambda params, x: {"a": model.apply({"params": params}, x).sum()}
>>> str(jax.make_jaxpr(compute_in(loss_fn))(params, x)).count("bf16[1,1] = dot_general")
1
>>> jax.grad(lambda params: compute_in(loss_fn)(params, x)["a"])(params)["kernel"].dtype.name
'float32'
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
KEEP = r"norm|router|gate|log_scales|head[^/]*/(.*/)?out"
"""Paths of parameters that stay as they are."""
FEW_INPUTS = 8
"""So do kernels f[inputs, outputs] of fewer inputs than this."""
INPUTS = ("numeric", "image", "inputs")
"""Entries of a batch that models read; not coordinates ('points'), labels, masks and weights."""


def compute_in(loss_fn: Callable, dtype: Any = jnp.bfloat16, *, keep: str = KEEP) -> Callable:
    """A loss function whose products are in `dtype`; its parameters, losses and gradients are as before.

    Args:
      loss_fn: `(params, *args) -> losses` or `(losses, aux)` (contract 1), of Linen models. Other functions compute in
        what their parameters and arguments promote to: there, cast the arguments.
      dtype: bfloat16; float32 gives `loss_fn` back. (float16 would need its losses scaled.)
      keep: regular expression; parameters whose '/'-joined path it finds are not cast.

    Returns:
      A loss function with the same arguments and results.

    Raises:
      ValueError: for another dtype.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return loss_fn
    if dtype != jnp.bfloat16:
        raise ValueError(f"dtype must be bfloat16 or float32 (float16 would need its losses scaled), got {dtype.name}")

    def in_dtype(params, *args, **kwargs):
        with nn.intercept_methods(_inputs_follow_parameters):
            result = loss_fn(cast_params(params, dtype, keep=keep), *args, **kwargs)
        losses, *aux = result if isinstance(result, tuple) else (result,)
        if isinstance(losses, Mapping):  # in the order of the tasks, which `jax.tree.map` would sort
            losses = {name: _at_least_float32(loss) for name, loss in losses.items()}
        else:
            losses = _at_least_float32(losses)
        return (losses, *aux) if aux else losses

    return in_dtype


def _at_least_float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def cast_params(params: PyTree, dtype: Any = jnp.bfloat16, *, keep: str = KEEP) -> PyTree:
    """Floating-point parameters in `dtype`, but for those whose path `keep` finds and kernels of `FEW_INPUTS`."""
    found = re.compile(keep)

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        few = name.endswith("kernel") and leaf.ndim == 2 and leaf.shape[0] < FEW_INPUTS
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if few or not floating or (keep and found.search(name)) else leaf.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def _inputs_follow_parameters(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Calls a method of a module with arrays in the dtype of its parameters, if that is half precision."""
    dtype = _own_dtype(context.module)
    if dtype is None:
        return call(*args, **kwargs)

    def cast(x):
        if isinstance(x, Mapping):
            return {name: cast(value) if name in INPUTS else value for name, value in x.items()}
        floating = isinstance(x, jax.Array | np.ndarray) and x.ndim and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, dtype) if floating else x

    return call(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _own_dtype(module: nn.Module) -> Any:
    """The dtype of the largest of a module's own parameters (not those of its submodules) if it is half precision."""
    params = {} if module.scope is None else module.variables.get("params", {})
    own = [leaf for leaf in params.values() if hasattr(leaf, "dtype")]
    largest = max(own, key=lambda leaf: leaf.size, default=None)
    half = largest is not None and jnp.issubdtype(largest.dtype, jnp.floating) and largest.dtype.itemsize == 2
    return largest.dtype if half else None
