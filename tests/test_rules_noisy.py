"""Noisy top-k: the noise is as strong as it says, and the smooth load estimates the load."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route
from moe_jax.routing.rules.noisy import noisy_top_k, win_probability
from moe_jax.types import RoutingInputs
from tests.random_routing import NUM_EXPERTS, as_arrays, random_constraints, random_logits

RULE = RULES["noisy_top_k"]


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_without_a_key_it_is_top_k_softmax_and_the_load_is_the_count():
    logits = random_logits(0)
    noisy, plain = (route(logits, RULES[name], num_choices=2) for name in ("noisy_top_k", "top_k_softmax"))
    jax.tree.map(np.testing.assert_array_equal, noisy, plain)
    np.testing.assert_array_equal(noisy.stats.load_sums, noisy.stats.chosen)


def test_win_probability_by_hand():
    # K = 1. Expert 0 leads with 2.5, so it must beat 1.5, and the others must beat 2.5:
    # Phi(2 - 1.5), Phi((1 - 2.5) / 0.5), Phi((0 - 2.5) / 2).
    clean, noisy, scale = (jnp.array([row]) for row in ([2.0, 1.0, 0.0], [2.5, 1.5, -1.0], [1.0, 0.5, 2.0]))
    expected = [normal_cdf(0.5), normal_cdf(-3.0), normal_cdf(-1.25)]
    np.testing.assert_allclose(win_probability(clean, noisy, scale, 1, RoutingInputs(clean)), [expected], rtol=1e-5)


def test_win_probability_is_how_often_a_redrawn_expert_wins():
    rng, num_draws = np.random.default_rng(0), 20_000
    clean, constraints = random_logits(1), as_arrays(random_constraints(2))
    scale = rng.uniform(0.5, 2.0, clean.shape).astype(np.float32)
    noisy = clean + scale * rng.normal(size=clean.shape).astype(np.float32)
    is_open, limit = constraints["is_open"], constraints["limit"]
    inputs = RoutingInputs(*(jnp.asarray(x) for x in (clean, is_open, limit)))
    estimate = win_probability(*(jnp.asarray(x) for x in (clean, noisy, scale)), 2, inputs)
    for t, i in np.ndindex(clean.shape):
        rivals = [noisy[t, e] for e in range(NUM_EXPERTS) if is_open[t, e] and e != i]
        redrawn = clean[t, i] + scale[t, i] * rng.normal(size=num_draws)
        better = (np.array(rivals)[None, :] > redrawn[:, None]).sum(1)
        won = (better < min(2, limit[t])).mean() * is_open[t, i]
        assert abs(won - estimate[t, i]) < 0.0145, (t, i)  # four standard deviations at worst


@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, NUM_EXPERTS).astype(np.float32)])
def test_the_mean_load_over_draws_is_the_mean_count(bias):
    keys = jax.random.split(jax.random.key(0), 4000)
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2.0, (3, NUM_EXPERTS)), jnp.float32)
    run = lambda key: route(random_logits(2, 3), RULE, num_choices=2, key=key, noise_scale=scale, bias=bias).stats  # noqa: E731
    stats = jax.jit(jax.vmap(run))(keys)
    counts, loads = stats.chosen.mean(0), stats.load_sums.mean(0)
    # The sum over three tokens of means of 4000 draws in [0, 1]: four standard deviations are at most 0.055.
    np.testing.assert_allclose(counts, loads, atol=0.055)
    assert counts.std() > 0.1


def test_the_default_noise_has_the_standard_deviation_one_over_the_number_of_experts():
    # Of two equal experts the log-odds of the gates is the difference of two draws: sqrt(2) * 1/2.
    plan = route(jnp.zeros((20_000, 2)), RULE, num_choices=2, key=jax.random.key(0)).plan
    strong = route(
        jnp.zeros((20_000, 2)), get_rule("noisy_top_k", noise=3.0), num_choices=2, key=jax.random.key(0)
    ).plan
    spread = [
        float(jnp.std(jnp.log(p.gates[:, 0] / p.gates[:, 1]) * jnp.sign(0.5 - p.expert_ids[:, 0])))
        for p in (plan, strong)
    ]
    np.testing.assert_allclose(spread, [0.5**0.5, 3 * 0.5**0.5], rtol=0.02)  # four standard deviations


def test_load_has_the_gradient_of_finite_differences():
    logits, scale = jnp.asarray(random_logits(3)), jnp.full((18, NUM_EXPERTS), 0.7)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=logits.shape), jnp.float32)

    @jax.jit
    def value(logits, scale):
        inputs = RoutingInputs(logits, noise_scale=scale, key=jax.random.key(5))
        return jnp.sum(weights * noisy_top_k(inputs, 2).load)

    gradients = jax.grad(value, argnums=(0, 1))(logits, scale)
    directions = [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(6).normal(size=(2, *logits.shape))]
    step = 1e-3  # no selection flips within it at this seed
    up, down = ((logits + s * directions[0], scale + s * directions[1]) for s in (step, -step))
    numeric = (value(*up) - value(*down)) / (2 * step)
    analytic = sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose(analytic, numeric, rtol=1e-2)


@pytest.mark.parametrize("num_choices", [2, NUM_EXPERTS])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_extreme_noise_gives_finite_loads_and_gradients(num_choices, scale):
    logits, constraints = jnp.asarray(random_logits(7)), random_constraints(8)

    def value(logits, scale):
        stats = route(
            logits, RULE, num_choices=num_choices, key=jax.random.key(0), noise_scale=scale, **constraints
        ).stats
        return stats.load_sums.sum(), stats

    noise_scale = jnp.full(logits.shape, scale)
    gradients, stats = jax.grad(value, argnums=(0, 1), has_aux=True)(logits, noise_scale)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, stats)))
    if scale == 0.0:
        np.testing.assert_allclose(stats.load_sums, stats.chosen, atol=1e-5)


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"noise must be positive, got 0.0; without noise this rule is top_k_softmax"):
        route(random_logits(0), get_rule("noisy_top_k", noise=0.0), num_choices=2)
