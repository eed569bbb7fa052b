r"""A trained model as one file that jax and numpy can run, without mtjax or flax.

    mtjax.export(model, params, path="depth.npz", example=batch, task="depth")

and wherever jax, numpy and flatbuffers are installed:

    import jax, jax.export, numpy as np
    arrays = dict(np.load("depth.npz"))
    program = jax.export.deserialize(bytearray(arrays.pop("program")))
    params = jax.device_put(arrays)
    outputs = program.call(params, batch)

The file is an uncompressed .npz: the serialised StableHLO program (some 100 kB) under 'program', and the parameters
that it reads under 'params/<path>'; no pickle. Parameters are arguments of the program and not constants in it, because
a program is compiled once for every batch size that it meets, and each of these would hold a copy: with 365 MB of
constants a CPU compiled for 7 to 14 seconds where arguments take 1 to 2, and 3 batch sizes took 4 GB instead of 0.7.

`program.in_avals` and `program.in_tree` say what it wants. The batch axis is symbolic: any number of rows. Inside of
`jax.jit(program.call)` it can be part of a larger program.

With a task, the file holds that task's parameters only: M3ViT and ModSquad are cut down to a model for it; of every
model, `mtjax.specialise` keeps what the program reads, row by row of arrays that are stacked over tasks.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from mtjax.nn.moe import Dispatch
from mtjax.sharding import to_host
from mtjax.specialise import specialise

PyTree = Any
BATCH = "b"  # the symbolic size of a batch


def export(
    model: nn.Module,
    params: PyTree,
    *,
    path: str | os.PathLike[str],
    example: PyTree,
    task: str | None = None,
    prepare: Callable[[PyTree], PyTree] | None = None,
    predict: Callable[[PyTree], PyTree] | None = None,
    shapes: Mapping[str, str] | None = None,
    rows: int | None = None,
    lanes: bool = False,
    usage: Mapping[str, Any] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> pathlib.Path:
    """Writes predict(model(prepare(batch))) and its parameters into one file; the module says how to load it.

    Experts: which tokens an expert gets is only known when the program runs, and sorting tokens into queues needs a
    known number of tokens. Where the batch size is symbolic every expert runs on every token (`all_experts`), which is
    what the model computes as long as it drops nothing, at E / K times the cost of the expert layers. With `rows` the
    model's own dispatch is kept.

    Args:
      model: `apply({'params': params}, batch, task=task) -> outputs`.
      params: its parameters, on any mesh.
      path: of the file; what was there is replaced when the new file is complete.
      example: a batch, as the file's user will give it; only its structure, dtypes and shapes count.
      task: the one task to compute; None: all.
      prepare: what happens to a batch before the model sees it, e.g. normalisation, or `Domain.batch`.
      predict: what happens to outputs, e.g. `functools.partial(mtjax.predictions, tasks)`: original units.
      shapes: name of an entry of the batch (or path 'a/b') -> its shape in the language of
        `jax.export.symbolic_shape`, where 'b' is the batch size. Every other entry is 'b, ...'. Use '...' for the shape
        that the example has, as for points that all functions share, or 'n, 2' for any number of points.
      rows: compute this many rows at a time, the last of them filled up with zeros, in a loop. It bounds memory, and is
        for models that need a known number of rows. Not for models whose rows read each other.
      lanes: whether params have a leading axis of seeds [L, ...], over which predictions are averaged: an ensemble. No
        surgery then; what the program does not read is left out as always.
      usage: with M3ViT and ModSquad, use of the experts as their extraction takes it: unused experts are left out.
      platforms: what the program is lowered for.

    Returns:
      The path.

    Raises:
      ValueError: a sentence; e.g. for a model that cannot be traced with a symbolic batch size.
      ImportError: without flatbuffers.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("Serialised programs need the package flatbuffers: pip install 'mtjax[export]'")
    params = to_host(params)
    if usage is not None and (task is None or lanes):
        raise ValueError(f"usage is of one task and one seed, got task={task!r} and lanes={lanes}")
    if task is not None and not lanes:
        model, params, task = _single_task(model, params, task, usage)
    specs, splits = _specs(example, shapes or {})
    symbolic = any(jax_export.is_symbolic_dim(size) for spec in jax.tree.leaves(specs) for size in spec.shape)
    model = _without_queues(model, known=rows is not None or not symbolic)
    options = {} if task is None else {"task": task}

    def of_seed(params, batch):
        outputs = model.apply({"params": params}, batch, **options)
        return outputs if predict is None else predict(outputs)

    def function(params, batch):
        batch = batch if prepare is None else prepare(batch)
        if not lanes:
            return of_seed(params, batch)
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(of_seed, in_axes=(0, None))(params, batch))

    if rows is not None:
        chunk = jax.tree.map(lambda spec, split: _resized(spec, rows) if split else spec, specs, splits)
    with _by_itself():
        with _explained(function, params, example, rows):
            values, program = specialise(function, params, specs if rows is None else chunk)
        stored, read = _storable(values)

        def run(params, batch):
            values = read(params)
            if rows is None:
                return program(values, batch)
            return _by_rows(lambda batch: program(values, batch), batch, splits, rows)

        arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
        exported = jax_export.export(jax.jit(run), platforms=tuple(platforms))(arguments, specs)
    return _write(pathlib.Path(path), {**stored, "program": np.frombuffer(exported.serialize(), np.uint8)})


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> pathlib.Path:
    """An .npz whose name appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _single_task(
    model: nn.Module, params: PyTree, task: str, usage: Mapping[str, Any] | None
) -> tuple[nn.Module, PyTree, str | None]:
    """The model cut down to a task where there is surgery for it, and the task that is left to ask for."""
    from mtjax.models.m3vit import M3ViT
    from mtjax.models.m3vit_inference import extract_task
    from mtjax.models.mod_squad import ModSquad
    from mtjax.models.mod_squad_surgery import extract

    if isinstance(model, M3ViT):
        return *extract_task(model, params, task, usage=usage), None
    if isinstance(model, ModSquad):
        everything = {layer.name: np.ones((len(model.heads), layer.num_experts)) for layer in model.config.layers}
        options = {"threshold": 0.0} if usage is None else {}
        return *extract(model, params, task, everything if usage is None else usage, **options), None
    if usage is not None:
        raise ValueError(
            f"usage is for M3ViT and ModSquad, from which experts can be removed, got {type(model).__name__}"
        )
    return model, params, task


def _specs(example: PyTree, shapes: Mapping[str, str]) -> tuple[PyTree, PyTree]:
    """Shapes of a batch, and for each of its arrays whether the first axis is the batch.

    Raises:
      ValueError: if a name in `shapes` is not in the batch, or batch axes differ in size.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(example)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    given = {}
    for key, shape in shapes.items():
        found = [name for name in names if name == key or name.startswith(f"{key}/")]
        if not found:
            raise ValueError(f"shapes names '{key}', which is not in the example: {', '.join(names)}")
        given |= dict.fromkeys(found, shape)
    default = [f"{BATCH}, ..." if np.ndim(leaf) else "..." for _, leaf in paths]
    texts = [given.get(name, text) for name, text in zip(names, default, strict=True)]
    splits = [text.split(",")[0].strip("() ") == BATCH for text in texts]
    sizes = {name: len(leaf) for name, split, (_, leaf) in zip(names, splits, paths, strict=True) if split}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"The first axes in the example differ, and should all be the batch: {found}. What has no batch axis is "
            "named in shapes, e.g. shapes={'points': '...'}"
        )
    specs = jax_export.symbolic_args_specs(example, jax.tree.unflatten(tree, texts))
    return specs, jax.tree.unflatten(tree, splits)


def _resized(spec: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype)


def _without_queues(module: Any, known: bool) -> Any:
    """A model, or its configuration, that works at any batch size, or with `known` sizes on any platform."""
    changes = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name == "chunk_rows":  # `rows` is the way to have chunks in a file
            changes[field.name] = None
        elif field.name == "dispatch":
            value = Dispatch(value) if isinstance(value, str) else value
            if not known:
                value = Dispatch("all_experts")
            elif value.backend == "auto":  # would depend on the platform that exports
                value = dataclasses.replace(value, backend="capacity_overflow")
            elif value.backend == "ragged":
                value = dataclasses.replace(value, kernel="lax")
            changes[field.name] = value
        elif field.name != "parent" and dataclasses.is_dataclass(value) and not isinstance(value, type):
            adapted = _without_queues(value, known)
            if adapted is not value:
                changes[field.name] = adapted
    if not changes:
        return module
    return module.clone(**changes) if isinstance(module, nn.Module) else dataclasses.replace(module, **changes)


@contextlib.contextmanager
def _explained(function: Callable, params: PyTree, example: PyTree, rows: int | None):
    """Says of a failure to trace whether the symbolic batch size is the reason."""
    try:
        yield
    except Exception as error:
        if rows is not None:
            raise
        jax.eval_shape(function, params, example)  # what fails here is no matter of symbolic sizes
        raise ValueError(
            "The model cannot be traced for a batch of any size; give a number of rows that are computed at a time, "
            "e.g. rows=64, or, if rows read each other, fix the size of the batch: shapes={'numeric': '...', ...}. The "
            f"reason: {error}"
        ) from error


@contextlib.contextmanager
def _by_itself():
    """Off the mesh of the script, and without source lines: a program does not say where its author's files are."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
            yield
    finally:
        jax.config.update(option, before)


def _storable(values: Mapping[str, jax.Array]) -> tuple[dict[str, np.ndarray], Callable]:
    """Arrays of dtypes that numpy knows itself, and the function back: the bits of bfloat16 are kept as uint16."""
    host = {f"params/{name}": np.asarray(value) for name, value in values.items()}
    foreign = {name: value.dtype for name, value in host.items() if value.dtype.isbuiltin != 1}
    stored = {n: value.view(f"u{value.dtype.itemsize}") if n in foreign else value for n, value in host.items()}

    def read(stored):
        cast = {name: jax.lax.bitcast_convert_type(stored[name], dtype) for name, dtype in foreign.items()}
        return {name.removeprefix("params/"): value for name, value in {**stored, **cast}.items()}

    return stored, read


def _by_rows(run: Callable[[PyTree], PyTree], batch: PyTree, splits: PyTree, rows: int) -> PyTree:
    """`run` on some rows at a time; batch: leaves where `splits` is True are [B, ...], others are given to all."""
    leaves, tree = jax.tree.flatten(batch)
    is_split = jax.tree.leaves(splits)
    size = next((leaf.shape[0] for leaf, split in zip(leaves, is_split, strict=True) if split), None)
    if size is None:
        raise ValueError(f"rows={rows} needs a batch axis, and shapes leaves none in the batch")
    chunks = -(-size // rows)

    def to_chunks(leaf):
        padded = jnp.pad(leaf, ((0, chunks * rows - size), *[(0, 0)] * (leaf.ndim - 1)))
        return padded.reshape(chunks, rows, *leaf.shape[1:])

    def of_chunk(parts):
        parts = iter(parts)
        return run(tree.unflatten([next(parts) if s else leaf for leaf, s in zip(leaves, is_split, strict=True)]))

    outputs = jax.lax.map(of_chunk, [to_chunks(leaf) for leaf, s in zip(leaves, is_split, strict=True) if s])
    if wrong := [leaf.shape[1:] for leaf in jax.tree.leaves(outputs) if leaf.shape[1:2] != (rows,)]:
        raise ValueError(f"rows={rows} needs outputs with a batch axis first, got shapes {wrong} for {rows} rows")
    return jax.tree.map(lambda leaf: leaf.reshape(chunks * rows, *leaf.shape[2:])[:size], outputs)
