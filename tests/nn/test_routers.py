"""Routers against a loop over tokens, and what each coupling, option and mask promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.nn.routers import Router, RouterConfig, choose

WIDTH, EXPERTS, TASKS = 6, 5, 3
X = np.random.default_rng(0).normal(size=(TASKS, 7, WIDTH)).astype(np.float32)


@functools.cache
def compiled(config, tasks, train=False):
    router = Router(config, TASKS)
    rngs = (lambda key: {"gate": key}) if train else (lambda key: {})
    return jax.jit(lambda params, x, key: router.apply({"params": params}, x, tasks=tasks, train=train, rngs=rngs(key)))


def run(config, params, x, tasks, *, train=False, key=0):
    return jax.tree.map(np.asarray, compiled(config, tasks, train)(params, x, jax.random.key(key)))


def shapes(config, tasks=(0, 1, 2), num_tasks=TASKS):
    router = Router(config, num_tasks)
    variables = jax.eval_shape(functools.partial(router.init, tasks=tasks), jax.random.key(0), X[:1])
    return jax.tree.map(lambda leaf: leaf.shape, variables.get("params", {}))


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes(config), is_leaf=is_shape)


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def test_multi_gate_equals_a_loop_over_tokens():
    config = RouterConfig("multi_gate", EXPERTS, 2)
    params = random_params(config)
    routing = run(config, params, X[:2], (2, 0))
    for stream, task in enumerate((2, 0)):
        for token in range(X.shape[1]):
            p = softmax(X[stream, token] @ params["kernel"][task])
            best = np.argsort(-p)[:2]
            np.testing.assert_allclose(routing.probs[stream, token], p, rtol=1e-5)
            np.testing.assert_array_equal(routing.ids[stream, token], best)
            np.testing.assert_allclose(routing.values[stream, token], p[best], rtol=1e-5)  # not renormalised
    assert routing.noise_std is None
    np.testing.assert_array_equal(routing.logits, routing.noisy_logits)


@pytest.mark.parametrize("kind", ["multi_gate", "task_conditioned"])
def test_equal_streams_are_routed_from_one_copy(kind):
    config = RouterConfig(kind, EXPERTS, 2, task_dim=4)
    params = random_params(config)
    one = run(config, params, X[:1], (0, 1, 2))
    many = run(config, params, np.repeat(X[:1], TASKS, 0), (0, 1, 2))
    np.testing.assert_allclose(one.probs, many.probs, rtol=1e-5)
    assert one.values.shape == (TASKS, X.shape[1], 2)
    alone = run(config, params, X[:1], (1,))
    np.testing.assert_allclose(one.probs[1], alone.probs[0], rtol=1e-5)


def test_task_conditioned_gate_reads_the_token_beside_the_task_vector():
    config = RouterConfig("task_conditioned", EXPERTS, 2, task_dim=4)
    params = random_params(config)
    routing = run(config, params, X, (0, 1, 2))
    vector = params["task_vector"]
    for task in range(TASKS):
        hidden = np.eye(TASKS)[task] @ vector["rows"] + vector["bias"]
        hidden = jax.nn.gelu(hidden, approximate=False) @ vector["out"]["kernel"] + vector["out"]["bias"]
        v = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-6) * vector["norm"]["scale"] + vector["norm"]["bias"]
        for token in range(X.shape[1]):
            logits = np.concatenate([X[task, token], v]) @ params["kernel"][0]
            np.testing.assert_allclose(routing.logits[task, token], logits, rtol=1e-4, atol=1e-4)


def test_single_gate_keeps_equal_streams_one():
    config = RouterConfig("single", EXPERTS, 2)
    params = random_params(config)
    routing = run(config, params, X[:1], (0, 1, 2))
    assert routing.ids.shape == (1, X.shape[1], 2)
    streams = run(config, params, X, (0, 1, 2))
    np.testing.assert_allclose(streams.logits, X @ params["kernel"][0], rtol=1e-4, atol=1e-5)


def test_hard_skills_average_over_the_skills_of_the_task():
    config = RouterConfig("hard_skill", EXPERTS, 3, skills=[[1, 0, 0, 0, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    assert shapes(config) == {}
    routing = run(config, {}, X[:1], (0, 1, 2))
    np.testing.assert_array_equal(routing.ids[:, 0], [[0, 4, 5], [1, 2, 4], [4, 5, 5]])  # 5 = no expert
    np.testing.assert_allclose(routing.values[:, 3], [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs.sum(-1), 1, rtol=1e-6)
    assert run(config, {}, X[:1], (0, 2)).ids.shape[-1] == 2  # no more than these tasks need
    assert config.pool_size((1,)) == 5


@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3]))
@settings(max_examples=8)
def test_choices_are_distinct_ordered_and_follow_a_renaming_of_experts(seed, k):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 4, EXPERTS)).astype(np.float32)
    names = rng.permutation(EXPERTS)
    routing, renamed = _choose(logits, k), _choose(logits[..., names], k)
    np.testing.assert_array_equal(names[renamed.ids], routing.ids)
    np.testing.assert_allclose(renamed.values, routing.values, rtol=1e-6)
    assert (np.diff(routing.values, axis=-1) <= 0).all()
    assert (np.diff(np.sort(routing.ids, axis=-1), axis=-1) > 0).all()
    assert (routing.values.sum(-1) <= 1 + 1e-6).all()
    np.testing.assert_allclose(np.sort(routing.probs, -1)[..., ::-1][..., :k], routing.values, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=1)
def _choose(logits, k):
    return choose(logits, logits, None, top_k=k, num_experts=EXPERTS)


def test_noise_is_added_in_training_only_with_its_standard_deviation():
    config = RouterConfig("multi_gate", EXPERTS, 2, noise_std=1.0, renormalise=True)
    params = random_params(config)
    x = np.zeros((1, 400, WIDTH), np.float32)
    first, second = (run(config, params, x, (0, 1, 2), train=True, key=key) for key in (0, 1))
    assert first.noise_std == np.float32(1 / EXPERTS)
    assert (first.noisy_logits != second.noisy_logits).mean() > 0.99
    np.testing.assert_allclose((first.noisy_logits - first.logits).std(), 1 / EXPERTS, rtol=0.05)
    np.testing.assert_allclose(first.probs[0, 0], softmax(first.noisy_logits[0, 0]), rtol=1e-5)
    np.testing.assert_allclose(first.values.sum(-1), 1, rtol=1e-6)  # renormalised
    quiet = run(config, params, X[:1], (0, 1, 2))
    np.testing.assert_array_equal(quiet.noisy_logits, quiet.logits)


def test_learned_noise_starts_at_softplus_of_zero_with_zero_gates():
    config = RouterConfig("multi_gate", EXPERTS, 2, learned_noise=True, zero_init=True)
    assert shapes(config) == {"kernel": (TASKS, WIDTH, EXPERTS), "noise_kernel": (TASKS, WIDTH, EXPERTS)}
    variables = jax.jit(functools.partial(Router(config, TASKS).init, tasks=(0,)))(jax.random.key(0), X[:1])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(variables))
    routing = run(config, variables["params"], np.repeat(X[:1], 60, 1), (0, 1, 2), train=True)
    np.testing.assert_allclose(routing.noise_std, np.log(2) + 0.01, rtol=1e-5)
    np.testing.assert_allclose(routing.noisy_logits.std(), np.log(2) + 0.01, rtol=0.05)


def test_gates_exist_for_every_task_and_only_those_asked_for_are_computed():
    config = RouterConfig("multi_gate", EXPERTS, 2)
    assert shapes(config, tasks=(1,)) == shapes(config) == {"kernel": (TASKS, WIDTH, EXPERTS)}
    program = str(jax.make_jaxpr(compiled(config, (1,)))(random_params(config), X[:1], jax.random.key(0)))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 1
    assert f"f32[{X.shape[1]},{EXPERTS}]" in products[0]

    def importance(params):
        routing = Router(config, TASKS).apply({"params": params}, X, tasks=(0, 1, 2))
        return jnp.sum(jnp.square(routing.values), axis=(1, 2))

    jacobian = jax.jit(jax.jacrev(importance))(random_params(config))["kernel"]  # [T, G, D, E]
    size = np.abs(jacobian).sum((2, 3))
    assert (np.diag(size) > 0).all()
    assert (size[~np.eye(TASKS, dtype=bool)] == 0).all()


def test_a_gate_never_reaches_beyond_its_window():
    windows = [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    config = RouterConfig("multi_gate", EXPERTS, 2, visible=windows, noise_std=1.0)
    params = random_params(config)
    routing = run(config, params, X, (0, 1, 2), train=True)
    assert np.take_along_axis(np.asarray(windows, bool)[:, None], routing.ids, -1).all()
    assert (routing.probs[~np.broadcast_to(np.asarray(windows, bool)[:, None], routing.probs.shape)] == 0).all()
    np.testing.assert_allclose(routing.probs.sum(-1), 1, rtol=1e-5)
    assert [config.pool_size((t,)) for t in range(3)] == [3, 4, 5]


def test_experts_out_of_reach_change_no_bit():
    small = RouterConfig("multi_gate", 3, 2)
    config = RouterConfig("multi_gate", EXPERTS, 2, visible=[[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    params = random_params(config)
    routing = run(config, params, X[:2], (0, 1))
    alone = run(small, {"kernel": params["kernel"][..., :3]}, X[:2], (0, 1))
    np.testing.assert_array_equal(routing.values, alone.values)
    np.testing.assert_array_equal(routing.ids, alone.ids)
    np.testing.assert_array_equal(routing.probs, np.pad(alone.probs, ((0, 0), (0, 0), (0, 2))))


def test_ghost_columns_stay_in_the_denominator():
    whole, config = RouterConfig("multi_gate", EXPERTS, 2), RouterConfig("multi_gate", 3, 2, ghosts=2)
    params = random_params(whole)
    routing = run(config, params, X, (0, 1, 2))
    np.testing.assert_allclose(routing.probs, run(whole, params, X, (0, 1, 2)).probs[..., :3], rtol=1e-6)
    assert routing.ids.max() < 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "soft"}, "kind must be one of"),
        ({"top_k": 6}, "top_k must be between 1 and num_experts=5, got 6"),
        ({"noise_std": -1.0}, "must not be negative"),
        ({"visible": [[1, 1]]}, r"visible must be bool\[num_tasks, 5\]"),
        ({"visible": [[1, 0, 0, 0, 0]]}, "at least top_k=2 experts"),
        ({"kind": "single", "visible": [[1, 1, 0, 0, 0]]}, "a gate that knows the task"),
        ({"kind": "hard_skill"}, "skills is given with kind='hard_skill'"),
        ({"kind": "hard_skill", "skills": [[1, 0, 0, 0, 0]]}, "top_k=2 must be the most"),
    ],
)
def test_a_wrong_configuration_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        RouterConfig(**({"kind": "multi_gate", "num_experts": EXPERTS, "top_k": 2} | arguments))


def test_wrong_streams_are_named():
    config = RouterConfig("multi_gate", EXPERTS, 2)
    with pytest.raises(ValueError, match=r"tasks must name some of 0\.\.2"):
        run(config, random_params(config), X[:1], (3,))
    with pytest.raises(ValueError, match="T = 1 or 3"):
        run(config, random_params(config), X[:2], (0, 1, 2))
    with pytest.raises(ValueError, match="a row for each of 3 tasks, got 1"):
        run(RouterConfig("multi_gate", EXPERTS, 2, visible=[[1] * 5]), random_params(config), X, (0, 1, 2))
