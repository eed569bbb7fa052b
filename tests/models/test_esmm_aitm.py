"""ESMM and AITM against loops written from their equations, and what training them on all impressions means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import losses
from mtjax.models.aitm import AITM, calibrator, chain_order
from mtjax.models.esmm import ESMM, joint_logit

BATCH = 5
RNG = np.random.default_rng(0)
DATA = {
    "categorical": jnp.asarray(RNG.integers([3, 2], size=(BATCH, 2)), jnp.int32),
    "numeric": jnp.asarray(RNG.normal(size=(BATCH, 2)), jnp.float32),
}
COLUMNS = dict(cardinalities=(3, 2), num_numeric=2)


def random_variables(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), DATA)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(p, x, i):
    return x @ p["kernel"][i] + p["bias"][i]


def mlp(p, x, i):
    for name in sorted(p):
        x = np.maximum(dense(p[name], x, i), 0)
    return x


def embed(p, row):
    tokens = [p["table"][DATA["categorical"][row, 0]], p["table"][3 + DATA["categorical"][row, 1]]]
    numeric = np.asarray(DATA["numeric"][row])
    return np.concatenate([*tokens, *(numeric[:, None] * p["weight"] + p["bias"])])


ESMM_MODEL = ESMM({"click": 1, "buy": 1}, **COLUMNS, tower=(4, 3), width=2)


@pytest.fixture(scope="module")
def esmm_run():
    model, variables = ESMM_MODEL, random_variables(ESMM_MODEL)
    return variables, *jax.jit(
        lambda v: (
            model.apply(v, DATA, aux=True),
            model.apply(v, DATA, task="click", aux=True),
            model.apply(v, DATA, task="buy"),
            model.apply(v, DATA, method="conversion_given_click"),
        )
    )(variables)


def test_esmm_equals_the_loop(esmm_run):
    variables, (outputs, aux), *_, served = esmm_run
    p = jax.tree.map(np.asarray, variables["params"])
    assert set(outputs) == {"click", "buy"}
    for row in range(BATCH):
        x = embed(p["tokenizer"], row)
        ctr, cvr = (sigmoid(dense(p["heads"]["out_1"], mlp(p["heads"]["tower"], x, k), k)[0]) for k in (0, 1))
        np.testing.assert_allclose(sigmoid(outputs["click"][row]), ctr, rtol=1e-5)
        np.testing.assert_allclose(sigmoid(outputs["buy"][row]), ctr * cvr, rtol=1e-5)
        np.testing.assert_allclose(served[row], cvr, rtol=1e-5)
        np.testing.assert_allclose(sigmoid(aux["conversion_given_click"][row]), cvr, rtol=1e-5)


def test_esmm_one_task(esmm_run):
    _, (outputs, _), (click, aux), buy, _ = esmm_run
    assert list(click) == ["click"] and aux == {} and list(buy) == ["buy"]
    np.testing.assert_allclose(click["click"], outputs["click"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buy["buy"], outputs["buy"], rtol=1e-5, atol=1e-6)


def test_esmm_click_alone_costs_less():
    model = ESMM_MODEL.clone(tower=(64, 64))
    shapes = jax.eval_shape(model.init, jax.random.key(0), DATA)
    whole, click = (
        jax.jit(lambda v, task=task: model.apply(v, DATA, task=task)).lower(shapes).compile().cost_analysis()
        for task in (None, "click")
    )
    assert click["flops"] < 0.6 * whole["flops"]


def test_esmm_conversion_loss_trains_the_click_tower_too(esmm_run):
    """pCTCVR is a product: its loss has a gradient for both towers, the click loss for one."""

    def rows(v):
        out = ESMM_MODEL.apply(v, DATA)
        label = jnp.array([1.0, 0, 0, 1, 0])
        return jnp.stack([jnp.mean(losses.binary_cross_entropy(out[t], label)) for t in ("click", "buy")])

    bias = jax.jit(jax.jacrev(rows))(esmm_run[0])["params"]["heads"]["out_1"]["bias"]
    np.testing.assert_array_equal(np.abs(bias[..., 0]) > 0, [[True, False], [True, True]])


def test_esmm_joint_logit_is_exact_where_a_product_of_probabilities_is_not():
    a = jnp.array([0.3, -90.0, 100.0, 200.0, 100.0, -200.0])
    b = jnp.array([-1.2, -80.0, 100.0, 50.0, -100.0, -200.0])
    expected = [np.log(1 / (1 / (sigmoid(0.3) * sigmoid(-1.2)) - 1)), -170, 100 - np.log(2), 50, -100, -400]
    np.testing.assert_allclose(joint_logit(a, b), expected, rtol=1e-5)
    gradient = jax.vmap(jax.grad(joint_logit, argnums=(0, 1)))(a, b)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[0][-1], 1.0)  # far down, logit(p q) = a + b


def test_esmm_wrong_tasks_are_refused():
    for heads in ({"click": 1}, {"click": 1, "buy": 3}):
        with pytest.raises(ValueError, match="ESMM needs two binary tasks"):
            ESMM_MODEL.clone(heads=heads).init(jax.random.key(0), DATA)
    with pytest.raises(ValueError, match="task='x' is not one of the model's tasks: click, buy"):
        ESMM_MODEL.init(jax.random.key(0), DATA, task="x")


CHAIN_HEADS = {"buy": 1, "click": 1, "view": 1}
ORDER = ("view", "click", "buy")
CHAIN = AITM(CHAIN_HEADS, **COLUMNS, order=ORDER, features=(4, 3), width=2)
VARIANTS = {
    "paper": CHAIN,
    "own_maps_linear_g_with_towers": CHAIN.clone(shared_maps=False, transfer_activation=lambda x: x, tower=(3,)),
}


def aitm_loop(model, p, row):
    """The equations of the module's docstring, in the chain's order: logits and transfer weights."""
    x, k = embed(p["tokenizer"], row), 3
    q = [mlp(p["towers"], x, t) for t in range(3)]
    z, transfer = [q[0]], []
    for t in (1, 2):
        handed_on = np.asarray(model.transfer_activation(z[-1] @ p["g_kernel"][t - 1] + p["g_bias"][t - 1]))
        maps = p["h"][0 if model.shared_maps else t - 1]
        h1, h2, h3 = maps[:, :k], maps[:, k : 2 * k], maps[:, 2 * k :]
        logits = [(u @ h2) @ (u @ h3) / np.sqrt(k) for u in (handed_on, q[t])]
        w = np.exp(logits) / np.exp(logits).sum()
        z.append(w[0] * (handed_on @ h1) + w[1] * (q[t] @ h1))
        transfer.append(w[0])
    if model.tower:
        z = [mlp(p["heads"]["tower"], z[t], t) for t in range(3)]
    return [dense(p["heads"]["out_1"], z[t], t)[0] for t in range(3)], transfer


@pytest.mark.parametrize("name", VARIANTS)
def test_aitm_equals_the_loop_and_tasks_alone_agree(name):
    model = VARIANTS[name]
    variables = random_variables(model)
    (outputs, aux), alone = jax.jit(
        lambda v: (
            model.apply(v, DATA, aux=True),
            {t: model.apply(v, DATA, task=t) for t in ORDER},
        )
    )(variables)
    p = jax.tree.map(np.asarray, variables["params"])
    assert set(outputs) == set(CHAIN_HEADS)
    for row in range(BATCH):
        logits, transfer = aitm_loop(model, p, row)
        for t, task in enumerate(ORDER):
            np.testing.assert_allclose(outputs[task][row], logits[t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(aux["transfer"][:, row], transfer, rtol=1e-4)
    for task in ORDER:
        assert list(alone[task]) == [task]
        np.testing.assert_allclose(alone[task][task], outputs[task], rtol=1e-5, atol=1e-5)


def test_aitm_a_task_depends_on_itself_and_on_earlier_ones_only():
    model = CHAIN.clone(activation=jnp.tanh, transfer_activation=jnp.tanh)
    variables = random_variables(model)
    rows = jax.jit(jax.jacrev(lambda v: jnp.stack([jnp.sum(model.apply(v, DATA)[task]) for task in ORDER])))(variables)[
        "params"
    ]["towers"]["dense_0"]["kernel"]
    np.testing.assert_array_equal(np.abs(rows).max((2, 3)) > 0, np.tril(np.ones((3, 3), bool)))


def test_aitm_earlier_tasks_cost_less():
    model = CHAIN.clone(features=(64, 64))
    shapes = jax.eval_shape(model.init, jax.random.key(0), DATA)
    flops = [
        jax.jit(lambda v, task=task: model.apply(v, DATA, task=task)).lower(shapes).compile().cost_analysis()["flops"]
        for task in ("view", None)
    ]
    assert flops[0] < 0.35 * flops[1]


def test_aitm_dropout_and_seeds():
    model = CHAIN.clone(dropout=0.4)
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_variables(model, s) for s in (0, 1)))
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(
        jax.vmap(
            lambda v, key: (
                model.apply(v, DATA)["buy"],
                model.apply(v, DATA, train=True, rngs={"dropout": key})["buy"],
            )
        )
    )
    still, dropped = run(variables, keys)
    assert still.shape == (2, BATCH) and not np.allclose(still[0], still[1])
    assert not np.allclose(still, dropped) and np.all(np.isfinite(dropped))


def test_aitm_calibrator_penalises_rising_probabilities_only():
    outputs = {"buy": jnp.array([2.0, -1.0, 5.0]), "view": jnp.array([1.0, 0.0, 0.0])}
    weight = jnp.array([1.0, 1.0, 0.0])
    excess = sigmoid(2.0) - sigmoid(1.0)  # the second row falls, the third does not count
    loss = calibrator(outputs, ("view", "buy"), alpha=0.5, weight=weight)
    assert list(loss) == ["view", "buy"] and loss["view"] == 0
    np.testing.assert_allclose(loss["buy"], 0.5 * excess / 2, rtol=1e-5)
    gradient = jax.grad(lambda o: calibrator(o, ("view", "buy"))["buy"])(outputs)
    assert gradient["buy"][0] > 0 > gradient["view"][0] and gradient["buy"][1] == 0
    assert calibrator(outputs, ("view", "buy"), weight=jnp.zeros(3))["buy"] == 0


def test_aitm_wrong_chains_are_refused():
    with pytest.raises(ValueError, match="AITM needs a chain of two or more binary tasks"):
        chain_order({"click": 1})
    with pytest.raises(ValueError, match=r"order must name every task once \(a, b\), got a, a"):
        chain_order({"a": 1, "b": 1}, ("a", "a"))
    with pytest.raises(ValueError, match="task='x' is not one of the model's tasks: view, click, buy"):
        CHAIN.init(jax.random.key(0), DATA, task="x")
