"""The models and steps of `scaling.py`: problems whose columns take no memory, for any number of devices.

    MoE ViT     M3ViT-S of the paper: 12 blocks of width 384, 16 experts of which 4 per token, images of 480 x 640, four
                tasks with their decoders; experts in slots of a static size (capacity factor 1.25)
    MultiTab    MultiTab-Net of the paper on HIGGS: 8 tasks, 21 columns, width 16
    K tasks     ViT-S with one small head per task, images of 224 x 224

Letters: K tasks, B rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtjax
from mtjax import dense_tasks
from mtjax.models.m3vit import M3VIT_S, M3ViT, M3ViTConfig, m3vit_balance
from mtjax.models.multitab import MultiTabNet
from mtjax.models.multitask_vit import MultitaskViT
from mtjax.nn.decoders import PUP, ConvHead
from mtjax.nn.moe import Dispatch
from mtjax.nn.vit import VIT_S, ViTConfig
from mtjax.train import Problem, TrainConfig
from mtjax.train.images import image_loss, normalise_image
from mtjax.train.step import supervised_loss

PyTree = Any
TINY_VIT = ViTConfig(patch=4, width=16, depth=1, num_heads=2)
# Blocks as a loop, recomputed on the way back: else the activations of four task streams fill 13 GiB for an image.
TRUNK = dataclasses.replace(M3VIT_S.vit, scan=True, remat="full")
MOE = dataclasses.replace(M3VIT_S, vit=TRUNK, dispatch=Dispatch("sort_capacity", capacity_factor=1.25))
DENSE = dataclasses.replace(VIT_S, scan=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is compiled.

    Attributes:
      devices: of the weak scaling.
      several: those of them on which a method on per-task gradients is compiled, too.
      fixed: devices on which K grows.
      tasks: the K.
      split: the K of which parameters and rows of the Jacobian are split over 8 devices, too.
      moe, image, decoder: trunk, image size and decoder width of the MoE ViT.
      images: per device.
      vit, small_image, small_images: of the K tasks.
      width, ff_width, rows: of MultiTab, rows per device.
    """

    devices: tuple[int, ...] = (8, 64, 256, 1024, 4096)
    several: tuple[int, ...] = (8, 256, 4096)
    fixed: int = 64
    tasks: tuple[int, ...] = (1, 2, 4, 8, 16)
    split: int = 4
    moe: M3ViTConfig = MOE
    image: tuple[int, int] = (480, 640)
    decoder: int = 256
    images: int = 1
    vit: ViTConfig = DENSE
    small_images: int = 4
    small_image: tuple[int, int] = (224, 224)
    width: int = 16
    ff_width: int = 256
    rows: int = 2048


DEMO = Sizes()
SMOKE = Sizes(
    devices=(8,),
    several=(8,),
    fixed=8,
    tasks=(2,),
    split=2,
    moe=M3ViTConfig(TINY_VIT, experts=8, top_k=2, expert_ratio=2.0, every=1, dispatch="sort_capacity"),
    image=(16, 16),
    decoder=8,
    vit=TINY_VIT,
    small_image=(16, 16),
    width=8,
    ff_width=16,
    rows=16,
)
PRESETS = {"demo": DEMO, "smoke": SMOKE}


class Case(NamedTuple):
    """A step to compile.

    Attributes:
      model: of the table.
      route: how its losses become an update.
      problem: what is trained.
      method: of `mtjax.optim`.
      config: of the loop.
      mesh: specification.
      num_tasks: K.
    """

    model: str
    route: str
    problem: Problem
    method: Any
    config: TrainConfig
    mesh: str
    num_tasks: int


def optimizer(rate: jax.Array) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=1e-4)


def trunk(path: str) -> bool:
    """Whether a parameter is shared: all but the heads."""
    return not path.startswith("head")


# How losses become an update. Methods see shared parameters; the heads follow their own tasks.
ROUTES: Mapping[str, Callable[[], Any]] = {
    "losses only": lambda: mtjax.optim.linear("sum"),
    "Gramian first": lambda: mtjax.optim.on_shared(mtjax.optim.mgda(), trunk),
    "Gramian by columns": lambda: mtjax.optim.on_shared(mtjax.optim.mgda(), trunk),
    "Jacobian": lambda: mtjax.optim.on_shared(mtjax.optim.graddrop(), trunk),
}
WEAK = ("losses only", "Gramian first")


def zeros(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Rows of zeros that take the memory of one number."""
    return np.broadcast_to(np.zeros((), dtype), (rows, *shape))


def image_columns(tasks: tuple, rows: int, size: tuple[int, int]) -> dict[str, Any]:
    kinds = {"depth": ((), np.float16), "normals": ((3,), np.float16)}
    labels = {}
    for task in tasks:
        more, dtype = kinds.get(task.kind, ((), np.uint8))
        labels[task.name] = zeros(rows, (*size, *more), dtype)
    return {"image": zeros(rows, (*size, 3), np.uint8), "labels": labels}


def image_model(model: Any, tasks: tuple, rows: int, size: tuple[int, int], regularizer: Any = None) -> Problem:
    def init_params(key):
        batch = {"image": normalise_image(jnp.zeros((2, *size, 3), jnp.uint8))}
        return model.init({"params": key, "dropout": key, "gate": key}, batch, train=True)["params"]

    columns = image_columns(tasks, rows, size)
    loss_fn = image_loss(model, tasks, regularizer=regularizer)
    return Problem(tasks, columns, columns, loss_fn, init_params, evaluator=None)


def moe_vit(sizes: Sizes, devices: int, route: str) -> Case:
    """Experts over an axis of at most 8 devices, those of a node; images over all."""
    tasks = (dense_tasks.segmentation(num_classes=40), dense_tasks.depth(), dense_tasks.normals(), dense_tasks.edge())
    heads, rows = {task.name: task.channels for task in tasks}, sizes.images * devices
    model = M3ViT(heads, sizes.moe, functools.partial(PUP, width=sizes.decoder, groups=8))
    problem = image_model(model, tasks, rows, sizes.image, m3vit_balance(0.01))
    experts = min(8, devices, sizes.moe.num_experts(0))
    mesh = f"data={devices // experts},expert={experts}"
    return Case("MoE ViT", route, problem, ROUTES[route](), TrainConfig(batch_size=rows), mesh, len(tasks))


def multitab(sizes: Sizes, devices: int, route: str) -> Case:
    tasks = (mtjax.Task("label", "binary"), *(mtjax.Task(f"mass_{k}", "regression") for k in range(7)))
    model = MultiTabNet(
        mtjax.head_sizes(tasks), (4, 4, 4, 4), 17, width=sizes.width, ff_width=sizes.ff_width, chunk_rows=None
    )
    rows = sizes.rows * devices
    columns = {
        "categorical": zeros(rows, (4,), np.int32),
        "numeric": zeros(rows, (17,), np.float32),
        "labels": {task.name: zeros(rows, (), np.float32) for task in tasks},
    }

    def init_params(key):
        example = jax.tree.map(lambda column: jnp.zeros((8, *column.shape[1:]), column.dtype), columns)
        return model.init({"params": key, "dropout": key}, example, train=True)["params"]

    problem = Problem(tasks, columns, columns, supervised_loss(model, tasks), init_params, evaluator=None)
    config = TrainConfig(batch_size=rows)
    return Case("MultiTab", route, problem, ROUTES[route](), config, f"data={devices}", len(tasks))


def many_tasks(sizes: Sizes, devices: int, route: str, num_tasks: int, fsdp: int = 1) -> Case:
    """With `fsdp` parameters, optimiser state and rows of the Jacobian are split over so many devices."""
    tasks = tuple(dense_tasks.segmentation(f"task_{k}", 21) for k in range(num_tasks))
    rows = sizes.small_images * devices
    model = MultitaskViT({task.name: task.channels for task in tasks}, sizes.vit, ConvHead)
    problem = image_model(model, tasks, rows, sizes.small_image)
    config = TrainConfig(batch_size=rows, chunk_size=1 if route == "Gramian by columns" else None)
    mesh = f"data={devices}" if fsdp == 1 else f"data={devices // fsdp},fsdp={fsdp}"
    return Case("K tasks", route, problem, ROUTES[route](), config, mesh, num_tasks)
