r"""The mixture-of-experts layer of a transformer that serves several tasks: a router and E two-layer experts.

    y[t, n] = sum_k g[t, n, k] f_{e(t, n, k)}(x[t, n])          g, e from the router, given the token and its task t

Tokens of all task streams are routed and dispatched together: capacity is then shared between tasks, and a task that
uses two experts only does not overflow them alone. While all streams are still equal (one stream comes in) and the gate
knows nothing of the task, one stream goes out.

On a mesh (`mtjax.sharding`) every device dispatches the tokens of its own images; with an axis 'expert' they travel to
the experts' devices (`mtjax.nn.moe_parallel`, which says what a dispatch without a capacity costs then). A capacity is
per device; where nothing is dropped, numbers are those of one device. Statistics are of all tokens of the batch. A
batch that the devices do not divide is left to the compiler, with the same numbers.

Letters: T task streams, B images, N tokens of an image, D width, H hidden width, E experts, K experts per token.

Reference: Liang et al., "M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with
Model-Accelerator Co-design", NeurIPS 2022. A token costs what a dense MLP of hidden width K H costs.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.balance import RouterStats, router_stats
from mtjax.nn.moe import Dispatch, gelu, moe_apply
from mtjax.nn.moe_parallel import dispatch_mesh, moe_apply_parallel
from mtjax.nn.routers import Router, RouterConfig
from mtjax.sharding import BATCH_AXES

Initializer = nn.initializers.Initializer


class MoEMlp(nn.Module):
    """Router and experts.

    Parameters: 'router' (of `Router`), 'kernel_in' f32[E, D, H], 'bias_in' f32[E, H], 'kernel_out' f32[E, H, D],
    'bias_out' f32[E, D]. Experts are initialised independently.

    Attributes:
      router: how tokens choose experts; its `num_experts` is E.
      hidden: H, of one expert.
      num_tasks: tasks that exist.
      dispatch: how tokens reach their experts.
      activation: of the experts.
      kernel_init: of both kernels, expert by expert.
    """

    router: RouterConfig
    hidden: int
    num_tasks: int
    dispatch: Dispatch | str = "auto"
    activation: Callable[[jax.Array], jax.Array] = gelu
    kernel_init: Initializer = nn.initializers.xavier_uniform(batch_axis=(0,))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, tasks: Sequence[int], train: bool = False, gate_x: jax.Array | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """Routes and computes.

        Args:
          x: f[T, B, N, D] with T = len(tasks), or f[1, B, N, D] while all streams are still equal.
          tasks: static; the task of each stream.
          train: whether the router adds its noise (rng 'gate').
          gate_x: what the router reads instead of x, of the same shape.

        Returns:
          y f[T, B, N, D] (of one stream if x has one and the router is 'single'), and the router's statistics.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be [T, B, N, D], got shape {x.shape}")
        width, num_experts = x.shape[-1], self.router.num_experts
        zeros = nn.initializers.zeros_init()
        params = {
            "kernel_in": self.param("kernel_in", self.kernel_init, (num_experts, width, self.hidden)),
            "bias_in": self.param("bias_in", zeros, (num_experts, self.hidden)),
            "kernel_out": self.param("kernel_out", self.kernel_init, (num_experts, self.hidden, width)),
            "bias_out": self.param("bias_out", zeros, (num_experts, width)),
        }
        tokens = x.reshape(x.shape[0], -1, width)
        gate_tokens = tokens if gate_x is None else gate_x.reshape(tokens.shape)
        routing = Router(self.router, self.num_tasks, name="router")(gate_tokens, tasks=tasks, train=train)
        streams, num_tokens, top_k = routing.ids.shape
        values, ids = routing.values, routing.ids
        mesh = dispatch_mesh(x.shape[1], num_experts)
        if mesh is not None:  # slicing what is split over devices would move it
            images = (streams, *x.shape[1:])
            out = moe_apply_parallel(
                jnp.broadcast_to(x, images),
                values.reshape(*images[:-1], top_k),
                ids.reshape(*images[:-1], top_k),
                {name: value.astype(x.dtype) for name, value in params.items()},
                mesh=mesh,
                token_axes=BATCH_AXES,
                fsdp_axis="fsdp",
                tensor_axis="tensor",
                dispatch=self.dispatch,
                activation=self.activation,
            )
        else:
            pool = self.router.pool_size(tasks)  # experts that only other tasks can address cost nothing
            out = moe_apply(
                jnp.broadcast_to(tokens, (streams, num_tokens, width)).reshape(-1, width),
                values.reshape(-1, top_k),
                ids.reshape(-1, top_k),
                {name: value[:pool].astype(x.dtype) for name, value in params.items()},
                dispatch=self.dispatch,
                activation=self.activation,
            )
        stats = router_stats(routing, out.kept.reshape(ids.shape))
        return out.y.reshape(streams, *x.shape[1:]), stats
