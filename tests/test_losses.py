"""Losses against hand-worked values and slow loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.losses import (
    cross_entropy,
    global_entropy_loss,
    importance_loss,
    kl_divergence,
    load_balancing_loss,
    load_fractions,
    load_loss,
    masked_mean,
    router_entropy_loss,
    router_z_loss,
    sum_over_groups,
)
from moe_jax.routing import RULES, route

RULE = RULES["softmax_top_k"]
ROUTER_LOSSES = (
    load_balancing_loss,
    importance_loss,
    load_loss,
    router_entropy_loss,
    global_entropy_loss,
    router_z_loss,
)


@partial(jax.jit, static_argnums=1)
def stats_of(logits, num_choices=2):
    return route(jnp.asarray(logits, jnp.float32), RULE, num_choices=num_choices).stats


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def test_balance_loss_by_hand():
    # Two tokens, both to expert 0 with probabilities (.8, .2) and (.6, .4): f = (1, 0), P = (.7, .3), 2 * .7 = 1.4.
    stats = stats_of(np.log([[0.8, 0.2], [0.6, 0.4]]), 1)
    np.testing.assert_allclose(load_balancing_loss(stats), 1.4, rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_num_experts_when_collapsed():
    # Uniform probabilities give P = 1/E and so 1, whatever f; one certain expert gives f = P = onehot and so E.
    np.testing.assert_allclose(load_balancing_loss(stats_of(np.zeros((8, 4)))), 1.0, rtol=1e-6)
    collapsed = stats_of(np.tile([50.0, 0, 0, 0], (8, 1)), 1)
    np.testing.assert_allclose(load_balancing_loss(collapsed), 4.0, rtol=1e-6)


def test_balance_loss_equals_the_loop_per_layer():
    logits = np.random.default_rng(0).normal(size=(2, 30, 5))
    stats = jax.vmap(lambda x: stats_of(x))(jnp.asarray(logits))
    for layer in range(2):
        p = np.exp(logits[layer]) / np.exp(logits[layer]).sum(-1, keepdims=True)
        f = np.zeros(5)
        for row in p:
            for e in np.argsort(-row)[:2]:
                f[e] += 1 / 60
        expected = 5 * sum(f[e] * p[:, e].mean() for e in range(5))
        np.testing.assert_allclose(load_balancing_loss(stats)[layer], expected, rtol=1e-5)


def test_statistics_of_parts_add_up_to_the_whole_batch():
    logits = np.random.default_rng(1).normal(size=(24, 5))
    whole = stats_of(logits)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        add(stats_of(logits[:9]), stats_of(logits[9:])),
        whole,
    )


def test_balance_gradient_flows_through_probabilities_only():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(9, 4)), jnp.float32)
    fractions = load_fractions(stats_of(logits))

    def by_hand(z):  # f held constant
        return 4 * jnp.sum(fractions * jax.nn.softmax(z).mean(0))

    gradient = jax.grad(lambda z: load_balancing_loss(stats_of(z)))(logits)
    np.testing.assert_allclose(gradient, jax.grad(by_hand)(logits), atol=1e-7)
    assert jnp.abs(gradient).max() > 1e-3


def losses_loop(logits, mask, num_choices):
    """Every router loss of the unmasked rows of `logits [T, E]` with softmax top-k, token by token."""
    num_experts = logits.shape[1]
    chosen, gates, prob_sums = (np.zeros(num_experts) for _ in range(3))
    entropy = z = tokens = 0.0
    for row in logits[mask].astype(np.float64):
        p = np.exp(row) / np.exp(row).sum()
        tokens += 1
        entropy -= sum(x * np.log(x) for x in p)
        z += np.log(np.exp(row).sum()) ** 2
        for e in range(num_experts):
            prob_sums[e] += p[e]
        for e in np.argsort(-p)[:num_choices]:
            chosen[e] += 1
            gates[e] += p[e]
    mean_p = prob_sums / tokens
    return {
        load_balancing_loss: num_experts * sum(chosen[e] / chosen.sum() * mean_p[e] for e in range(num_experts)),
        importance_loss: (np.std(gates) / np.mean(gates)) ** 2,
        load_loss: (np.std(chosen) / np.mean(chosen)) ** 2,
        router_entropy_loss: entropy / tokens,
        global_entropy_loss: np.log(num_experts) + sum(x * np.log(x) for x in mean_p),
        router_z_loss: z / tokens,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loss", ROUTER_LOSSES, ids=lambda loss: loss.__name__)
def test_router_losses_equal_the_loop(loss, dtype):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(40, 5)) * 2, dtype)
    mask = np.random.default_rng(4).random(40) < 0.7
    stats = jax.jit(lambda z: route(z, RULE, num_choices=2, token_mask=jnp.asarray(mask)).stats)(logits)
    assert loss(stats).dtype == jnp.float32
    np.testing.assert_allclose(loss(stats), losses_loop(np.asarray(logits, np.float32), mask, 2)[loss], rtol=2e-5)


def test_variation_and_entropy_by_hand():
    # Two tokens, K = 1, probabilities (.8, .2) and (.4, .6): gates sum to (.8, .6), mean .7, variance .01, so
    # CV^2 = .01 / .49; each expert is chosen once. Mean probabilities (.6, .4).
    stats = stats_of(np.log([[0.8, 0.2], [0.4, 0.6]]), 1)
    entropy = lambda *p: -sum(x * np.log(x) for x in p)  # noqa: E731
    np.testing.assert_allclose(importance_loss(stats), 0.01 / 0.49, rtol=1e-5)
    assert load_loss(stats) == 0
    np.testing.assert_allclose(router_entropy_loss(stats), (entropy(0.8, 0.2) + entropy(0.4, 0.6)) / 2, rtol=1e-5)
    np.testing.assert_allclose(global_entropy_loss(stats), np.log(2) - entropy(0.6, 0.4), rtol=1e-4)


def test_losses_at_total_collapse():
    # All eight tokens are sure of one of E = 4 experts: CV^2 = ((4 - 1)^2 + 3) / 4 = 3, and the entropies are 0.
    collapsed = stats_of(np.tile([90.0, 0, 0, 0], (8, 1)), 1)
    found = [float(loss(collapsed)) for loss in (importance_loss, load_loss, router_entropy_loss, global_entropy_loss)]
    np.testing.assert_allclose(found, [3, 3, 0, np.log(4)], atol=1e-5)


@pytest.mark.parametrize("loss", ROUTER_LOSSES, ids=lambda loss: loss.__name__)
def test_gradients_are_finite_at_perfect_balance_and_without_tokens(loss):
    """At equal importances the standard deviation has no slope; its square has slope 0."""
    equal = jnp.asarray(np.log(2) * np.eye(4), jnp.float32)  # four tokens, each to an expert of its own
    value_and_gradient = jax.jit(jax.value_and_grad(lambda z, mask: loss(route(z, RULE, num_choices=1, **mask).stats)))
    value, gradient = value_and_gradient(equal, {})
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if loss in (importance_loss, load_loss, global_entropy_loss):
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    value, gradient = value_and_gradient(equal, {"token_mask": jnp.zeros(4, bool)})
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("loss", [importance_loss, router_entropy_loss, global_entropy_loss, router_z_loss])
def test_gradients_equal_finite_differences(loss):
    logits = np.random.default_rng(5).normal(size=(6, 4)) * 2
    mask = np.array([True] * 5 + [False])
    gradient = jax.grad(lambda z: loss(route(z, RULE, num_choices=2, token_mask=jnp.asarray(mask)).stats))(
        jnp.asarray(logits, jnp.float32)
    )
    step = 1e-5  # the loop is float64, so its differences are exact to 1e-9
    for t, e in np.ndindex(*logits.shape):
        up, down = (losses_loop(logits + s * step * _one(t, e), mask, 2)[loss] for s in (1, -1))
        np.testing.assert_allclose(gradient[t, e], (up - down) / (2 * step), atol=2e-5)


def _one(t, e):
    return np.eye(6)[t][:, None] * np.eye(4)[e][None, :]


@pytest.mark.parametrize("loss", ROUTER_LOSSES, ids=lambda loss: loss.__name__)
def test_names_of_experts_do_not_matter(loss):
    logits, order = np.random.default_rng(6).normal(size=(20, 5)), np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(loss(stats_of(logits)), loss(stats_of(logits[:, order])), rtol=1e-5)


def test_sequence_loss_sees_what_the_batch_loss_does_not():
    # Two sequences, each sure of an expert of its own: the batch is balanced (1), each sequence is collapsed (E = 2).
    logits = np.repeat([[50.0, 0], [0, 50.0]], 3, axis=0)
    stats = route(jnp.asarray(logits, jnp.float32), RULE, num_choices=1, stats_groups=2).stats
    whole = jax.tree.map(lambda x: x.sum(0), stats)
    np.testing.assert_allclose(load_balancing_loss(whole), 1.0, rtol=1e-6)
    np.testing.assert_allclose(load_balancing_loss(stats), [2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("num_groups", [4, 24])
def test_mean_over_groups_weighs_by_tokens(num_groups):
    """Sequences of DeepSeek-V3's loss, or tokens, with unequal padding; a group of padding alone counts nothing."""
    logits = np.random.default_rng(7).normal(size=(24, 5)).astype(np.float32)
    mask = np.arange(6)[None, :] < np.array([6, 2, 0, 5])[:, None]
    stats = route(
        jnp.asarray(logits), RULE, num_choices=2, token_mask=jnp.asarray(mask.ravel()), stats_groups=num_groups
    ).stats
    total = 0.0
    for rows, kept in zip(logits.reshape(num_groups, -1, 5), mask.reshape(num_groups, -1), strict=True):
        total += kept.sum() * losses_loop(rows, kept, 2)[load_balancing_loss] if kept.any() else 0.0
    found = sum_over_groups(load_balancing_loss(stats), stats) / stats.num_tokens.sum(-1)
    np.testing.assert_allclose(found, total / mask.sum(), rtol=1e-5)


@pytest.mark.parametrize("loss", ROUTER_LOSSES, ids=lambda loss: loss.__name__)
def test_global_batch_loss_is_the_formula_after_the_sum_over_devices(loss):
    """Four devices, the later ones with other tastes: summed statistics give the loss of the whole batch, exactly."""
    logits = np.random.default_rng(8).normal(size=(32, 5)) + 2 * np.eye(5)[np.repeat([0, 1, 2, 3], 8)]
    logits = jnp.asarray(logits, jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=(PartitionSpec(), PartitionSpec()))
    def on_devices(rows):
        stats = route(rows, RULE, num_choices=2).stats
        return loss(jax.lax.psum(stats, "data")), jax.lax.pmean(loss(stats), "data")

    of_sums, mean_of_losses = jax.jit(on_devices)(logits)
    np.testing.assert_allclose(of_sums, loss(stats_of(logits)), rtol=1e-5)
    if loss in (load_balancing_loss, importance_loss, load_loss, global_entropy_loss):
        assert mean_of_losses > 1.2 * of_sums  # what is optimised if every device balances by itself


@pytest.mark.parity
def test_balance_loss_is_that_of_mixtral_over_k():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(9).normal(size=(30, 6)).astype(np.float32)
    for num_choices in (1, 2, 4):
        theirs = load_balancing_loss_func((torch.tensor(logits),), 6, num_choices)
        ours = load_balancing_loss(stats_of(logits, num_choices))
        np.testing.assert_allclose(num_choices * ours, theirs.item(), rtol=1e-5)


def test_z_loss_by_hand():
    # logsumexp of four zeros is log 4.
    np.testing.assert_allclose(router_z_loss(stats_of(np.zeros((3, 4)))), np.log(4) ** 2, rtol=1e-6)


def test_cross_entropy_and_kl_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 2])), -np.log([0.5, 0.8]), rtol=1e-6)
    # KL((1/2, 1/4, 1/4) || uniform) = log 3 - 1.5 log 2.
    kl = kl_divergence(logits[:1], jnp.zeros((1, 3)))
    np.testing.assert_allclose(kl, [np.log(3) - 1.5 * np.log(2)], rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(logits, logits + 7.0), [0, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_language_losses_are_float32(dtype):
    logits = jnp.zeros((2, 3), dtype)
    assert cross_entropy(logits, jnp.zeros(2, jnp.int32)).dtype == jnp.float32
    assert kl_divergence(logits, logits).dtype == jnp.float32


def test_masked_mean_counts_only_what_is_there():
    values, mask = jnp.array([1.0, 2.0, 99.0]), jnp.array([True, True, False])
    assert masked_mean(values, mask) == 1.5
    assert masked_mean(values, jnp.zeros(3, bool)) == 0.0
