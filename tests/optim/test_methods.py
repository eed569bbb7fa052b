"""The battery that every method passes. The table of methods and the properties that are measured: properties.py.

Accuracy against exact solutions is in test_degenerate.py, what a method computes in the tests of its file.
Letters: K tasks; g_k rows of the Jacobian J, n_k their norms; d the update.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mtjax
from mtjax import optim

from . import properties
from .properties import METHODS, TABLE, K, method_of

# One method of every file of mtjax/optim, or two where a file holds two ideas.
KINDS = (
    "linear",
    "uncertainty",
    "stch",
    "famo",
    "mgda",
    "pcgrad",
    "cagrad",
    "fairgrad",
    "aligned_mtl",
    "config",
    "upgrad",
)
KINDS += ("pcd", "krum", "gradnorm", "rgw", "cr_mogm", "epo", "modo", "auto_lambda", "graddrop", "moco", "excess_mtl")
KINDS += ("momentum_config", "dual_proj")
# Of those, one of every way to get at weights: none, from losses, by each solver, at random, from what it remembers.
FEW = ("linear", "famo", "mgda", "pcgrad", "cagrad", "fairgrad", "upgrad", "epo", "gradnorm", "auto_lambda", "moco")


def of_methods(names, among=METHODS):
    """Parametrised by names of methods; other settings of a method that is there anyway only with `-m slow`.

    For what compiles programs of its own for every method, only methods `among` these; the others with `-m slow`.
    """
    slow = [("(" in name) or (name not in among) for name in names]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if s else name for name, s in zip(names, slow, strict=True)]
    )


EVERY = of_methods(TABLE)
# The published rate of its inner loop does not converge (see there): rounding grows in twenty steps.
TOLERANCE = {"sdmgrad": 1e-3}
# Random numbers are drawn for all K tasks, so three tasks see others than four of which one is left out; weights by
# position are another rule for other positions.
DRAWN = ("rlw", "rgw", "pcgrad", "gradvac", "linear(given)", "pmtl", "pcgrad(reduction='mean')")
# They outvote a bad row by design, or look at it when it is its turn.
ROBUST = ("krum", "krum(1)", "trimmed_mean", "momentum_config")
BATCH = 8 * properties.N


def run(name, rows, losses):
    """(directions [n, P], states) as float64; padded to the one batch size that `properties` compiles."""
    rows, losses = (np.asarray(array, np.float32) for array in (rows, losses))
    padded = [np.resize(array, (BATCH, *array.shape[1:])) for array in (rows, losses)]
    directions, states = properties.updater(name)(*map(jnp.asarray, padded))
    return np.asarray(directions, np.float64)[: len(rows)], jax.tree.map(lambda leaf: leaf[: len(rows)], states)


def random_rows(seed, num_tasks=K, num_params=6):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return jnp.asarray(rows, jnp.float32), jnp.asarray(rng.uniform(0.2, 3.0, num_tasks), jnp.float32)


def assert_directions_close(ours, reference, rows, tolerance=1e-4, weights=1.0):
    """Within `tolerance` of sum_k |w_k| n_k and of |d|: what cancels in d has been rounded at that size."""
    size = np.sum(np.abs(weights) * np.linalg.norm(np.asarray(rows, np.float64), axis=-1))
    size = max(size, np.linalg.norm(np.asarray(reference, np.float64)))
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * size + 1e-37)


# What the table says.


@functools.cache
def written():
    """name -> the cells of its line in PROPERTIES.md."""
    lines = properties.TABLE_FILE.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {line[0].strip("`"): line[1:] for line in cells}


@of_methods(TABLE, KINDS)
def test_properties_are_those_of_the_table(name):
    measured = ["✓" if holds else "✗" for holds in properties.measured(name).values()]
    assert written()[name] == [properties.needs(name), properties.state_size(name), *measured], (
        "run python tests/optim/properties.py, and look at what it changes"
    )


def test_the_table_holds_every_method():
    assert list(written()) == list(TABLE)
    wrappers = {"on_shared", "per_group", "at_representation", "every", "ema", "cr_mogm", "clip_weights", "nonfinite"}
    others = {"single", "norm_balance", "init", "diagnostics", "observe", "observes", "split_batch"}
    others |= {"from_weighting", "from_combination", "hypervolume", "hypervolume_weights", "preference_vectors"}
    others |= {"value_and_set_update", "value_and_hypervolume_update", "task_affinity", "group_tasks"}
    others |= {"sampling_probabilities", "rotations", *properties.ROUTE_ONLY}
    public = {name for name in optim.__all__ if re.fullmatch("[a-z_]+", name)}
    assert public - wrappers - others <= set(METHODS), "a method that the battery does not know"


@EVERY
def test_weights_are_those_of_the_update(name):
    s = properties.samples()
    directions, states = run(name, s.generic, s.losses)
    weights = np.asarray(states.weights, np.float64)
    if np.isnan(weights).all():
        pytest.skip("its update is no weighted sum of the rows")
    for rows, direction, w in zip(s.generic, directions, weights, strict=True):
        assert_directions_close(direction, w @ rows, rows, 1e-5, w)


# Inputs that break solvers.

BASE = np.random.default_rng(0).normal(size=(K, 6))
DEGENERATE = {
    "a zero row": BASE * np.array([[1.0], [0.0], [1.0], [1.0]]),
    "all zero": 0 * BASE,
    "identical rows": np.repeat(BASE[:1], K, axis=0),
    "opposite rows": BASE[:1] * np.array([[1.0], [-1.0], [1.0], [-1.0]]),
    "opposite, 1 to 3": BASE[:1] * np.array([[1.0], [-3.0], [1.0], [-3.0]]),
    "collinear rows": BASE[:1] * np.array([[1.0], [2.0], [0.5], [7.0]]),
    "rank one less": np.concatenate([BASE[:3], BASE[:1] - BASE[1:2]]),
    "stationary": np.concatenate([BASE[:3], -BASE[:3].sum(0, keepdims=True)]),
    "one parameter": BASE * np.eye(6)[:1],
    "row norms 1e-8 to 1e8": BASE * 10.0 ** np.array([[-8.0], [0.0], [3.0], [8.0]]),
    "scale 1e-10": 1e-10 * BASE,
    "scale 1e10": 1e10 * BASE,
}


@EVERY
def test_degenerate_gradients_give_finite_updates(name):
    losses = np.tile([1.0, 0.5, 2.0, 0.1], (len(DEGENERATE), 1))
    directions, states = run(name, np.stack(list(DEGENERATE.values())), losses)
    for index, (case, rows) in enumerate(DEGENERATE.items()):
        assert np.isfinite(directions[index]).all(), case
        for leaf in jax.tree.leaves(states.inner):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert np.isfinite(leaf[index]).all(), case
        if case == "all zero":
            assert (directions[index] == 0).all()
        assert np.isfinite(rows).all()


@EVERY
def test_losses_of_zero_and_of_any_size_give_finite_updates(name):
    rows = np.stack([BASE] * 4)
    losses = np.array([[0.0, 1.0, 2.0, 0.5], [0.0] * 4, [1e-10, 1.0, 1e10, 3.0], [1e-20] * 4])
    directions, _ = run(name, rows, losses)
    # A loss ratio of 1e20 leaves the range of float32 where a rule divides by losses and multiplies by gradients.
    assert np.isfinite(directions).all()


@EVERY
def test_non_finite_rows_propagate(name):
    """The default policy: a NaN is never turned into a silent other update."""
    rows, losses = random_rows(4)
    directions, _ = run(name, rows.at[0, 0].set(jnp.nan)[None], losses[None])
    assert np.isnan(directions[0, 0]) or name in ROBUST


@of_methods([name for name in TABLE if "linear" not in name and name != "per_group(mgda)"], FEW)
def test_many_tasks(name):
    """K = 64; its own program, whose size does not depend on K: everything is a loop on the device."""
    rows, losses = random_rows(5, num_tasks=64, num_params=40)
    if name not in METHODS:
        pytest.skip("variants are as their methods")
    directions, state = properties.updater(name, 64)(rows[None], losses[None])
    assert state.weights.shape == (1, 64)
    assert jnp.isfinite(directions).all()


# Tasks that are left out.


@of_methods([name for name in METHODS if name not in DRAWN], FEW)
def test_a_dropped_task_might_as_well_not_be_there(name):
    rows, losses = random_rows(6)
    kept = jnp.array([0, 2, 3])
    expected, expected_states = properties.updater(name, 3)(rows[kept][None], losses[kept][None])
    method = optim.nonfinite(method_of(name), "drop_task")
    params = jnp.zeros(6)

    @jax.jit
    def update(rows, losses):
        return method.update(rows, optim.init(method, params, num_tasks=K), params, losses=losses)

    for bad_rows, bad_losses in ((rows.at[1, 2].set(jnp.nan), losses), (rows, losses.at[1].set(jnp.inf))):
        direction, state = update(bad_rows, bad_losses)
        assert_directions_close(direction, expected[0], rows, 1e-3)
        assert state.present.tolist() == [True, False, True, True]
        assert jnp.isnan(state.weights).all() or state.weights[1] == 0
        leaves = [leaf for leaf in jax.tree.leaves(state.inner) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert all(jnp.isfinite(leaf).all() for leaf in leaves), "nothing of the bad row is remembered"
    assert jax.tree.structure(expected_states) == jax.tree.structure(state)


@of_methods(DRAWN, ("rlw", "pcgrad", "pmtl"))
def test_a_dropped_task_has_no_weight_where_random_numbers_are_drawn(name):
    rows, losses = random_rows(6)
    method = optim.nonfinite(method_of(name), "drop_task")
    direction, state = jax.jit(method.update)(rows.at[1].set(jnp.nan), method.init(None), losses=losses)
    assert jnp.isfinite(direction).all() and state.weights[1] == 0 and (state.weights != 0).any()


# jit, mesh, vmap, scan.


@functools.cache
def single_update(name):
    """One update on a mesh of two devices, the parameters split between them; and the number of its traces."""
    method, traces = method_of(name), []
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    params = jax.device_put(jnp.zeros(6), jax.NamedSharding(mesh, jax.P("fsdp")))

    @jax.jit
    def update(rows, state, losses):
        traces.append(name)
        return method.update(rows, state, params, losses=losses)

    def put(rows, state, losses):
        everywhere = jax.NamedSharding(mesh, jax.P())
        rows = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(None, "fsdp")))

        def split(leaf):  # state of the size of the parameters is split like them
            last = "fsdp" if leaf.shape[-1:] == (6,) else None
            return jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), last)) if leaf.ndim else everywhere

        state = jax.tree.map(lambda leaf: jax.device_put(leaf, split(leaf)), state)
        return rows, state, jax.device_put(losses, everywhere)

    return put, update, traces


@of_methods(METHODS, KINDS)
def test_on_a_mesh_and_not_under_vmap_it_is_the_same(name):
    put, update, traces = single_update(name)
    s = properties.samples()
    expected, expected_states = run(name, s.generic[:2], s.losses[:2])
    state = optim.init(method_of(name), jnp.zeros(6), num_tasks=K)
    for index in range(2):
        rows, losses = (jnp.asarray(array[index], jnp.float32) for array in (s.generic, s.losses))
        direction, new = update(*put(rows, state, losses))
        weights = np.nan_to_num(np.asarray(new.weights), nan=1.0)
        assert_directions_close(direction, expected[index], rows, TOLERANCE.get(name, 1e-4), weights)
        np.testing.assert_allclose(new.weights, expected_states.weights[index], rtol=2e-3, atol=1e-4)
    assert len(traces) == 1, "the second call compiles nothing"
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


@of_methods([name for name in METHODS if properties.state_size(name) != "none"], FEW)
def test_a_scan_is_the_loop(name):
    method, steps = method_of(name), 3
    put, update, _ = single_update(name)
    batch = [random_rows(seed) for seed in range(steps)]
    looped, expected = optim.init(method, jnp.zeros(6), num_tasks=K), []
    for rows, losses in batch:
        direction, looped = update(*put(rows, looped, losses))
        expected.append(direction)

    def body(state, inputs):
        direction, state = method.update(inputs[0], state, jnp.zeros(6), losses=inputs[1])
        return state, direction

    inputs = tuple(jnp.stack(part) for part in zip(*batch, strict=True))
    start = optim.init(method, jnp.zeros(6), num_tasks=K)
    final, scanned = jax.jit(lambda state, inputs: jax.lax.scan(body, state, inputs))(start, inputs)
    for ours, reference, (rows, _) in zip(scanned, expected, batch, strict=True):
        assert_directions_close(ours, reference, rows, 1e-3)
    assert jax.tree.structure(final) == jax.tree.structure(looped)


@EVERY
def test_updates_keep_structure_and_dtype(name):
    params = {"b": jnp.ones((2, 3), jnp.bfloat16), "a": (jnp.ones(()), [jnp.ones((4,), jnp.float16)])}
    jacobian = jax.tree.map(lambda p: jax.ShapeDtypeStruct((K, *p.shape), p.dtype), params)
    method = method_of(name)

    def update(jacobian, losses):
        state = optim.init(method, params, num_tasks=K)
        gradient, new = method.update(jacobian, state, params, losses=losses)
        return gradient, new, state

    gradient, new, state = jax.eval_shape(update, jacobian, jax.ShapeDtypeStruct((K,), jnp.float32))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(gradient) == shapes(params)
    assert shapes(new) == shapes(state)
    assert new.weights.dtype == new.gramian.dtype == jnp.float32


@EVERY
def test_unknown_extra_arguments_are_ignored(name):
    method = method_of(name)

    def update(rows, losses, extra):
        params = jnp.zeros(6)
        return method.update(rows, optim.init(method, params, num_tasks=K), params, losses=losses, value=extra, batch=0)

    assert jax.eval_shape(update, jnp.ones((K, 6)), jnp.ones(K), 1.0)[0].shape == (6,)


# The two routes.

X = jax.random.normal(jax.random.key(0), (12, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, 5)), "heads": jax.random.normal(jax.random.key(2), (5, K))}


def loss_fn(params, x):
    """Positive losses of very different size."""
    outputs = jnp.tanh(x @ params["trunk"]) @ params["heads"]
    return {f"task {k}": 10.0 ** (k - 2) * jnp.mean((outputs[:, k] - 1) ** 2) for k in range(K)}


@of_methods(
    [name for name in METHODS if method_of(name).weighting is not None and method_of(name).route is None], KINDS
)
def test_both_routes_give_the_same_update(name):
    """Contract 4: with and without the Jacobian in memory, step after step. (`on_shared`, chunks: test_routes.py.)"""
    method = method_of(name)

    @jax.jit
    def both(params, state):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, X)
        expected = method.update(jacobian, state, params, losses=losses)
        ours = mtjax.value_and_weighted_grad(loss_fn, method)(params, state, X)
        return ours, expected, jacobian, losses

    params, state = PARAMS, optim.init(method, PARAMS, num_tasks=K)
    for _ in range(2):
        (losses, gradient, weighted_state), (expected, state), jacobian, expected_losses = both(params, state)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        flat = np.concatenate([np.reshape(leaf, (K, -1)) for leaf in jax.tree.leaves(jacobian)], 1)
        size = np.abs(state.weights) @ np.linalg.norm(flat, axis=1)
        for leaf, reference in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, reference, rtol=0, atol=1e-4 * size)
        np.testing.assert_allclose(weighted_state.weights, state.weights, rtol=5e-3, atol=1e-4)
        assert jax.tree.structure(weighted_state) == jax.tree.structure(state)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, expected)


# Checkpoints.


def test_states_come_back_from_a_checkpoint(tmp_path):
    """Every method's state, in one tree, through orbax; and a method that goes on from it goes on as if nothing was."""
    rows, losses = random_rows(8)
    params = jnp.zeros(6)
    states = {}
    for name in METHODS:
        _, state = run(name, rows[None], losses[None])
        states[name] = jax.tree.map(lambda leaf: leaf[0], state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.tree.map(jnp.zeros_like, states))
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    for name in METHODS:
        pairs = zip(jax.tree.leaves(restored[name]), jax.tree.leaves(states[name]), strict=True)
        for pair in pairs:
            is_key = jnp.issubdtype(pair[0].dtype, jax.dtypes.prng_key)
            ours, saved = map(jax.random.key_data, pair) if is_key else pair
            np.testing.assert_array_equal(ours, saved, err_msg=name)
    for name in ("pcgrad", "famo", "moco", "dwa"):
        put, update, _ = single_update(name)
        ours, expected = (update(*put(rows, state[name], losses))[0] for state in (restored, states))
        np.testing.assert_array_equal(ours, expected)
    assert params.shape == (6,)
