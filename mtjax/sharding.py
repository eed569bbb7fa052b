"""Meshes, and where the numbers of a training state live on them.

A mesh has four axes, of size 1 where none is asked for. What each of them splits:

    data     the batch
    fsdp     the batch, and with it parameters, optimiser state and per-task gradients (each device keeps a slice)
    expert   the batch, and the experts of a mixture (tokens travel by all-to-all)
    tensor   attention heads and the hidden width of MLPs

The mesh is ambient, by JAX's own `jax.set_mesh`: a script runs unchanged inside `jax.set_mesh(make_mesh("data=4"))`.

Which dimension of a parameter goes where is said in two steps, as in Flax's partitioning: the path of a parameter
gives logical names to its last dimensions (`NAMES`), and `RULES` maps a logical name to a mesh axis. Paths are matched
at their end, so that parameters, momenta, best parameters and Jacobians follow the same rule; leading dimensions that
a parameter does not have itself (lanes, layers of a scan, tasks of a Jacobian) stay whole.

>>> logical_axes("trunk/block_0/attention/qkv/kernel", (64, 3, 64))
('embed', None, 'heads')
>>> logical_axes("opt_state/0/mu/blocks/moe/kernel_in", (3, 12, 8, 64, 256))  # lanes, layers, then the parameter
(None, None, 'expert', 'embed', 'mlp')
"""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

PyTree = Any
P = jax.sharding.PartitionSpec
AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over whose product a batch is split."""

# Regular expressions for the end of a path, and the names of the last dimensions. The first that fits wins.
NAMES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/qkv/kernel", ("embed", None, "heads")),  # queries, keys and values
    (r"attention/qkv/bias", (None, "heads")),
    (r"attention/out/kernel", ("heads", "embed")),
    (r"feed_forward/in/kernel", ("embed", "mlp")),
    (r"feed_forward/in/bias", ("mlp",)),
    (r"feed_forward/out/kernel", ("mlp", "embed")),
    (r"kernel_in", ("expert", "embed", "mlp")),  # of a mixture-of-experts MLP
    (r"bias_in", ("expert", "mlp")),
    (r"kernel_out", ("expert", "mlp", "embed")),
    (r"bias_out", ("expert", None)),
    (r"experts/query_kernel", ("expert", "embed", None)),  # of a mixture of attention heads
    (r"experts/out_kernel", ("expert", None, "embed")),
    (r"experts/dense_\d+/kernel", ("expert", "embed", "mlp")),
    (r"experts/dense_\d+/bias", ("expert", "mlp")),
    (r"(bias|scale|step|count|score|stale)", (None,)),  # short vectors and counters
)
RULES: Mapping[str, str] = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "expert": "expert"}
MIN_SIZE = 1024
"""A parameter without names in `NAMES` is split over 'fsdp' if it has at least as many entries."""


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """Sizes of the four axes from 'data=4,expert=2'; one size may be -1: what is left.

    Raises:
      ValueError: for an unknown axis, a size that is no number, or sizes whose product is not the number of devices.

    >>> parse_mesh("data=-1,expert=2", 8)
    {'data': 4, 'fsdp': 1, 'expert': 2, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, size = part.partition("=")
        name = name.strip()
        if name not in AXES or name in sizes:
            what = "is given twice" if name in sizes else "is no axis"
            raise ValueError(f"The mesh {spec!r}: {name!r} {what}; axes are {', '.join(AXES)}, as in data=4,expert=2")
        try:
            sizes[name] = int(size) if equals else 0
        except ValueError:
            sizes[name] = 0
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(f"The mesh {spec!r}: {name} needs a size, a number >= 1 or -1 for what is left")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"The mesh {spec!r}: only one size can be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and num_devices % known == 0:
        sizes = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
    if -1 in sizes.values() or math.prod(sizes.values()) != num_devices:
        there = "there is 1 device" if num_devices == 1 else f"there are {num_devices} devices"
        multiple = " or a multiple" if -1 in sizes.values() else ""
        raise ValueError(f"The mesh {spec!r} has {known} devices{multiple}, but {there}")
    return {name: sizes.get(name, 1) for name in AXES}


def mesh_size(spec: str) -> int:
    """Number of devices of a mesh that is said in full.

    Raises:
      ValueError: as `parse_mesh`, or if a size is to be inferred.

    >>> mesh_size("data=32,expert=8")
    256
    """
    if "-1" in spec:
        raise ValueError(f"The mesh {spec!r} is to be described: give all its sizes, as in data=32,expert=8")
    known = math.prod(int(size) for size in re.findall(r"=\s*(\d+)", spec))
    return math.prod(parse_mesh(spec, known).values())


def make_mesh(spec: str = "data=-1", devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes `AXES` over the devices of all processes.

    Args:
      spec: sizes, see `parse_mesh`.
      devices: instead of all devices.

    Raises:
      ValueError: as `parse_mesh`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(spec, len(devices))
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)


def current_mesh() -> jax.sharding.Mesh | jax.sharding.AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has our axes and several devices: abstract inside of jit. None: one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if tuple(mesh.axis_names) != AXES or math.prod(mesh.shape.values()) == 1:
        return None
    concrete = getattr(jax.sharding, "get_mesh", None)
    try:
        return mesh if concrete is None else concrete()
    except ValueError:  # inside of jit
        return mesh


def auto_mesh() -> jax.sharding.Mesh | jax.sharding.AbstractMesh | None:
    """`current_mesh()`, but None inside of a `shard_map`, where code is already that of one device."""
    mesh = current_mesh()
    return mesh if mesh is not None and all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types) else None


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Inside, programs run on one device of this process, for work that is no step of a training.

    On an ambient mesh every device of it would do the same, and under `mtjax.dryrun` these are hundreds on one machine.
    """
    one = np.array(jax.local_devices()[:1]).reshape([1] * len(AXES))
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    with jax.set_mesh(jax.sharding.Mesh(one, AXES, axis_types=kinds)):
        yield


def logical_axes(path: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    """Logical names of the dimensions of a leaf.

    Args:
      path: of the leaf, "/"-joined; its end decides.
      shape: of the leaf.

    Returns:
      One name or None per dimension. A leaf that `NAMES` does not know is called 'embed' along the larger of its last
      two dimensions if it has `MIN_SIZE` entries.
    """
    for pattern, names in NAMES:
        if len(names) <= len(shape) and re.search(rf"(^|/){pattern}$", path):
            return (None,) * (len(shape) - len(names)) + names
    axes: list[str | None] = [None] * len(shape)
    if len(shape) > 1 and math.prod(shape[-2:]) >= MIN_SIZE:
        axes[-1 if shape[-1] >= shape[-2] else -2] = "embed"
    return tuple(axes)


def spec_of(path: str, shape: Sequence[int], sizes: Mapping[str, int], rules: Mapping[str, str] = RULES) -> P:
    """The partition of one leaf; a dimension that its mesh axis does not divide stays whole, and one warning says so.

    Args:
      path, shape: of the leaf.
      sizes: of the mesh axes.
      rules: logical name -> mesh axis.
    """
    spec: list[str | None] = []
    for size, name in zip(shape, logical_axes(path, shape), strict=True):
        axis = rules.get(name) if name is not None else None
        if axis is None or sizes.get(axis, 1) == 1 or axis in spec:
            spec.append(None)
        elif size % sizes[axis]:
            warnings.warn(
                f"{_parameter(path)} {list(shape)}: its dimension '{name}' of {size} is not divided by {axis}="
                f"{sizes[axis]} and stays whole on every device",
                stacklevel=2,
            )
            spec.append(None)
        else:
            spec.append(axis)
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def spec_of_rows(keys: tuple, shape: Sequence[int], mesh: Any) -> P:
    """The partition of a leaf [K, ...] of a Jacobian, as that of its parameter with a leading axis that stays whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the state was placed
        spec = spec_of(path_of(keys), shape[1:], dict(mesh.shape))
    return P(None, *spec)


def _parameter(path: str) -> str:
    """The parameter that a leaf of a training state belongs to: its momenta have the same message, shown once."""
    return re.sub(r"^(opt_state|method_state|best|params)/((\d+|mu|nu|trace|params|inner_state)/)*", "", path)


def path_of(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def shardings(tree: PyTree, mesh: Any, rules: Mapping[str, str] = RULES) -> PyTree:
    """A `NamedSharding` for every leaf of parameters, a training state, an optimiser state or a Jacobian.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: concrete or abstract, with the axes `AXES`.
      rules: logical name -> mesh axis.
    """
    sizes = dict(mesh.shape)

    def of_leaf(keys, leaf):
        return jax.sharding.NamedSharding(mesh, spec_of(path_of(keys), leaf.shape, sizes, rules))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def constrain(tree: PyTree) -> PyTree:
    """Inside of jit: pins a tree, and by transposition its cotangents, to where its leaves belong on the ambient mesh.

    So a gradient leaves the backward pass as slices (reduce-scatter), and a Jacobian under vmap with it: leading axes
    of vmap are left to the compiler. Without a mesh the tree is returned as it is.
    """
    mesh = current_mesh()
    if mesh is None:
        return tree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the state was placed
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh))


def place_state(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Moves a state to where its leaves belong."""
    return jax.device_put(tree, shardings(tree, mesh))


def replicated(mesh: Any) -> jax.sharding.NamedSharding:
    """Whole on every device."""
    return jax.sharding.NamedSharding(mesh, P())


def batch_axes(rows: int, mesh: Any) -> tuple[str, ...]:
    """The mesh axes over which a batch of that many rows is split: as many of `BATCH_AXES` as divide it."""
    axes: tuple[str, ...] = ()
    for name in BATCH_AXES:
        if mesh.shape[name] > 1 and rows % math.prod(mesh.shape[a] for a in (*axes, name)) == 0:
            axes = (*axes, name)
    return axes


def rows_sharding(rows: int, mesh: Any, axis: int = 0) -> jax.sharding.NamedSharding:
    """How an array whose dimension `axis` counts rows of a batch lies on a mesh."""
    return jax.sharding.NamedSharding(mesh, P(*[None] * axis, batch_axes(rows, mesh) or None))


def place_rows(tree: PyTree, mesh: jax.sharding.Mesh, axis: int = 0) -> PyTree:
    """Arrays of the host as arrays of the mesh, split along `axis` over `BATCH_AXES`.

    Every process passes the whole arrays, but only reads the rows of its own devices: columns may be memory-mapped.
    """

    def place(column):
        sharding = rows_sharding(column.shape[axis], mesh, axis)
        return jax.make_array_from_callback(column.shape, sharding, lambda index: np.asarray(column[index]))

    return jax.tree.map(place, tree)


def take_rows(tree: PyTree, rows: np.ndarray, mesh: jax.sharding.Mesh) -> PyTree:
    """`column[rows]` of every column of the host, split along the last axis of `rows` over `BATCH_AXES`.

    Args:
      tree: columns [N, ...] of numpy arrays.
      rows: i[..., B].
      mesh: the mesh.
    """
    sharding = rows_sharding(rows.shape[-1], mesh, rows.ndim - 1)

    def take(column):
        shape = (*rows.shape, *column.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(column[rows[index[: rows.ndim]]]))

    return jax.tree.map(take, tree)


def to_host(tree: PyTree) -> PyTree:
    """numpy arrays of a tree, wherever its leaves are: what spans processes is gathered on all of them."""

    def fetch(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        whole = jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(leaf)
        return np.asarray(whole)

    return jax.tree.map(fetch, tree)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf lives: path, shape, dtype, partition, and bytes on every device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes_per_device: int


def places(tree: PyTree, mesh: Any = None) -> list[Place]:
    """Where every leaf of a tree lives: its own sharding, or with `mesh` where it would be placed."""
    planned = None if mesh is None else jax.tree.leaves(shardings(tree, mesh))
    found = []
    for index, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        sharding = getattr(leaf, "sharding", None) if planned is None else planned[index]
        spec = getattr(sharding, "spec", P())
        shape = tuple(leaf.shape) if sharding is None else sharding.shard_shape(tuple(leaf.shape))
        itemsize = 1 if not hasattr(leaf.dtype, "itemsize") else leaf.dtype.itemsize
        place = Place(path_of(keys), tuple(leaf.shape), str(leaf.dtype), spec, math.prod(shape) * itemsize)
        found.append(place)
    return found


def describe(tree: PyTree, mesh: Any = None) -> str:
    """A table of a state: parameter, shape, partition, bytes per device, and the sum.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: None shows where arrays are; otherwise where they would be placed on that mesh.

    >>> print(describe({"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}))
    parameter     shape    dtype      split over    bytes per device
    kernel        4 x 8    float32    -             128
    total                                           128
    """
    rows = [("parameter", "shape", "dtype", "split over", "bytes per device")]
    found = places(tree, mesh)
    for place in found:
        spec = ", ".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in place.spec) or "-"
        shape = " x ".join(map(str, place.shape)) or "-"
        rows.append((place.path, shape, place.dtype, spec, f"{place.bytes_per_device:,}"))
    rows.append(("total", "", "", "", f"{sum(place.bytes_per_device for place in found):,}"))
    widths = [max(len(row[column]) for row in rows) + 4 for column in range(5)]
    lines = ("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
