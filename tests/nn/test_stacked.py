"""Stacks of networks against a loop over the stack; one task against all; no unrolling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.stacked import StackedDense, StackedLayerNorm, StackedMLP, TaskHeads, task_index, uniform_fan_in

STACK, BATCH, IN, OUT = 3, 4, 5, 2
RNG = np.random.default_rng(0)
OWN = jnp.asarray(RNG.normal(size=(STACK, BATCH, IN)), jnp.float32)
SHARED = jnp.asarray(RNG.normal(size=(BATCH, IN)), jnp.float32)


def random_params(module, *args, seed=0, **kwargs):
    shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def quick_jit(f):
    """One compiled program instead of one per operation, compiled in half the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def apply(module, variables, *args, **kwargs):
    """Positional arguments after the first are static."""
    x, *static = args
    return quick_jit(lambda variables, x: module.apply(variables, x, *static, **kwargs))(variables, x)


def affine(p, x, n):
    return x @ np.asarray(p["kernel"][n]) + np.asarray(p["bias"][n])


@pytest.mark.parametrize("x", [OWN, SHARED], ids=["own", "shared"])
def test_stacked_dense_equals_a_loop(x):
    module = StackedDense(STACK, OUT)
    variables = random_params(module, x)
    out = apply(module, variables, x)
    assert out.shape == (STACK, BATCH, OUT)
    for n in range(STACK):
        row = np.asarray(x if x.ndim == 2 else x[n])
        np.testing.assert_allclose(out[n], affine(variables["params"], row, n), atol=1e-5)
    for index in [(1,), (2, 0)]:
        some = apply(module, variables, x if x.ndim == 2 else x[np.asarray(index)], index)
        np.testing.assert_allclose(some, out[np.asarray(index)], atol=1e-6)
    no_bias = StackedDense(STACK, OUT, use_bias=False)
    assert set(no_bias.init(jax.random.key(0), x)["params"]) == {"kernel"}


def test_a_stack_starts_like_its_members():
    """The variance of a kernel does not know how many kernels are stacked."""
    key = jax.random.key(0, impl="rbg")  # compiles faster
    for stack in (1, 50):
        kernel = quick_jit(StackedDense(stack, 40).init)(key, jnp.zeros((2, 30)))["params"]["kernel"]
        assert kernel.shape == (stack, 30, 40)
        assert abs(np.std(kernel) * np.sqrt(30) - 1) < 0.05  # LeCun: variance 1 / fan-in
        kernel = jax.jit(uniform_fan_in, static_argnums=1)(key, (stack, 30, 40))
        assert 0.98 < np.abs(kernel).max() * np.sqrt(30) <= 1
        assert abs(np.std(kernel) * np.sqrt(3 * 30) - 1) < 0.05
        assert len(np.unique(kernel)) > 0.99 * kernel.size  # copies differ


def test_stacked_mlp_with_layer_norm_equals_a_loop():
    module = StackedMLP(STACK, (6, OUT), norm="layer")
    variables = random_params(module, SHARED)
    out = apply(module, variables, SHARED)
    p = jax.tree.map(np.asarray, variables["params"])
    for n in range(STACK):
        x = np.asarray(SHARED)
        for layer in range(2):
            x = affine(p[f"dense_{layer}"], x, n)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = np.maximum(x * p[f"norm_{layer}"]["scale"][n] + p[f"norm_{layer}"]["bias"][n], 0)
        np.testing.assert_allclose(out[n], x, atol=1e-5)
    np.testing.assert_allclose(apply(module, variables, SHARED, (1,)), out[1:2], atol=1e-6)


def test_stacked_layer_norm_of_some():
    module = StackedLayerNorm(STACK)
    variables = random_params(module, OWN)
    np.testing.assert_allclose(apply(module, variables, OWN[1:2], (1,)), apply(module, variables, OWN)[1:2], atol=1e-6)


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm must be None or 'layer', got 'batch'"):
        StackedMLP(STACK, (3,), norm="batch").init(jax.random.key(0), OWN)


def test_dropout_is_for_training_only():
    module = StackedMLP(STACK, (30,), dropout=0.5)
    variables = random_params(module, OWN)
    still = apply(module, variables, OWN)
    drawn = apply(module, variables, OWN, train=True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(drawn) != 0
    np.testing.assert_allclose(drawn[kept], 2 * still[kept], rtol=1e-6)
    assert 0.35 < kept[np.asarray(still) > 0].mean() < 0.65


HEADS = {"a": 1, "b": 3, "c": 1}


@pytest.mark.parametrize("hidden", [(6,), ()], ids=["tower", "linear"])
@pytest.mark.parametrize("z", [OWN, SHARED], ids=["own", "shared"])
def test_task_heads_equal_a_loop(z, hidden):
    module = TaskHeads(HEADS, hidden)
    variables = random_params(module, z)
    outputs = apply(module, variables, z)
    assert list(outputs) == list(HEADS)
    p = variables["params"]
    for k, (name, size) in enumerate(HEADS.items()):
        x = np.asarray(z if z.ndim == 2 else z[k])
        if hidden:
            x = np.maximum(affine(p["tower"]["dense_0"], x, k), 0)
        same_size = [other for other in HEADS if HEADS[other] == size]
        expected = affine(p[f"out_{size}"], x, same_size.index(name))
        expected = expected[:, 0] if size == 1 else expected
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, atol=1e-5)
        one = apply(module, variables, z if z.ndim == 2 else z[k : k + 1], task=name)
        assert list(one) == [name]
        np.testing.assert_allclose(one[name], outputs[name], atol=1e-6)


@pytest.mark.parametrize("task", HEADS)
def test_parameters_do_not_depend_on_the_task_asked_for(task):
    module = TaskHeads(HEADS, (6,))
    all_tasks = jax.eval_shape(module.init, jax.random.key(0), OWN)
    assert jax.eval_shape(lambda key: module.init(key, OWN[:1], task=task), jax.random.key(0)) == all_tasks


def test_unknown_task():
    assert task_index(HEADS, "c") == 2 and task_index(HEADS, None) is None
    with pytest.raises(ValueError, match="task='d' is not one of the model's tasks: a, b, c"):
        task_index(HEADS, "d")
    with pytest.raises(ValueError, match="task='d' is not one"):
        TaskHeads(HEADS).init(jax.random.key(0), OWN, task="d")


def test_heads_do_not_unroll_over_tasks():
    def operations(num_tasks):
        module = TaskHeads({f"task_{k}": 1 for k in range(num_tasks)})
        variables = jax.eval_shape(module.init, jax.random.key(0), SHARED)
        return str(jax.make_jaxpr(module.apply)(variables, SHARED)).count("dot_general")

    assert operations(2) == operations(20) == 2
