"""The benchmark of objective methods: its quick run end to end, and the arithmetic of its table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax

MODULES = ("objectives", "objectives_measure", "objectives_routes", "objectives_table", "objectives_torch", "methods")


@pytest.fixture(scope="module")
def bench(import_beside):
    return import_beside(MODULES, "bench", "objectives")


@pytest.fixture(scope="module")
def quick(bench):
    files = [bench.RESULTS, bench.TABLE]
    before = [path.read_bytes() if path.exists() else None for path in files]
    content = bench.main(["--quick", "--methods", "UW", "PCGrad"])
    assert [path.read_bytes() if path.exists() else None for path in files] == before, "a quick run writes no file"
    return content


@pytest.mark.slow
@pytest.mark.slow
def test_quick_run_measures_every_section(bench, quick):
    assert list(quick["sections"]) == list(bench.SECTIONS)
    for name, section in quick["sections"].items():
        assert section["rows"] and section["wall_s"] > 0, name
        assert {"device", "versions", "commit", "threads"} <= set(section["where"])
    for section in ("weightings", "aggregators", "steps", "methods"):
        for row in quick["sections"][section]["rows"]:
            if "skipped" not in row:
                assert 0 < row["range"][0] <= row["ms"] <= row["range"][1], row
    assert json.loads(json.dumps(quick)) == quick, "all of it has a JSON form"


@pytest.mark.slow
def test_quick_run_has_every_method_and_side(bench, quick):
    sides = {"mtjax"} if bench.theirs is None else {"mtjax", "TorchJD", "formula"}
    rows = quick["sections"]["steps"]["rows"]
    assert {row["side"] for row in rows} == sides
    ours = {(row["tasks"], row["method"]) for row in rows if row["side"] == "mtjax"}
    assert ours == {(3, name) for name in ("sum", "jacobian", "UW", "PCGrad")}
    assert all(row["multiple"] == 1.0 for row in rows if row["method"] == "sum")


@pytest.mark.slow
def test_quick_run_renders_and_judges(bench, quick):
    text = bench.table.render(quick)
    for title in ("## Goals", "## The whole step", "## Weighting alone, mtjax", "## Routes", "## Memory"):
        assert title in text
    assert "PCGrad" in text and "nan" not in text
    for line in text.splitlines():  # every row of a table has as many cells as its header
        assert not line.startswith("|") or line.endswith("|")
    goals = bench.table.goals(quick)
    assert len(goals) >= 6 and all(np.isfinite(goal.worst) for goal in goals)


def test_goals_are_judged_on_the_worst_cell(bench):
    def row(side, method, tasks, ms, multiple):
        cell = {"tasks": tasks, "params": 1000000, "side": side, "method": method, "family": "Gramian"}
        return cell | {"ms": ms, "range": [ms, ms], "multiple": multiple}

    rows = [
        row("mtjax", "MGDA", 8, 12.0, 3.0),
        row("mtjax", "UPGrad", 8, 18.0, 4.5),
        row("mtjax", "MGDA", 40, 60.0, 15.0),
    ]
    rows += [row("TorchJD", "MGDA", 8, 24.0, 6.0), row("TorchJD", "UPGrad", 8, 9.0, 2.0)]
    where = {"where": {}, "wall_s": 1.0}
    goals = bench.table.goals({"sections": {"steps": {"rows": rows, **where}}})
    by_limit = {goal.limit: goal for goal in goals}
    assert set(by_limit) == {4, 20, 1}
    assert by_limit[4].worst == 4.5 and not by_limit[4].holds and by_limit[4].share == 0.5
    assert by_limit[4].where == "UPGrad, K = 8, P = 1e6"
    assert by_limit[20].worst == 15.0 and by_limit[20].holds
    assert by_limit[1].worst == 2.0 and by_limit[1].share == 0.5  # 18 ms against 9; 12 against 24 holds


def test_memory_goals(bench):
    def row(route, temporary):
        return {"route": route, "tasks": 8, "params_mb": 30.0, "temporary_mb": temporary}

    rows = [row("plain sum", 10.0), row("weighted", 70.0), row("weighted, chunk_size=1", 13.0)]
    growth, one = bench.table.goals({"sections": {"memory": {"rows": rows}}})
    assert growth.worst == (70 - 10) / (8 * 30) == 0.25 and growth.holds
    assert one.worst == 1.3 and not one.holds


@pytest.mark.parametrize("num_tasks, num_params", [(2, 1e5), (40, 1e5), (8, 1e6)])
def test_width_for_hits_the_number_of_parameters(bench, num_tasks, num_params):
    network = bench.make_network(num_tasks, bench.width_for(num_params, num_tasks))
    assert abs(network.num_params / num_params - 1) < 0.01


def test_in_turns_counts_and_stops(bench):
    calls = {"quick": [], "slow": []}

    def timed(name, seconds):
        return bench.Timed(name, lambda steps: calls[name].append(steps) or seconds * steps)

    result = bench.in_turns([timed("quick", 0.01), timed("slow", 3.0)], turns=3, seconds=4.0, target=0.04)
    assert result["quick"]["ms"] == 10.0 and result["quick"]["turns"] == 3
    assert calls["quick"] == [1, 1, 1, 4, 1, 4, 1, 4]  # two runs to warm up, then one uncounted and four counted
    assert result["slow"]["turns"] == 1 and calls["slow"] == [1, 1]  # 3 s to warm up and 3 s counted: no more


def test_directional_and_disjoint_steps_are_right(bench):
    """On a linear trunk: the derivative along the sum of gradients, and rows from each task's own examples."""
    routes = bench.routes

    def loss_fn(params, batch):
        return ((batch @ params) ** 2).mean(0)

    batch = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    params = jnp.array([[1.0, 0.0], [0.5, -1.0]])
    jacobian = jax.jacrev(loss_fn)(params, batch)
    frozen = mtjax.optim.linear()
    sgd = optax.sgd(0.1)
    carry = (params, sgd.init(params), jnp.zeros(2))
    moved, _, along = routes.directional_step(loss_fn, sgd)(carry, batch)
    total = jacobian.sum(0)
    np.testing.assert_allclose(along, jnp.einsum("kij,ij->k", jacobian, total), rtol=1e-6)
    np.testing.assert_allclose(moved, params - 0.1 * total, rtol=1e-6)

    def one_loss(params, batch, task):
        return ((batch @ params[:, task]) ** 2).mean()

    carry = (params, sgd.init(params), mtjax.optim.init(frozen, params, num_tasks=2))
    moved, _, _ = routes.disjoint_step(one_loss, frozen, sgd)(carry, batch[:, None])
    own = sum(jax.grad(one_loss)(params, batch[task : task + 1], task) for task in range(2))
    np.testing.assert_allclose(moved, params - 0.1 * own, rtol=1e-6)


def test_transformer_sizes(bench):
    """A ViT-like encoder: 12 D^2 weights and 13 D biases, scales and offsets in each of the 6 layers."""
    sizes = bench.routes.Vit()
    x = jax.ShapeDtypeStruct((sizes.batch, sizes.tokens, sizes.patch), jnp.float32)
    encoder = bench.routes.Encoder(sizes)
    features, params = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.key(0), x), x)
    assert features.shape == (8, 192)
    embedding = sizes.patch * 192 + 192 + sizes.tokens * 192
    layers = 6 * (12 * 192**2 + 13 * 192)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == embedding + layers + 2 * 192


# The PyTorch side.


def test_dense_pcgrad_by_hand(bench):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("objectives_torch")
    # g_1 = (1, 0), g_2 = (-1, 1): g_1 . g_2 = -1. g_1' = g_1 + 1/2 g_2 = (1/2, 1/2); g_2' = g_2 + g_1 = (0, 1).
    direction = theirs.dense_pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), np.random.default_rng(0))
    assert direction.tolist() == [0.5, 1.5]


def test_both_sides_are_the_same_network(bench):
    theirs = pytest.importorskip("objectives_torch")
    network = bench.make_network(3, 8, hidden=2, batch=5)
    side = theirs.Side(network)
    ours = mtjax.value_and_jacobian(bench.losses_of)(*jax.tree.map(jnp.asarray, (network.params, network.batch())))
    np.testing.assert_allclose(side.losses().detach().numpy(), ours[0], rtol=1e-5)
    # PyTorch's weights are [m, n], ours [n, m].
    for index, rows in enumerate(side.jacobian()):
        mine = np.asarray(ours[1][index // 2]["b" if index % 2 else "w"])
        np.testing.assert_allclose(rows.numpy(), mine if index % 2 else mine.swapaxes(1, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by_hooks, chunk_size", [(False, None), (False, 1), (True, None)])
def test_their_routes_take_the_same_step(bench, by_hooks, chunk_size):
    theirs = pytest.importorskip("objectives_torch")
    side = theirs.Side(bench.make_network(3, 8, hidden=2, batch=5))
    side.by_hooks, side.chunk_size = by_hooks, chunk_size
    side.step(theirs.make_aggregator("MGDA", 3))
    plain = theirs.Side(side.network)
    plain.jacobian_step(theirs.make_aggregator("MGDA", 3))
    moved = side.hooked[0].params if by_hooks else side.params
    for mine, other in zip(moved, plain.params, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), other.detach().numpy(), atol=1e-6)
