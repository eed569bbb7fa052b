"""DeepONet: both layouts, the strategies of several outputs, task branches, against separate networks and loops."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax.models.deeponet import STRATEGIES, DeepONet, merge, predict_at
from mtjax.nn.operator_layers import MLP, StackedBranch
from mtjax.nn.output_transforms import apply_mask, hard_boundary, standardised

B, N, P, C = 4, 6, 3, 2
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(B, 5)), jnp.float32)
POINTS = jnp.asarray(RNG.normal(size=(N, 2)), jnp.float32)
OWN_POINTS = jnp.asarray(RNG.normal(size=(B, N, 2)), jnp.float32)
BATCH = {"inputs": INPUTS, "points": POINTS, "task": jnp.array([1, 0, 2, 1], jnp.int32)}
TASKS = ("square", "disk", "triangle")


def net(width):
    return MLP((4, width), nn.tanh)


def build(strategy=None, **options):
    branch = C * P if strategy in ("split_both", "split_branch") else P
    trunk = C * P if strategy in ("split_both", "split_trunk") else P
    return DeepONet(net(branch), net(trunk), 1 if strategy is None else C, strategy, **options)


def random_params(module, *args, seed=0, **kwargs):
    shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def quick_jit(f, **options):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **options)


def apply(model, params, batch, **kwargs):
    return np.asarray(quick_jit(lambda p, b: model.apply(p, b, **kwargs)["u"])(params, batch))


def run_net(p, x):
    """The two-layer network by hand."""
    p, x = jax.tree.map(np.asarray, p), np.asarray(x)
    return np.tanh(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]) @ p["out"]["kernel"] + p["out"]["bias"]


def test_sum_over_basis_functions():
    model = build()
    params = random_params(model, BATCH)
    p = params["params"]
    assert set(p) == {"branch", "trunk", "bias"} and p["bias"].shape == (1,)
    b, t = run_net(p["branch"], INPUTS), run_net(p["trunk"], POINTS)
    expected = [[sum(b[i, k] * t[n, k] for k in range(P)) + p["bias"][0] for n in range(N)] for i in range(B)]
    np.testing.assert_allclose(apply(model, params, BATCH), expected, rtol=1e-4, atol=1e-5)
    assert "bias" not in jax.eval_shape(build(use_bias=False).init, jax.random.key(0), BATCH)["params"]


@functools.cache
def both_layouts(strategy):
    model = build(strategy)
    params = random_params(model, BATCH)

    def run(params, points):
        each = jnp.broadcast_to(points, (B, *points.shape))
        return [model.apply(params, {**BATCH, "points": p})["u"] for p in (points, each)]

    return params, quick_jit(run)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_cartesian_equals_pointwise(strategy):
    params, run = both_layouts(strategy)
    cartesian, pointwise = run(params, POINTS)
    assert cartesian.shape == ((B, N) if strategy is None else (B, N, C))
    np.testing.assert_allclose(cartesian, pointwise, rtol=1e-5, atol=1e-5)


def test_own_points_of_each_function():
    model = build()
    params = random_params(model, BATCH)
    whole = apply(model, params, {**BATCH, "points": OWN_POINTS})
    p = params["params"]
    b, t = run_net(p["branch"], INPUTS), run_net(p["trunk"], OWN_POINTS)
    np.testing.assert_allclose(whole, (b[:, None] * t).sum(-1) + np.asarray(p["bias"]), rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(st.permutations(range(N)))
def test_permuting_the_points_permutes_the_field(order):
    params, run = both_layouts("split_both")
    order = np.asarray(order)
    for field, permuted in zip(run(params, POINTS), run(params, POINTS[order]), strict=True):
        np.testing.assert_allclose(permuted, field[:, order], rtol=1e-5, atol=1e-5)


def test_strategies_equal_products_of_slices():
    for strategy in STRATEGIES[1:]:
        params, run = both_layouts(strategy)
        p = params["params"]
        b, t = run_net(p["branch"], INPUTS), run_net(p["trunk"], POINTS)
        u = run(params, POINTS)[0]
        for c in range(C):
            group = slice(c * P, (c + 1) * P)
            own_b = b[:, group] if strategy in ("split_both", "split_branch") else b
            own_t = t[:, group] if strategy in ("split_both", "split_trunk") else t
            np.testing.assert_allclose(u[..., c], own_b @ own_t.T + np.asarray(p["bias"][c]), rtol=1e-4, atol=1e-5)


def test_independent_outputs_are_separate_networks():
    params, run = both_layouts("independent")
    u = run(params, POINTS)[0]
    for c in range(C):
        one = jax.tree.map(lambda leaf, c=c: leaf[c], {k: params["params"][k] for k in ("branch", "trunk")})
        one["bias"] = params["params"]["bias"][c : c + 1]
        np.testing.assert_allclose(u[..., c], apply(build(), {"params": one}, BATCH), rtol=1e-5, atol=1e-5)


def test_the_trunk_runs_once_in_the_cartesian_layout():
    model = build(use_bias=False)
    params = jax.eval_shape(model.init, jax.random.key(0), BATCH)

    def flops(points):
        batch = {"inputs": INPUTS, "points": jax.ShapeDtypeStruct(points, jnp.float32)}
        return jax.jit(model.apply).lower(params, batch).compile().cost_analysis()["flops"]

    many = 400
    # Hidden layer and activation of the trunk are about 2 * 2 * 4 + 4 * 4 FLOPs a point; the product of the hidden
    # layer with the mapped coefficients is 2 * 4 per point and function. So four functions cost more than twice.
    assert flops((B, many, 2)) > 2 * flops((many, 2))


@pytest.mark.parametrize("points", ["common", "own"])
def test_the_last_map_may_come_first(points):
    """With more points than functions the trunk's last map meets the coefficients: equal fields and gradients."""
    model = build(transforms=(apply_mask,))
    many = jnp.asarray(RNG.normal(size=(40, 2) if points == "common" else (B, 40, 2)), jnp.float32)
    batch = BATCH | {"points": many, "mask": jnp.ones(40, bool)}
    params = random_params(model, batch)
    assert model._maps_first(jnp.zeros((B, P)), many)

    def first(p):
        return model.apply(p, batch)["u"]

    def last(p):
        basis = model.apply(p, many, method="basis")
        return model.apply(p, model.apply(p, batch, method="encode"), basis, batch, method="combine")

    np.testing.assert_allclose(first(params), last(params), rtol=1e-5, atol=1e-6)
    gradients = (jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))(params) for f in (first, last))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)
    # The other way round where it is less work: one point, many functions.
    assert not model._maps_first(jnp.zeros((40, P)), many.reshape(-1, 2)[:1])


def test_precomputed_basis_gives_the_same_field():
    for strategy in (None, "independent", "split_branch"):
        params, run = both_layouts(strategy)
        model = build(strategy)
        basis = model.apply(params, POINTS, method="basis")
        coefficients = model.apply(params, BATCH, method="encode")
        u = model.apply(params, coefficients, basis, BATCH, method="combine")
        np.testing.assert_allclose(u, run(params, POINTS)[0], rtol=1e-5, atol=1e-5)


def test_stacked_and_unstacked_have_the_same_shapes_and_other_counts():
    stacked = DeepONet(StackedBranch(P, (4,)), net(P), use_bias=False)
    unstacked = DeepONet(MLP((4, P)), net(P), use_bias=False)
    sizes = []
    for model in (stacked, unstacked):
        outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), BATCH)
        assert outputs["u"].shape == (B, N)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["branch"])))
    assert sizes == [P * (5 * 4 + 4 + 4 + 1), 5 * 4 + 4 + 4 * P + P]


@functools.cache
def task_model(strategy):
    model = build(strategy, tasks=TASKS)
    params = random_params(model, BATCH)
    run = quick_jit(lambda p: [model.apply(p, BATCH)["u"], *(model.apply(p, BATCH, task=name)["u"] for name in TASKS)])
    return model, params, run


@pytest.mark.parametrize("strategy", [None, "independent", "split_branch"])
def test_mixed_batch_equals_each_task_alone(strategy):
    model, params, run = task_model(strategy)
    mixed, *alone = run(params)
    for i, k in enumerate(np.asarray(BATCH["task"])):
        np.testing.assert_allclose(mixed[i], alone[k][i], rtol=1e-5, atol=1e-5)
    # A task's branch is a plain DeepONet with a slice of the parameters.
    own = {**params["params"], "branch": jax.tree.map(lambda leaf: leaf[2], params["params"]["branch"])}
    np.testing.assert_allclose(alone[2], apply(model.clone(tasks=()), {"params": own}, BATCH), rtol=1e-5, atol=1e-5)
    for name in TASKS:
        one = jax.eval_shape(functools.partial(model.init, task=name), jax.random.key(0), BATCH)
        assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, params)


def test_one_task_computes_one_branch():
    model = DeepONet(MLP((64, 64, P)), net(P), tasks=TASKS)
    params = jax.eval_shape(model.init, jax.random.key(0), BATCH)
    mixed, alone = (
        jax.jit(functools.partial(model.apply, task=task)).lower(params, BATCH).compile().cost_analysis()["flops"]
        for task in (None, "disk")
    )
    assert alone < 0.5 * mixed


def test_a_task_trains_its_own_branch_and_the_shared_trunk():
    model, params, _ = task_model(None)

    def losses(params):
        u = model.apply(params, BATCH)["u"]
        return {name: jnp.mean(jnp.where((BATCH["task"] == k)[:, None], u, 0.0) ** 2) for k, name in enumerate(TASKS)}

    values, jacobian = quick_jit(mtjax.value_and_jacobian(losses))(params)
    assert np.all(values > 0)
    branch = jacobian["params"]["branch"]["out"]["kernel"]  # [task of the loss, task of the branch, ...]
    np.testing.assert_array_equal(np.abs(branch).sum((2, 3)) > 0, np.eye(3, dtype=bool))
    assert np.all(np.abs(jacobian["params"]["trunk"]["out"]["kernel"]).sum((1, 2)) > 0)


def test_dropout_draws_in_training():
    model = DeepONet(MLP((32, P), dropout=0.5), net(P), tasks=TASKS)
    params = random_params(model, BATCH)
    key = {"dropout": jax.random.key(1)}
    for options in ({}, {"task": "disk"}):
        still, drawn = (apply(model, params, BATCH, **options, **more) for more in ({}, {"train": True, "rngs": key}))
        assert np.abs(still - drawn).max() > 1e-3


def test_transforms_standardise_then_meet_the_boundary_then_mask():
    transforms = (standardised(np.full(N, 7.0, np.float32), np.full(N, 2.0, np.float32)), hard_boundary(), apply_mask)
    model, plain = build(transforms=transforms), build()
    params = random_params(plain, BATCH)
    distance = jnp.asarray([0.0, 0.1, 0.2, 0.3, 0.4, 0.0])
    mask = jnp.asarray(RNG.random((B, N)) < 0.7)
    u = apply(model, params, {**BATCH, "distance": distance, "mask": mask})
    expected = np.where(mask, np.asarray(distance) * (7 + 2 * apply(plain, params, BATCH)), 0.0)
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(u[:, [0, 5]], 0.0)  # the boundary, exactly


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: build("split"), "strategy must be None or one of independent"),
        (lambda: DeepONet(net(P), net(P), 2), "Several outputs need a strategy"),
        (lambda: DeepONet(net(P), net(P), 1, "split_both"), "one output has none"),
        (lambda: init(DeepONet(net(P), net(P + 1))), "same number of basis functions per output, got 3 and 4"),
        (lambda: init(DeepONet(net(5), net(P), 2, "split_branch")), "branch must end in a multiple of num_outputs=2"),
        (lambda: init(build(tasks=TASKS), {k: BATCH[k] for k in ("inputs", "points")}), "needs batch"),
        (lambda: init(build(tasks=TASKS), task="star"), "task='star' is not one of the model's tasks"),
    ],
)
def test_wrong_arguments(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def init(model, batch=BATCH, **options):
    return jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), batch)


def test_merge_broadcasts_the_output_axis():
    b, t = RNG.normal(size=(B, C, P)), RNG.normal(size=(B, N, P))
    np.testing.assert_allclose(
        merge(jnp.asarray(b, jnp.float32), jnp.asarray(t, jnp.float32), pointwise=True),
        (b[:, None] * t[:, :, None]).sum(-1),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("strategy", "chunk_size"), [(None, 4), ("split_trunk", 3), (None, 100)])
def test_chunks_of_points_change_nothing(strategy, chunk_size):
    """Also where the last chunk is short (6 points by 4), with columns f[N] and f[B, N]."""
    model = build(strategy, transforms=(hard_boundary(), apply_mask))
    batch = BATCH | {"distance": jnp.arange(N, dtype=jnp.float32), "mask": jnp.asarray(RNG.random((B, N)) < 0.5)}
    params = random_params(model, batch)
    ours = quick_jit(lambda p, b: predict_at(model, p, b, chunk_size=chunk_size)["u"])(params, batch)
    np.testing.assert_allclose(ours, apply(model, params, batch), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="points f"):
        predict_at(model, params, batch | {"points": OWN_POINTS})
    with pytest.raises(ValueError, match="must have an axis of 6 points"):
        predict_at(model, params, batch | {"mask": jnp.ones((B, 5), bool)})
