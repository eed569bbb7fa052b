r"""Heterogeneous training: every task has a data set of its own, no image is shared, and an update is one for all.

    task per device:  sum_t L_t(batch of task t)       T streams in one program are T devices with one task each
    task per step:    L_t(batch of task t),  t drawn with fixed shares, or taken in turn

Data: {task name: {'image': [n, H, W, 3], 'label': [n, ...]}}, images of one size. A batch holds as many rows of every
task; smaller sets are repeated. Gradients of the tasks are summed by default; `mtjax.optim.linear('mean')` averages
them over the "devices".

What ties experts to tasks is a *regularizer* on the statistics of the gates. Mutual information needs the joint of
tasks and experts over all tasks; where a step sees one task it is kept as a running estimate, carried from step to
step. The expert use of every task (a moving average) is carried in the same way: `fit.state.carry['usage']`.

Task losses are weighed by learned uncertainty as in Mod-Squad, with r_t = log s_t among the parameters ('log_scales'):

    sum_t 1/2 e^{-2 r_t} L_t + log(1 + e^{2 r_t}),     r_t = 0 at the start

`mtjax.optim.uncertainty` has another second term (log s_t), and as a method it sees a loss of 0 for the tasks that a
step leaves out, which it would take for solved; in the loss, their r_t simply gets no gradient. Weight decay on r draws
a weight to that of the start.

Cost of a task per step. The drawn task's gates and vector are gathered, so the trunk runs once whatever the number of
tasks. Heads differ in kind, so they are branches of a `lax.switch`; under vmap over seeds, as in `fit_problem`, all of
them are computed and one is selected: T heads per step, one trunk.

References: Chen et al., "Mod-Squad", CVPR 2023; Chen et al., "An Efficient General-Purpose Modular Vision Model via
Multi-Task Heterogeneous Training", 2023 (no code: shares, decay of the joint and schedule are this project's).

Letters: T tasks, B images of a task, E experts, L lanes, n rows.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from mtjax.dense_tasks import DenseTask
from mtjax.models.mod_squad import ModSquad, ModSquadTrunk
from mtjax.nn import balance
from mtjax.nn.expert_load import expert_load, update_load, use_percent
from mtjax.train.evaluate import Results, merge_statistics, num_rows, padded_batches
from mtjax.train.images import Augment, normalise_image
from mtjax.train.problem import Evaluator, Problem

PyTree = Any
Mode = Literal["task_per_device", "task_per_step"]
Splits = Mapping[str, Mapping[str, Any]]
Stats = Mapping[str, balance.RouterStats]


class Regularizer(NamedTuple):
    """A penalty on the gates, with what it carries from step to step.

    Attributes:
      init: `({layer name: E}, T) -> state`.
      penalty: `(stats, tasks i32[t], state) -> (f[t], state)`, one number per stream, added to its task's loss.
    """

    init: Callable[[Mapping[str, int], int], PyTree]
    penalty: Callable[[Stats, jax.Array, PyTree], tuple[jax.Array, PyTree]]


def mutual_information(weight: float = 5e-3, *, decay: float = 0.99, running: bool = False) -> Regularizer:
    """-I(T; E) of every layer, summed: each task few experts, each expert some task. The streams share it equally.

    Args:
      weight: 5e-3 for layout 'twice', 5e-4 for experts in the attention only (Mod-Squad's code).
      decay: of the running joint.
      running: use the running joint even where the batch holds all tasks. Otherwise it is the batch's (Mod-Squad).
    """

    def init(experts, num_tasks):
        return {name: balance.running_joint(num_tasks, count) for name, count in experts.items()}

    def penalty(stats, tasks, state):
        total, new = jnp.zeros(()), {}
        for name, layer in stats.items():
            whole = len(layer.probability) == len(state[name].rows) and not running
            loss, joint = balance.mutual_information_loss(layer, tasks, None if whole else state[name], decay=decay)
            total, new[name] = total + loss, joint
        return jnp.broadcast_to(weight * total / len(tasks), (len(tasks),)), new

    return Regularizer(init, penalty)


def balanced(weight: float = 1e-2) -> Regularizer:
    """CV^2 of importance and of load, per gate and layer: every task uses every expert. M3ViT's, the arm to compare."""

    def penalty(stats, tasks, state):
        losses = [balance.importance_loss(layer) + balance.load_loss(layer) for layer in stats.values()]
        return weight * sum(losses, jnp.zeros(len(tasks))), state

    return Regularizer(lambda experts, num_tasks: (), penalty)


def image_regularizer(regularizer: Regularizer) -> Callable:
    """The regularizer of `image_problem`, for tasks that share their images: nothing is carried."""

    def of_images(stats, tasks):
        experts = {name: layer.count.shape[-1] for name, layer in stats.items()}
        state = regularizer.init(experts, len(tasks))
        extra, _ = regularizer.penalty(stats, jnp.arange(len(tasks)), state)
        return {task.name: extra[k] for k, task in enumerate(tasks)}

    return of_images


def uncertainty_weighted(losses: Mapping[str, jax.Array], log_scales: jax.Array) -> dict[str, jax.Array]:
    """1/2 e^{-2 r_t} L_t + log(1 + e^{2 r_t}), Mod-Squad's form with s = e^r.

    Args:
      losses: name -> f[].
      log_scales: r, f[T], in the order of the losses.

    >>> float(uncertainty_weighted({"a": jnp.array(2.0)}, jnp.zeros(1))["a"]) == 1.0 + float(jnp.log(2.0))
    True
    """
    rows = dict(zip(losses, log_scales, strict=True))
    return {
        name: 0.5 * jnp.exp(-2 * rows[name]) * loss + jax.nn.softplus(2 * rows[name]) for name, loss in losses.items()
    }


def heterogeneous_problem(
    model: ModSquad,
    tasks: Sequence[DenseTask],
    data: Mapping[str, Splits],
    *,
    regularizer: Regularizer | None = None,
    mode: Mode = "task_per_device",
    shares: Mapping[str, float] | None = None,
    uncertainty: bool = True,
    augment: Augment | None = None,
    usage_decay: float = 0.95,
    eval_batch_size: int = 128,
) -> Problem:
    """What `fit_problem` trains: a modular model on one data set per task.

    Args:
      model: its heads name the tasks.
      tasks: those to train, some or all of the model's.
      data: {'train': {task name: {'image', 'label'}}, 'validation': the same}.
      regularizer: of the gates, such as `mutual_information()`; None: none.
      mode: 'task_per_device', every step sees a batch of every task; 'task_per_step', of one task.
      shares: with 'task_per_step', how often each task is drawn (they are normalised); None: in turn.
      uncertainty: learned uncertainty weights on top of the tasks' own; else the tasks' own only.
      augment: random changes of the training images, as in `image_problem`.
      usage_decay: of the moving average of expert use.
      eval_batch_size: images per dispatch at evaluation.

    Returns:
      The problem. `carry` is {'step', 'regularizer', 'usage': {layer: moving average of expert use}}.

    Raises:
      ValueError: if data, tasks, model and mode do not fit each other.
    """
    tasks = tuple(tasks)
    names = [task.name for task in tasks]
    indices = model.indices(names)
    _check(model, tasks, data, mode, shares)
    train = _same_length({name: data["train"][name] for name in names})
    experts = {layer.name: layer.num_experts for layer in model.config.layers}
    if mode == "task_per_device":
        step = functools.partial(_device_losses, model, tasks)
    else:
        odds = None if shares is None else np.log([shares[name] for name in names])
        step = functools.partial(_drawn_losses, model, tasks, indices, odds)

    def loss_fn(params, batch, rng):
        carry, (key_augment, rng) = batch["carry"], jax.random.split(rng)
        rows = _prepared(tasks, batch, augment, key_augment)
        losses, present, positions, stats = step(params, rows, carry["step"], rng)
        new = {**carry, "step": carry["step"] + 1}
        if uncertainty:
            losses = uncertainty_weighted(losses, params["log_scales"])
        losses = {name: jnp.where(present[k], losses[name], 0.0) for k, name in enumerate(names)}
        if regularizer is not None:
            extra, new["regularizer"] = regularizer.penalty(stats, positions, carry["regularizer"])
            added = jnp.zeros(len(tasks)).at[positions].add(extra)
            losses = {name: losses[name] + added[k] for k, name in enumerate(names)}
        new["usage"] = {
            layer: update_load(carry["usage"][layer], stats[layer], positions, decay=usage_decay) for layer in stats
        }
        return losses, jax.lax.stop_gradient(new)

    def init_params(key):
        image = normalise_image(data["train"][names[0]]["image"][:1])
        params = model.init(key, {"image": image})["params"]
        return {**params, "log_scales": jnp.zeros(len(tasks))} if uncertainty else params

    def init_carry():
        return {
            "step": jnp.zeros((), jnp.int32),
            "regularizer": () if regularizer is None else regularizer.init(experts, len(tasks)),
            "usage": {name: expert_load(len(tasks), count) for name, count in experts.items()},
        }

    @functools.cache  # one program, however often it is asked for
    def evaluator(per_task: bool) -> Evaluator:
        return make_heterogeneous_evaluate(model, tasks, batch_size=eval_batch_size, per_task=per_task)

    return Problem(tasks, train, data["validation"], loss_fn, init_params, evaluator, init_carry=init_carry)


def _prepared(tasks, batch, augment, rng):
    """{task name: {'image' f32, 'label'}}, augmented."""
    rows = {}
    for task, key in zip(tasks, jax.random.split(rng, len(tasks)), strict=True):
        image, label = normalise_image(batch[task.name]["image"]), batch[task.name]["label"]
        if augment is not None:
            changed = augment(key, {"image": image, "labels": {task.name: label}}, (task,))
            image, label = changed["image"], changed["labels"][task.name]
        rows[task.name] = {"image": image, "label": label}
    return rows


def _device_losses(model, tasks, params, batch, step, rng):
    """Losses of all tasks, each on its own images: one stream per task."""
    del step
    names = [task.name for task in tasks]
    options = {"task": names, "train": True, "with_aux": True, "rngs": _rngs(rng)}
    outputs, stats = model.apply({"params": params}, batch, **options)
    losses = {task.name: task.weight * task.loss(outputs[task.name], batch[task.name]["label"]) for task in tasks}
    return losses, jnp.ones(len(tasks), bool), jnp.arange(len(tasks)), stats


def _drawn_losses(model, tasks, indices, odds, params, batch, step, rng):
    """Losses of which one is a drawn task's and the others are the same number, to be left out."""
    key, rng = jax.random.split(rng)
    drawn = jnp.mod(step, len(tasks)) if odds is None else jax.random.categorical(key, jnp.asarray(odds))
    images = jnp.stack([batch[task.name]["image"] for task in tasks])[drawn]
    trunk = ModSquadTrunk(model.config, 1)
    own = one_gate(params["trunk"], jnp.asarray(indices)[drawn])
    tokens, stats = trunk.apply({"params": own}, images[None], tasks=(0,), train=True, rngs=_rngs(rng))

    def of_task(task: DenseTask) -> Callable[[jax.Array], jax.Array]:
        head = model.head(task.name, name=None, parent=None)

        def loss(tokens):
            output = head.apply({"params": params[f"head_{task.name}"]}, tokens, images.shape[1:3])
            return task.weight * task.loss(output, batch[task.name]["label"])

        return loss

    loss = jax.lax.switch(drawn, [of_task(task) for task in tasks], tokens[0])
    return {task.name: loss for task in tasks}, jnp.arange(len(tasks)) == drawn, drawn[None], stats


def one_gate(trunk: PyTree, task: jax.Array) -> PyTree:
    """A trunk's parameters as those of a trunk with one task: its vector and its gates; `task` may be traced.

    Experts and everything else are shared by all tasks and stay as they are.
    """

    def take(path, leaf):
        keys = [entry.key for entry in path]
        return leaf[task][None] if "router" in keys or keys[-1] == "task_vectors" else leaf

    return jax.tree_util.tree_map_with_path(take, trunk)


def _rngs(rng: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(("dropout", "gate"), jax.random.split(rng), strict=True))


def _same_length(splits: Splits) -> dict[str, Any]:
    """The splits with as many rows as the largest has: smaller ones are repeated in order."""
    most = max(num_rows(split) for split in splits.values())
    rows = {name: np.arange(most) % num_rows(split) for name, split in splits.items()}
    return {
        name: dict(split) if num_rows(split) == most else jax.tree.map(lambda c: np.asarray(c)[rows[name]], dict(split))  # noqa: B023
        for name, split in splits.items()
    }


def make_heterogeneous_evaluate(
    model: ModSquad, tasks: Sequence[DenseTask], *, batch_size: int = 128, per_task: bool = False
) -> Evaluator:
    """Builds the evaluation of stacked parameters, every task on its own images, with its own program.

    Args:
      model: the modular model.
      tasks: what is measured.
      batch_size: images per dispatch.
      per_task: parameters have leading axes [L, K]: task k is evaluated with the k-th set.

    Returns:
      `(params, {task name: {'image', 'label'}}) -> {task: {metric: f64[L]}}`.
    """

    def measure(k, task, params, rows):
        own = jax.tree.map(lambda leaf: leaf[k], params) if per_task else params
        output = model.apply({"params": own}, {"image": normalise_image(rows["image"])}, task=task.name)[task.name]
        prediction = task.predict(output)
        return {metric.name: metric.statistic(prediction, rows["label"], rows["weight"]) for metric in task.metrics}

    runs = [jax.jit(jax.vmap(functools.partial(measure, k, task), in_axes=(0, None))) for k, task in enumerate(tasks)]

    def evaluate(params: PyTree, split: Splits) -> Results:
        results = {}
        for task, run in zip(tasks, runs, strict=True):
            batches = padded_batches(split[task.name], batch_size)
            results |= merge_statistics((task,), ({task.name: run(params, rows)} for rows, _ in batches))
        return results

    return evaluate


def _check(model, tasks, data, mode, shares) -> None:
    names = [task.name for task in tasks]
    if mode not in ("task_per_device", "task_per_step"):
        raise ValueError(f"mode must be 'task_per_device' or 'task_per_step', got {mode!r}")
    for task in tasks:
        if model.heads[task.name] != task.channels:
            raise ValueError(
                f"Task '{task.name}' has {task.channels} channels, but the model's head has {model.heads[task.name]}"
            )
    sizes = set()
    for part in ("train", "validation"):
        for task in tasks:
            split = data[part].get(task.name, {})
            if {"image", "label"} - set(split):
                raise ValueError(f"{part} needs {{'image', 'label'}} of task '{task.name}', got {sorted(split)}")
            size = np.shape(split["image"])[1:]
            task.check_labels(split["label"], size[:2])
            sizes.add(size)
    if len(sizes) > 1:
        raise ValueError(f"All tasks need images of one size, got {sorted(sizes)}")
    if shares is not None and (mode != "task_per_step" or set(shares) != set(names) or min(shares.values()) <= 0):
        raise ValueError(f"shares go with mode='task_per_step' and give every task a number > 0, got {dict(shares)}")
    if mode == "task_per_step" and model.config.reach is not None:
        raise ValueError("mode='task_per_step' needs gates of one reach: train a grown model's new task on its own")


def expert_usage(
    model: ModSquad, params: PyTree, data: Mapping[str, Any], *, batch_size: int = 128
) -> dict[str, np.ndarray]:
    """How often each task's tokens choose each expert, counted on some images.

    Args:
      model, params: a modular model.
      data: {'image': [n, H, W, 3]} for all tasks, or {task name: {'image': ...}} for the tasks it names.
      batch_size: images per dispatch.

    Returns:
      {layer name: f64[T, E]}, shares of the top-K choices, rows sum to 1; T in the order of the model's tasks, NaN for
      a task without images.
    """
    names = tuple(model.heads)
    sets = {names: data} if "image" in data else {(name,): data[name] for name in names if name in data}
    counts = {layer.name: np.full((len(names), layer.num_experts), np.nan) for layer in model.config.layers}
    frozen = {key: FrozenDict(of) for key in ("heads", "decoder") if isinstance(of := getattr(model, key), Mapping)}
    own = {key: tree for key, tree in params.items() if key != "log_scales"}
    for asked, split in sets.items():
        rows, images = list(model.indices(asked)), split["image"]
        for start in range(0, len(images), batch_size):
            found = _counts(model.clone(**frozen), asked, own, images[start : start + batch_size])
            for name, count in found.items():
                counts[name][rows] = np.nan_to_num(counts[name][rows]) + np.asarray(count, np.float64)
    return {name: count / count.sum(-1, keepdims=True) for name, count in counts.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _counts(model: ModSquad, asked: tuple[str, ...], params: PyTree, images: Any) -> dict[str, jax.Array]:
    """{layer: f[T, E]}. Apart, with a model that has a hash: the seeds of a run share this program."""
    stats = model.apply({"params": params}, {"image": normalise_image(images)}, task=asked, with_aux=True)[1]
    return {name: layer.count for name, layer in stats.items()}


def usage_of(carry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`expert_usage` from what training carries, for one lane: shares of the moving averages, f64[T, E] per layer."""
    return {name: np.asarray(use_percent(load.count), np.float64) / 100 for name, load in carry["usage"].items()}
