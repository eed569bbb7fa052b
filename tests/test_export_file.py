"""Exported files: run by a process without mtjax, for any number of rows, with nothing in them of other tasks."""

import functools
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import export_file
from mtjax.export_file import export
from mtjax.models.deeponet import DeepONet
from mtjax.models.m3vit import M3ViT, M3ViTConfig
from mtjax.models.mod_squad import ModSquad, ModSquadConfig, PooledLinear
from mtjax.models.multitab import MultiTabNet
from mtjax.nn.operator_layers import MLP
from mtjax.nn.vit import ViTConfig
from mtjax.sharding import current_mesh, make_mesh

from .models.vision_cases import Linear

RNG = np.random.default_rng(0)
ROWS = 5  # of the largest batch; rows are independent, so smaller batches are its first rows
SIZES = {"table": (1, 2, ROWS), "experts": (1, 2, ROWS)}  # of the others the largest: every size is a compilation
MARK = np.float32(1234.5678)  # what other tasks' parameters hold
BLOCK = """
import importlib.abc, json, sys


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mtjax", "flax", "optax", "einops", "chex", "orbax"):
            raise ImportError(f"{name} is not for this process")


sys.meta_path.insert(0, Refuse())
"""


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {}  # a model with heads by name has no hash


def random_params(model, batch):
    if id(model) in PARAMS:
        return PARAMS[id(model)]
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    return PARAMS.setdefault(id(model), jax.tree.map(lambda leaf: 0.3 * draw(*leaf.shape), shapes))


def marked(params, stacked, task):
    """The same with MARK in heads of other tasks, and in rows of other tasks of arrays whose path a regex names."""

    def mark(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = leaf.copy()
        if re.search(stacked, name):
            rows = leaf.swapaxes(0, 1) if "groups/" in name else leaf  # of a scan: [turn, task, ...]
            rows[np.arange(len(rows)) != task] = MARK
        elif name.startswith("head_") and not name.startswith(f"head_{list(HEADS)[task]}"):
            leaf[...] = MARK
        return leaf

    return jax.tree_util.tree_map_with_path(mark, params)


HEADS = {"edge": 1, "normals": 3}
IMAGES = {"image": draw(ROWS, 8, 8, 3)}
TABLE = {"categorical": RNG.integers(0, 4, (ROWS, 2)).astype(np.int32), "numeric": draw(ROWS, 2)}
FIELDS = {"inputs": draw(ROWS, 4), "points": draw(9, 2)}
TASKS = (
    mtjax.Task("churn", "binary"),
    mtjax.Task("kind", "multiclass", num_classes=3),
    mtjax.Task("price", "regression", offset=3.0, scale=2.0),
)
PREDICT = functools.partial(mtjax.predictions, TASKS)
TABULAR = MultiTabNet(mtjax.head_sizes(TASKS), (4, 5), 2, width=4, num_heads=1, ff_width=4, head_hidden=(4,))
VIT = ViTConfig(patch=4, width=8, depth=4, num_heads=2, scan=True, remat=True)
EXPERTS = M3ViT(HEADS, M3ViTConfig(VIT, experts=4, top_k=2, expert_ratio=2.0), Linear)
SQUAD = ModSquad(
    ModSquadConfig(
        ViTConfig(patch=4, width=8, depth=1, num_heads=2), "both", 4, 2, attention_experts=4, attention_top_k=2
    ),
    HEADS,
    {"edge": Linear, "normals": PooledLinear},
)
OPERATOR = DeepONet(MLP((6, 4)), MLP((6, 4)))
AT_ANY_POINTS = DeepONet(MLP((6, 4)), MLP((6, 4), output_activation=jnp.tanh))


def halved(batch):
    return {**batch, "numeric": batch["numeric"] / 2}


# model, batch, arrays that are stacked over tasks, the task's position in them, options
CASES = {
    "table": (TABULAR, TABLE, "^$", None, {"predict": PREDICT, "prepare": halved}),
    "a tabular task": (TABULAR, TABLE, "heads/tower|heads/out_1", 1, {"task": "kind", "predict": PREDICT}),
    "experts": (EXPERTS, IMAGES, "router/kernel", 1, {"task": "normals"}),
    "experts by rows": (EXPERTS, IMAGES, "router/kernel", 1, {"task": "normals", "rows": 2}),
    "squad": (SQUAD, IMAGES, "router/kernel|task_vectors", 1, {"task": "normals"}),
    "operator": (OPERATOR, FIELDS, "^$", None, {"shapes": {"points": "..."}, "rows": 2}),
    "any points": (AT_ANY_POINTS, FIELDS, "^$", None, {"shapes": {"points": "n, 2"}}),
}


def expected(model, params, batch, task=None, prepare=lambda batch: batch, predict=lambda outputs: outputs, **_):
    run = jax.jit(lambda params: predict(model.apply({"params": params}, prepare(batch), task=task)))
    return jax.device_get(run(params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<case>.npz, and what the models compute: <case>/in/<entry> and <case>/out/<task> in expected.npz."""
    folder, numbers, computed = tmp_path_factory.mktemp("exported"), {}, {}
    for case, (model, batch, stacked, task, options) in CASES.items():
        params = random_params(model, batch)
        numbers |= {f"{case}/in/{name}": leaf for name, leaf in batch.items()}
        key = (id(model), task)
        if key not in computed:
            computed[key] = expected(model, params, batch, **options)
        numbers |= {f"{case}/out/{name}": leaf for name, leaf in computed[key].items()}
        if task is not None:
            params = marked(params, stacked, task)
        export(model, params, path=folder / f"{case}.npz", example=batch, **options)
    np.savez(folder / "expected.npz", **numbers)
    return folder


SCRIPT = """
import pathlib
numbers = np.load("expected.npz")
errors = {}
for path in sorted(pathlib.Path(".").glob("*.npz")):
    case = path.stem
    if case == "expected":
        continue
    of = {kind: {n.split("/")[2]: numbers[n] for n in numbers.files if n.startswith(f"{case}/{kind}/")}
          for kind in ("in", "out")}
    program, params = load(path)
    for rows in SIZES.get(case, (ROWS,)):
        batch = {name: leaf if name == "points" else leaf[:rows] for name, leaf in of["in"].items()}
        outputs = program.call(params, batch)
        assert set(outputs) == set(of["out"])
        for name, wanted in of["out"].items():
            assert outputs[name].shape == wanted[:rows].shape
            errors[f"{case} {name} {rows}"] = float(np.abs(outputs[name] - wanted[:rows]).max())
print(json.dumps([errors, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def documented_loader():
    """The lines that the module's documentation gives to whoever gets a file, as `load(path) -> (program, params)`."""
    lines = re.search(r"    import jax, .*?outputs = [^\n]*", export_file.__doc__, re.DOTALL).group().splitlines()
    assert len(lines) == 5 and "outputs = program.call(params, batch)" in lines[-1]
    lines = [line.replace('"depth.npz"', "path") for line in lines]
    return "\n".join([lines[0].strip(), "def load(path):", *lines[1:-1], "    return program, params", ""])


def test_a_process_without_mtjax_computes_the_same(folder):
    script = BLOCK + documented_loader() + f"ROWS, SIZES = {ROWS}, {SIZES}\n" + SCRIPT
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    errors, modules = json.loads(result.stdout.splitlines()[-1])
    assert not {"mtjax", "flax", "optax"} & set(modules)
    assert len(errors) == 3 * len(TASKS) + 3 + len(CASES) - 2
    assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("case", [case for case, (*_, task, _) in CASES.items() if task is not None])
def test_nothing_of_other_tasks_is_in_the_file_and_no_paths_of_the_author(folder, case):
    model, batch, stacked, task, _ = CASES[case]
    whole = marked(random_params(model, batch), stacked, task)
    assert MARK.tobytes() in b"".join(leaf.tobytes() for leaf in jax.tree.leaves(whole))
    path = folder / f"{case}.npz"
    assert MARK.tobytes() not in path.read_bytes()  # arrays are not compressed
    assert not re.findall(rb"[\w/.-]*\.py\b(?!\w)", path.read_bytes().replace(b".npy", b""))
    arrays = np.load(path)
    size = sum(arrays[name].nbytes for name in arrays.files if name != "program")
    gone = sum(int((leaf == MARK).sum()) * leaf.itemsize for leaf in jax.tree.leaves(whole))
    assert size <= sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) - gone


def test_the_number_of_points_is_free_too(folder):
    batch = CASES["any points"][1]
    arrays = dict(np.load(folder / "any points.npz"))
    program = jax.export.deserialize(bytearray(arrays.pop("program")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    shapes = [str(aval.shape) for aval in program.in_avals[-2:]]
    assert shapes == ["(b, 4)", "(n, 2)"]
    assert program.call(arrays, {"inputs": batch["inputs"][:3], "points": draw(4, 2)})["u"].shape == (3, 4)


class Narrow(nn.Module):
    """A model of one matrix."""

    @nn.compact
    def __call__(self, batch):
        kernel = self.param("kernel", nn.initializers.ones_init(), (3, 2), jnp.bfloat16)
        return {"y": batch["x"] @ kernel.astype(jnp.float32)}


class Whole(nn.Module):
    """A model that counts its rows."""

    @nn.compact
    def __call__(self, batch):
        return {"y": batch["x"] * len(batch["x"])}


def test_bfloat16_and_an_old_file_is_replaced(tmp_path):
    kernel = jnp.asarray(draw(3, 2), jnp.bfloat16)
    path = tmp_path / "new" / "narrow.npz"
    for scale in (1, 2):
        returned = export(Narrow(), {"kernel": scale * kernel}, path=path, example={"x": draw(1, 3)}, platforms=["cpu"])
    assert returned == path and [file.name for file in path.parent.iterdir()] == ["narrow.npz"]
    arrays = dict(np.load(path, allow_pickle=False))
    program = jax.export.deserialize(bytearray(arrays.pop("program")))
    assert arrays["params/kernel"].dtype == np.uint16
    x = draw(4, 3)
    np.testing.assert_allclose(
        program.call(arrays, {"x": x})["y"], x @ np.asarray(2 * kernel, np.float32), atol=1e-5, rtol=1e-5
    )


def test_an_ensemble_predicts_the_mean_of_its_seeds(tmp_path):
    params = random_params(TABULAR, TABLE)
    seeds = [params, jax.tree.map(np.negative, params)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    options = {"task": "kind", "predict": PREDICT}
    path = export(TABULAR, stacked, path=tmp_path / "x.npz", example=TABLE, lanes=True, platforms=["cpu"], **options)
    arrays = dict(np.load(path))
    program = jax.export.deserialize(bytearray(arrays.pop("program")))
    assert arrays["params/heads/tower/dense_0/kernel"].shape == (2, 1, 4, 4) and "params/heads/out_1/bias" not in arrays
    mean = np.mean([expected(TABULAR, params, TABLE, **options)["kind"] for params in seeds], axis=0)
    np.testing.assert_allclose(program.call(arrays, TABLE)["kind"], mean, atol=1e-5)


def test_on_a_mesh_the_program_is_still_for_one_device(tmp_path):
    mesh = make_mesh("data=4,expert=2")
    params = random_params(EXPERTS, IMAGES)
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    limit = jax.config.jax_traceback_in_locations_limit
    with jax.set_mesh(mesh):
        path = export(EXPERTS, placed, path=tmp_path / "x.npz", example=IMAGES, task="normals", platforms=["tpu"])
        assert current_mesh() is not None
    assert jax.config.jax_traceback_in_locations_limit == limit
    program = jax.export.deserialize(bytearray(np.load(path)["program"]))
    assert program.nr_devices == 1 and program.platforms == ("tpu",)


@pytest.mark.parametrize(
    ("model", "example", "options", "sentence"),
    [
        (Whole(), {"x": draw(3, 2)}, {}, "give a number of rows that are computed at a time, e.g. rows=64"),
        (OPERATOR, FIELDS, {}, r"first axes in the example differ.*inputs 5, points 9.*shapes=\{'points': '...'\}"),
        (OPERATOR, FIELDS, {"shapes": {"point": "..."}}, "shapes names 'point', which is not in the example"),
        (TABULAR, TABLE, {"usage": {}}, "usage is of one task and one seed, got task=None and lanes=False"),
        (TABULAR, TABLE, {"usage": {}, "task": "kind"}, "usage is for M3ViT and ModSquad.*MultiTabNet"),
        (TABULAR, TABLE, {"task": "unknown"}, "unknown"),
    ],
)
def test_errors_are_sentences(model, example, options, sentence, tmp_path):
    params = random_params(model, example) if hasattr(model, "heads") else {}
    with pytest.raises(ValueError, match=sentence):
        export(model, params, path=tmp_path / "x.npz", example=example, **options)
    assert not list(tmp_path.iterdir())
