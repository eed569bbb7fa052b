"""MIONet: products, sums and concatenations of branches by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.mionet import MergedBranches, mionet
from mtjax.nn.operator_layers import CNN, MLP

B, N, P = 3, 5, 4
RNG = np.random.default_rng(0)
BATCH = {
    "inputs": {
        "source": jnp.asarray(RNG.normal(size=(B, 6)), jnp.float32),
        "initial": jnp.asarray(RNG.normal(size=(B, 7)), jnp.float32),
    },
    "points": jnp.asarray(RNG.normal(size=(N, 2)), jnp.float32),
}


def net(width):
    return MLP((3, width), nn.tanh)


def random_params(model, batch):
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize("merge", ["mul", "add", "cat"])
def test_merge_by_hand(merge):
    merger = MLP((P,)) if merge == "cat" else None
    model = mionet({"source": net(P), "initial": net(P)}, net(P), merge=merge, merger=merger)
    params = random_params(model, BATCH)
    p = params["params"]
    assert set(p["branch"]) == {"branches_source", "branches_initial", *(["merger"] if merger else [])}
    one, two = (
        np.asarray(net(P).apply({"params": p["branch"][f"branches_{name}"]}, BATCH["inputs"][name]))
        for name in ("source", "initial")
    )
    trunk = np.asarray(net(P).apply({"params": p["trunk"]}, BATCH["points"]))
    if merge == "mul":
        field = np.einsum("bp,bp,np->bn", one, two, trunk)
    elif merge == "add":
        field = np.einsum("bp,np->bn", one + two, trunk)
    else:
        out = jax.tree.map(np.asarray, p["branch"]["merger"]["out"])
        field = (np.concatenate([one, two], axis=1) @ out["kernel"] + out["bias"]) @ trunk.T
    u = jax.jit(model.apply)(params, BATCH)["u"]
    np.testing.assert_allclose(u, field + np.asarray(p["bias"]), rtol=1e-4, atol=1e-4)


def test_the_product_is_symmetric_in_its_branches_and_linear_in_each():
    model = mionet({"source": net(P), "initial": net(P)}, net(P), use_bias=False)
    params = random_params(model, BATCH)
    u = model.apply(params, BATCH)["u"]
    last = params["params"]["branch"]["branches_source"]["out"]
    params["params"]["branch"]["branches_source"]["out"] = jax.tree.map(lambda leaf: 3 * leaf, last)
    np.testing.assert_allclose(model.apply(params, BATCH)["u"], 3 * u, rtol=1e-5, atol=1e-5)


def test_branches_of_different_kinds():
    batch = {
        "inputs": {"image": jnp.zeros((B, 8, 8, 1)), "code": jnp.zeros((B, 2))},
        "points": jnp.zeros((B, N, 2)),
    }
    model = mionet({"image": CNN((2,), net(P)), "code": net(P)}, net(P), num_outputs=2, strategy="split_trunk")
    model = model.clone(trunk=net(2 * P))
    assert jax.eval_shape(model.init_with_output, jax.random.key(0), batch)[0]["u"].shape == (B, N, 2)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: MergedBranches({"a": net(P)}, "max"), "merge must be one of mul, add, cat, got 'max'"),
        (lambda: MergedBranches({}), "branches is empty"),
        (
            lambda: run({"source": net(P), "initial": net(P + 1)}),
            "got {'source': 4, 'initial': 5}",
        ),
        (lambda: run({"source": net(P), "boundary": net(P)}), "inputs lack 'boundary'"),
    ],
)
def test_wrong_arguments(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def run(branches):
    return jax.eval_shape(mionet(branches, net(P)).init, jax.random.key(0), BATCH)
