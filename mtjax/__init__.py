"""mtjax: multitask learning in JAX and Flax.

Five plain things, in this order: a batch goes through a model, its outputs through the tasks' losses, the losses
through per-task gradients, those through a multi-objective transform, and its direction through optax.

    losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, batch)
    updates, state = optax.chain(mtjax.optim.pcgrad(), optax.adamw(1e-3)).update(jacobian, state, params)

Rooms: `tasks`, `dense_tasks`, `losses`, `metrics`, `delta`, `gradients`, `optim`, `nn`, `models`, `physics`, `data`,
`train`, `plots`. `sharding` says where numbers live on a mesh, `distributed` and `launch` start several processes,
`export` writes a trained model to a file that runs without mtjax.
"""

from mtjax import _compat

_compat.check_jaxlib()

from mtjax import dense_tasks, losses, metrics, optim, sharding
from mtjax.delta import DeltaM, delta_m, delta_table
from mtjax.export_file import export
from mtjax.gradients import (
    Conflict,
    combine,
    conflict,
    directional_derivatives,
    gramian,
    value_and_disjoint_jacobian,
    value_and_jacobian,
)
from mtjax.optim.representation import Staged
from mtjax.optim.routes import value_and_update, value_and_weighted_grad
from mtjax.tasks import Task, head_sizes, predictions, task_losses

__version__ = "0.1.0"

__all__ = [
    "Conflict",
    "DeltaM",
    "Staged",
    "Task",
    "combine",
    "conflict",
    "dense_tasks",
    "delta_m",
    "delta_table",
    "directional_derivatives",
    "export",
    "gramian",
    "head_sizes",
    "losses",
    "metrics",
    "optim",
    "predictions",
    "sharding",
    "task_losses",
    "value_and_disjoint_jacobian",
    "value_and_jacobian",
    "value_and_update",
    "value_and_weighted_grad",
]
