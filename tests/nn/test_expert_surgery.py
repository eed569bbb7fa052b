"""Pruned layers equal whole ones where nothing used was removed; growth leaves old tasks' outputs as they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.nn.expert_load import use_percent
from mtjax.nn.expert_surgery import experts_to_keep, grow_experts, new_entries, prune_to_task
from mtjax.nn.moe_attention import MoEAttention
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import Router, RouterConfig

B, N, D, E, K, TASKS = 2, 6, 5, 6, 2, 3
X = np.random.default_rng(0).normal(size=(1, B, N, D)).astype(np.float32)
X[..., 0] = 1.0  # lets a gate dislike an expert whatever the token is
KEY = jax.random.key(0, impl="unsafe_rbg")  # threefry takes longer to compile than all the rest
LAYERS = {"mlp": functools.partial(MoEMlp, hidden=4), "attention": functools.partial(MoEAttention, head_dim=3)}


@functools.cache
def module(name, config, num_tasks, dispatch):
    return LAYERS[name](config, num_tasks=num_tasks, dispatch=dispatch)


@functools.cache
def compiled(name, config, num_tasks, tasks, dispatch="all_experts"):  # the quickest to compile
    layer = module(name, config, num_tasks, dispatch)
    return jax.jit(lambda params, x: layer.apply({"params": params}, x, tasks=tasks))


def shapes(name, config, num_tasks):
    layer = module(name, config, num_tasks, "all_experts")
    tree = jax.eval_shape(functools.partial(layer.init, tasks=tuple(range(num_tasks))), jax.random.key(0), X)
    return jax.tree.map(lambda leaf: leaf.shape, tree["params"])


def shapes_of(params):
    return jax.tree.map(lambda leaf: leaf.shape, dict(params))


def random_params(name, config, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes(name, config, TASKS), is_leaf=is_shape
    )
    if "kernel" in params.get("router", {}):
        params["router"]["kernel"][..., 0, 3:] -= 9.0  # nobody chooses experts 3, 4, 5, though p > 0
    return params


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 4), threshold=st.floats(0, 100))
@settings(max_examples=20)
def test_kept_experts_are_those_above_the_threshold_and_at_least_k(seed, top_k, threshold):
    percent = 100 * np.random.default_rng(seed).dirichlet(np.full(8, 0.3))
    kept = experts_to_keep(percent, top_k=top_k, threshold=threshold)
    above = set(np.flatnonzero(percent > threshold / top_k))
    assert list(kept) == sorted(set(kept))
    assert len(kept) == max(top_k, len(above))
    assert above <= set(kept)
    assert percent[list(kept)].min() >= max((percent[e] for e in range(8) if e not in kept), default=0)
    assert set(experts_to_keep(percent, top_k=1, threshold=200, reach=np.arange(8) > 5)) <= {6, 7}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_pruned_to_what_its_task_uses_is_equal_to_the_whole(name):
    config = RouterConfig("multi_gate", E, K)
    params = random_params(name, config)
    y, stats = compiled(name, config, TASKS, (1,))(params, X)
    percent = use_percent(stats.count)[0]
    exact = prune_to_task(params, percent, task=1, config=config, threshold=0.0, keep_denominator=True)
    assert set(exact.experts) == set(np.flatnonzero(percent))
    assert len(exact.experts) <= 3
    small, small_stats = compiled(name, exact.config, 1, (0,))(exact.params, X)
    np.testing.assert_allclose(small, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(small_stats.count[0], stats.count[0][np.asarray(exact.experts)])

    published = prune_to_task(params, percent, task=1, config=config, threshold=0.0)
    kept = len(published.experts)
    assert shapes_of(published.params) == shapes(name, published.config, 1)
    assert published.params["router"]["kernel"].shape == (1, D, kept)


def test_only_the_denominator_separates_the_published_rule_from_the_exact_one():
    config = RouterConfig("multi_gate", E, K, renormalise=True)  # whose gate values have no denominator left
    params = random_params("mlp", config)
    y, stats = compiled("mlp", config, TASKS, (1,))(params, X)
    pruned = prune_to_task(params, use_percent(stats.count)[0], task=1, config=config, threshold=0.0)
    np.testing.assert_allclose(compiled("mlp", pruned.config, 1, (0,))(pruned.params, X)[0], y, rtol=1e-5, atol=1e-5)


def probs(config, num_tasks, params, task):
    router = Router(config, num_tasks)
    return jax.jit(lambda p: router.apply({"params": p}, X[:, 0], tasks=(task,)).probs)(params["router"])


@pytest.mark.parametrize("kind", ["task_conditioned", "single"])
def test_pruned_routers_of_other_kinds_keep_their_probabilities(kind):
    config = RouterConfig(kind, E, K, task_dim=4)
    params = random_params("mlp", config)
    percent = [0, 60, 0, 40, 0, 0]
    pruned = prune_to_task(params, percent, task=2, config=config, keep_denominator=True)
    assert pruned.experts == (1, 3)
    assert shapes_of(pruned.params) == shapes("mlp", pruned.config, 1)

    whole = probs(config, TASKS, params, 2)
    np.testing.assert_allclose(probs(pruned.config, 1, pruned.params, 0), whole[..., [1, 3]], rtol=1e-5, atol=1e-7)


def test_hard_skills_prune_to_the_skills_of_the_task():
    config = RouterConfig("hard_skill", E, 3, skills=[[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0]])
    params = random_params("mlp", config)
    y, stats = compiled("mlp", config, TASKS, (1,))(params, X)
    pruned = prune_to_task(params, use_percent(stats.count)[0], task=1, config=config)
    assert pruned.experts == (0, 5)
    np.testing.assert_allclose(compiled("mlp", pruned.config, 1, (0,))(pruned.params, X)[0], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dispatch"), [("mlp", "sort_capacity"), ("attention", "all_experts")])
def test_growth_changes_no_bit_of_old_outputs(name, dispatch):
    """Also with a dispatch that drops: had the pool's size or capacity changed, so would have what is dropped."""
    config = RouterConfig("multi_gate", E, K)
    params = random_params(name, config)
    old_tasks = (0, 1, 2)
    before, stats_before = compiled(name, config, TASKS, old_tasks, dispatch)(params, X)
    grown = grow_experts(params, KEY, 3, config=config)
    assert grown.num_tasks == TASKS + 1
    assert shapes_of(grown.params) == shapes(name, grown.config, grown.num_tasks)
    old = compiled(name, grown.config, grown.num_tasks, old_tasks, dispatch)
    after, stats_after = old(grown.params, X)
    assert np.abs(after - before).max() == 0
    np.testing.assert_array_equal(stats_after.count[:, :E], stats_before.count)
    np.testing.assert_array_equal(stats_after.dropped, stats_before.dropped)
    assert (stats_before.dropped.max() > 0) == (dispatch == "sort_capacity")
    assert stats_after.count[:, E:].max() == 0

    # Whatever the new entries become, the old tasks do not notice.
    rng = np.random.default_rng(1)
    masks = new_entries(params, grown.params)
    other = jax.tree.map(lambda p, m: np.where(m, 9 * rng.normal(size=p.shape), p), grown.params, masks)
    other = jax.tree.map(np.float32, other)
    assert np.abs(old(other, X)[0] - before).max() == 0


def test_the_new_task_trains_on_new_entries_alone():
    config = RouterConfig("multi_gate", E, K)
    params = random_params("mlp", config)
    grown = grow_experts(params, KEY, 3, config=config)
    masks = new_entries(params, grown.params)
    new = compiled("mlp", grown.config, grown.num_tasks, (TASKS,))
    target = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    @jax.jit
    def step(params):
        def loss(params):
            y, stats = new(params, X)
            return jnp.mean(jnp.square(y - target)), stats.count[0]

        (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        # Decay included: whatever an optimizer wants of old entries, the mask says no.
        update = jax.tree.map(lambda g, p, m: jnp.where(m, -0.3 * (g + 1e-3 * p), 0.0), gradient, params, masks)
        return jax.tree.map(jnp.add, params, update), value, count

    trained, losses = grown.params, []
    for _ in range(20):
        trained, value, count = step(trained)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert count[E:].sum() > 0  # the new task uses new experts
    for name in ("kernel_in", "bias_in", "kernel_out", "bias_out"):
        np.testing.assert_array_equal(trained[name][:E], params[name])
    np.testing.assert_array_equal(trained["router"]["kernel"][:TASKS], grown.params["router"]["kernel"][:TASKS])
    assert np.abs(trained["router"]["kernel"][TASKS] - grown.params["router"]["kernel"][TASKS]).max() > 0


def test_new_experts_may_be_copies_and_new_entries_are_marked():
    config = RouterConfig("multi_gate", E, K, zero_init=True)
    params = random_params("attention", config)
    grown = grow_experts(params, KEY, 2, config=config, copy_from=(4, 1)).params
    for leaf, old in zip(jax.tree.leaves(grown["experts"]), jax.tree.leaves(params["experts"]), strict=True):
        np.testing.assert_array_equal(leaf, np.concatenate([old, old[[4, 1]]]))
    np.testing.assert_array_equal(grown["router"]["kernel"][TASKS], 0)
    np.testing.assert_array_equal(grown["router"]["kernel"][:TASKS, :, :E], params["router"]["kernel"])
    model = {"layer": grown, "head": np.zeros(2)}
    masks = new_entries({"layer": params}, model)
    assert masks["head"].all()
    assert not masks["layer"]["key_value"]["kernel"].any()
    np.testing.assert_array_equal(masks["layer"]["experts"]["out_kernel"].all((1, 2)), np.arange(E + 2) >= E)
    assert masks["layer"]["router"]["kernel"][TASKS].all()


def test_a_task_alone_may_be_added_over_the_experts_that_are_there():
    config = RouterConfig("multi_gate", E, K)
    params = random_params("mlp", config)
    grown = grow_experts(params, KEY, 0, config=config)
    assert grown.config == config
    assert shapes_of(grown.params) == shapes("mlp", config, TASKS + 1)
    np.testing.assert_array_equal(grown.params["kernel_in"], params["kernel_in"])


def test_a_grown_layer_prunes_to_an_old_task_and_to_the_new_one():
    config = RouterConfig("multi_gate", E, K)
    grown = grow_experts(random_params("mlp", config), KEY, 2, config=config)
    percent = np.zeros(E + 2)
    percent[[1, 7]] = 50
    new = prune_to_task(grown.params, percent, task=TASKS, config=grown.config, keep_denominator=True)
    assert (new.experts, new.config.ghosts) == ((1, 7), E)
    old = prune_to_task(grown.params, np.zeros(E + 2), task=0, config=grown.config, keep_denominator=True)
    assert (old.experts, old.config.ghosts) == ((0, 1), E - 2)  # experts out of its reach were never in its softmax


def test_other_kinds_grow():
    conditioned = RouterConfig("task_conditioned", E, K, task_dim=4)
    params = random_params("mlp", conditioned)
    grown = grow_experts(params, KEY, 2, config=conditioned)
    assert shapes_of(grown.params) == shapes("mlp", grown.config, grown.num_tasks)
    before = probs(conditioned, TASKS, params, 2)
    np.testing.assert_array_equal(probs(grown.config, grown.num_tasks, grown.params, 2)[..., :E], before)
    assert (probs(grown.config, grown.num_tasks, grown.params, TASKS)[..., E:] > 0).all()

    skilled = RouterConfig("hard_skill", E, 1, skills=np.eye(TASKS, E))
    grown = grow_experts(random_params("mlp", skilled), KEY, 1, config=skilled, skills=(0, E))
    assert grown.config.skills[-1] == (True, False, False, False, False, False, True)
    assert grown.config.top_k == 2
    with pytest.raises(ValueError, match="'single' gate serves all tasks"):
        grow_experts({}, KEY, 1, config=RouterConfig("single", E, K))
