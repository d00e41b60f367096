"""Losses against hand-worked values and slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.losses import (
    cross_entropy,
    kl_divergence,
    load_balancing_loss,
    load_fractions,
    masked_mean,
    router_z_loss,
)
from moe_jax.routing import RULES, route

RULE = RULES["softmax_top_k"]


def stats_of(logits, num_choices=2):
    return route(jnp.asarray(logits, jnp.float32), RULE, num_choices=num_choices).stats


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def test_balance_loss_by_hand():
    # Two tokens, both to expert 0 with probabilities (.8, .2) and (.6, .4): f = (1, 0), P = (.7, .3), 2 * .7 = 1.4.
    stats = stats_of(np.log([[0.8, 0.2], [0.6, 0.4]]), num_choices=1)
    np.testing.assert_allclose(load_balancing_loss(stats), 1.4, rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_num_experts_when_collapsed():
    # Uniform probabilities give P = 1/E and so 1, whatever f; one certain expert gives f = P = onehot and so E.
    np.testing.assert_allclose(load_balancing_loss(stats_of(np.zeros((8, 4)))), 1.0, rtol=1e-6)
    collapsed = stats_of(np.tile([50.0, 0, 0, 0], (8, 1)), num_choices=1)
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


def test_balance_gradient_is_finite_without_tokens():
    def loss(z):
        stats = route(z, RULE, num_choices=1, token_mask=jnp.zeros(3, bool)).stats
        return load_balancing_loss(stats) + router_z_loss(stats)

    value, gradient = jax.value_and_grad(loss)(jnp.ones((3, 4)))
    assert value == 0 and (gradient == 0).all()


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
