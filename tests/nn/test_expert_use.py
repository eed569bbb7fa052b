"""Expert-use statistics against numbers worked out by hand, a numpy loop, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.expert_use import ablation_utility, expert_use, linear_cka
from mtjax.nn.experts import ExpertLayout, GatedExperts

use_of = jax.jit(expert_use, static_argnums=2)


def entropy(p):
    return -sum(x * np.log(x) for x in np.ravel(p) if x > 0)


@pytest.fixture(scope="module")
def ple_like():
    """2 tasks with one expert each, one shared expert, a shared stream; random gates over what is visible."""
    layout = ExpertLayout(
        [[1, 0, 1], [0, 1, 1], [1, 1, 1]], expert_owner=(0, 1, None), shared_output=2, gate_stream=(0, 0, 0)
    )
    rng = np.random.default_rng(0)
    gates = rng.random((3, 5, 3)) * np.asarray(layout.visible)[:, None]
    experts = np.maximum(rng.normal(size=(3, 5, 4)), 0)
    experts[:, :, 0] += 0.1  # some outputs are 0, no whole vector is
    return layout, (gates / gates.sum(-1, keepdims=True)).astype(np.float32), experts.astype(np.float32)


def test_every_statistic_equals_a_loop(ple_like):
    layout, gates, experts = ple_like
    use = use_of(gates, experts, layout)
    readers, batch, pool = gates.shape
    norm = np.sqrt((experts**2).sum(-1))  # [E, B]
    mean_gate = gates.mean(1)
    for m in range(readers):
        share = np.zeros(pool)
        for b in range(batch):
            parts = [gates[m, b, e] * norm[e, b] for e in range(pool)]
            share += np.array(parts) / sum(parts) / batch
        np.testing.assert_allclose(use.contribution[m], share, rtol=1e-5, atol=1e-7)
        seen = sum(layout.visible[m])
        np.testing.assert_allclose(use.entropy[m], entropy(mean_gate[m]) / np.log(seen), rtol=1e-5)
        by_example = np.mean([entropy(gates[m, b]) for b in range(batch)])
        np.testing.assert_allclose(use.example_entropy[m], by_example / np.log(seen), rtol=1e-5)
        np.testing.assert_allclose(use.effective_experts[m], np.exp(entropy(mean_gate[m])), rtol=1e-5)
        for n in range(readers):
            middle = (mean_gate[m] + mean_gate[n]) / 2
            js = entropy(middle) - (entropy(mean_gate[m]) + entropy(mean_gate[n])) / 2
            np.testing.assert_allclose(use.gate_divergence[m, n], js / np.log(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(use.importance, mean_gate, rtol=1e-5, atol=1e-7)
    load = mean_gate.sum(0)
    np.testing.assert_allclose(use.load_cv2, load.var() / load.mean() ** 2, rtol=1e-4)
    # Expert 2 is seen by both tasks (the shared stream does not count), experts 0 and 1 by one each.
    owners = mean_gate[:2, 2] / mean_gate[:2, 2].sum()
    np.testing.assert_allclose(use.degeneration, [1, 1, 1 - entropy(owners) / np.log(2)], rtol=1e-4)
    # One own expert of two visible ones: a fair share is a half. The shared stream owns none.
    np.testing.assert_allclose(use.reliance, [mean_gate[0, 0] * 2, mean_gate[1, 1] * 2, 0], rtol=1e-5)
    np.testing.assert_allclose(use.zero_rate, (experts == 0).mean((1, 2)), rtol=1e-5)
    scale, centre = experts.std((1, 2)), np.abs(experts.mean((1, 2)))
    np.testing.assert_allclose(use.scale_dispersion, scale.max() / scale.min(), rtol=1e-4)
    np.testing.assert_allclose(use.mean_dispersion, centre.max() / centre.min(), rtol=1e-4)
    for e in range(pool):
        for f in range(pool):
            cosines = [abs(experts[e, b] @ experts[f, b]) / (norm[e, b] * norm[f, b]) for b in range(batch)]
            np.testing.assert_allclose(use.redundancy[e, f], np.mean(cosines), rtol=1e-4)


def test_hand_computed_numbers():
    """Two tasks, four experts; the mean gates are written down."""
    layout = ExpertLayout(np.ones((2, 4)), expert_owner=(0, 1, None, None))
    gates = np.array([[[0.5, 0.5, 0, 0]] * 2, [[0, 0.5, 0.5, 0]] * 2], np.float32)
    experts = np.zeros((4, 2, 2), np.float32)
    experts[:, :, 0] = np.array([[3], [1], [1], [0]])
    use = use_of(gates, experts, layout)
    np.testing.assert_allclose(use.entropy, [0.5, 0.5], rtol=1e-6)  # log 2 / log 4
    np.testing.assert_allclose(use.effective_experts, [2, 2], rtol=1e-6)
    np.testing.assert_allclose(use.contribution, [[0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_array_equal(use.dead, [0, 0, 0, 1])
    np.testing.assert_allclose(use.degeneration, [1, 0, 1, 0], atol=1e-6)  # one task; both alike; one; none
    np.testing.assert_allclose(use.reliance, [2, 2], rtol=1e-6)  # a half, where a quarter is fair
    np.testing.assert_allclose(use.load_cv2, 0.5, rtol=1e-6)  # loads 0.5, 1, 0.5, 0: variance 0.125, mean 0.5
    np.testing.assert_allclose(use.gate_divergence[0, 1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(use.zero_rate, [0.5, 0.5, 0.5, 1], rtol=1e-6)
    assert np.isinf(use.scale_dispersion) and np.isinf(use.mean_dispersion)  # the last expert is constant


def test_uniform_and_disjoint_gates_are_the_limits():
    layout = ExpertLayout(np.ones((2, 4)))
    experts = jnp.ones((4, 3, 2))
    uniform = use_of(jnp.full((2, 3, 4), 0.25), experts, layout)
    np.testing.assert_allclose(uniform.entropy, 1, rtol=1e-6)
    np.testing.assert_allclose(uniform.example_entropy, 1, rtol=1e-6)
    np.testing.assert_allclose(uniform.effective_experts, 4, rtol=1e-5)
    np.testing.assert_allclose(uniform.degeneration, 0, atol=1e-6)
    np.testing.assert_allclose([uniform.load_cv2, *uniform.gate_divergence.ravel()], 0, atol=1e-6)
    np.testing.assert_allclose([uniform.scale_dispersion, uniform.mean_dispersion], 1)
    np.testing.assert_allclose(uniform.redundancy, 1, rtol=1e-6)

    onehot = np.zeros((2, 3, 4), np.float32)
    onehot[0, :, 0] = onehot[1, :, 1] = 1
    disjoint = use_of(onehot, experts, layout)
    np.testing.assert_allclose(disjoint.entropy, 0, atol=1e-6)
    np.testing.assert_allclose(disjoint.degeneration, [1, 1, 0, 0])
    np.testing.assert_allclose(disjoint.gate_divergence, 1 - np.eye(2), atol=1e-6)
    np.testing.assert_array_equal(disjoint.dead, [0, 0, 1, 1])

    # Gates that use all experts alike on average but one per example: only the example's entropy sees it.
    routed = np.stack([np.eye(4, dtype=np.float32)] * 2)
    use = use_of(routed, jnp.ones((4, 4, 2)), layout)
    np.testing.assert_allclose(use.entropy - use.example_entropy, 1, rtol=1e-6)


def test_padding_rows_do_not_count_and_residuals_do(ple_like):
    layout, gates, experts = ple_like
    alone = use_of(gates[:, :3], experts[:, :3], layout)
    padded = use_of(gates, experts, layout, sample_weight=jnp.array([1.0, 1, 1, 0, 0]))
    for name, value in alone._asdict().items():
        np.testing.assert_allclose(getattr(padded, name), value, rtol=1e-5, atol=1e-6, err_msg=name)
    residual = np.zeros_like(gates)
    residual[0, :, 0] = 1
    plain, added = (use_of(gates, experts, layout, weights=gates + r) for r in (0 * residual, residual))
    np.testing.assert_array_equal(added.importance, plain.importance)
    assert added.contribution[0, 0] > plain.contribution[0, 0]


def test_one_expert_and_one_reader():
    use = use_of(jnp.ones((1, 3, 1)), jnp.ones((1, 3, 2)), ExpertLayout([[1]], expert_owner=(0,)))
    values = jnp.concatenate([jnp.ravel(leaf) for leaf in use])
    assert np.all(np.isfinite(values))
    np.testing.assert_allclose([use.entropy[0], use.effective_experts[0], use.reliance[0]], [0, 1, 1])


def test_gradients_are_finite_with_a_dead_expert_and_sizes_are_checked(ple_like):
    layout, gates, experts = ple_like
    experts = jnp.asarray(experts).at[0].set(0.0)

    def total(gates, experts):
        use = expert_use(gates, experts, layout)
        return use.load_cv2 + sum(jnp.sum(x) for x in (use.contribution, use.entropy, use.redundancy))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(gates, experts)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    with pytest.raises(ValueError, match="do not fit"):
        expert_use(gates[:2], experts, layout)


def test_linear_cka_is_one_up_to_rotation_and_small_for_independent_experts():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    cka = linear_cka(jnp.asarray(np.stack([x, 2 * x @ rotation + 1, y, np.ones_like(x)]), jnp.float32))
    np.testing.assert_allclose(cka[0, :2], 1, rtol=1e-4)
    assert cka[0, 2] < 0.05
    np.testing.assert_array_equal(cka[3], 0)


def test_ablation_utility_is_the_loss_increase_expert_by_expert():
    layer = GatedExperts(ExpertLayout(np.ones((2, 3))), (4,))
    x = jax.random.normal(jax.random.key(1), (6, 3))
    params = layer.init(jax.random.key(0), x)

    @jax.jit
    def losses(mask):
        z = layer.apply(params, x, expert_mask=mask).z
        return {"a": jnp.mean(jnp.square(z[0] - 1)), "b": jnp.mean(jnp.square(z[1]))}

    utility = jax.jit(lambda: ablation_utility(losses, 3))()
    for e in range(3):
        mask = np.arange(3) != e
        for name, full in losses(np.ones(3, bool)).items():
            np.testing.assert_allclose(utility[name][e], losses(mask)[name] - full, rtol=1e-4, atol=1e-6)
