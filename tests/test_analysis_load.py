"""Counts, load and confidence against hand values, loops and Monte Carlo."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import analysis
from tests.synthetic_routing import draw_uniform_ids

MEASURES = {
    "coefficient_of_variation": analysis.coefficient_of_variation,
    "gini": analysis.gini,
    "max_over_mean_load": analysis.max_over_mean_load,
    "max_violation": analysis.max_violation,
    "effective_experts": analysis.effective_experts,
    "normalised_load_entropy": analysis.normalised_load_entropy,
    "jain_fairness": analysis.jain_fairness,
}
# counts 6 2 0 0, mean 2: deviations 4 0 -2 -2, variance (16 + 4 + 4) / 4 = 6
# Gini: sorted 0 0 2 6 times -3 -1 1 3 = 20, over 4 * 8. Entropy: -(3/4) ln(3/4) - (1/4) ln(1/4) = 0.5623
# Jain: 64 / (4 * 40)
BY_HAND = {
    "coefficient_of_variation": math.sqrt(6) / 2,
    "gini": 0.625,
    "max_over_mean_load": 3.0,
    "max_violation": 2.0,
    "effective_experts": math.exp(0.5623351446),
    "normalised_load_entropy": 0.5623351446 / math.log(4),
    "jain_fairness": 0.4,
}
EVEN = {"max_over_mean_load": 1.0, "effective_experts": 5.0, "normalised_load_entropy": 1.0, "jain_fairness": 1.0}


def test_group_counts_match_a_loop_and_leave_out_sentinel_and_masked_tokens(rng):
    expert_ids = rng.integers(0, 5, (2, 30, 3))  # 4 is the sentinel
    groups, mask = rng.integers(0, 3, 30), rng.random(30) < 0.7
    expected = np.zeros((3, 2, 4), int)
    for layer, token, choice in itertools.product(range(2), range(30), range(3)):
        if mask[token] and expert_ids[layer, token, choice] < 4:
            expected[groups[token], layer, expert_ids[layer, token, choice]] += 1
    counts = analysis.group_expert_counts(expert_ids, groups, 4, 3, mask)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(analysis.expert_counts(expert_ids, 4, mask), expected.sum(0))
    assert analysis.expert_counts(np.zeros((2, 0, 3), int), 4).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("name", MEASURES)
def test_measure_by_hand_even_empty_and_single(name):
    measure = MEASURES[name]
    np.testing.assert_allclose(measure(np.array([6, 2, 0, 0])), BY_HAND[name], rtol=1e-5)
    np.testing.assert_allclose(measure(np.full(5, 7)), EVEN.get(name, 0.0), atol=1e-5)
    assert np.isnan(measure(np.zeros(4)))
    single = {"max_over_mean_load", "effective_experts", "normalised_load_entropy", "jain_fairness"}
    np.testing.assert_allclose(measure(np.array([9])), float(name in single), atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_measure_ignores_order_and_scale_and_runs_under_jit_and_vmap(name, rng):
    measure = MEASURES[name]
    counts = jnp.asarray(rng.integers(1, 50, (3, 2, 6)), jnp.float32)
    expected = np.stack([[measure(layer) for layer in candidate] for candidate in np.asarray(counts)])
    np.testing.assert_allclose(measure(counts), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(measure))(counts[..., ::-1] * 2), expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(jax.grad(lambda c: measure(c).sum())(counts)).all()


def test_uniform_band_by_hand_and_exact_coverage():
    # E = 1: always all tokens. T = 2, K/E = 1/2: counts 0 1 2 have probability 1/4 1/2 1/4, tails of 0.0125 hold none.
    assert analysis.uniform_load_band(10, 1, 1) == (10, 10)
    assert analysis.uniform_load_band(0, 4, 1) == (0, 0)
    assert analysis.uniform_load_band(2, 2, 1) == (0, 2)
    # level 0.2 over 2 experts: tails of 0.2; P(c <= 0) = 0.0625 and P(c <= 1) = 0.3125 at T = 4, so the band is 1 to 3.
    assert analysis.uniform_load_band(4, 2, 1, level=0.2) == (1, 3)
    pmf = [math.comb(40, c) * 0.25**c * 0.75 ** (40 - c) for c in range(41)]
    low, high = analysis.uniform_load_band(40, 8, 2)
    tail = 0.05 / 16
    assert sum(pmf[:low]) < tail <= sum(pmf[: low + 1])
    assert sum(pmf[:high]) < 1 - tail <= sum(pmf[: high + 1])


def test_uniform_band_and_expected_imbalance_match_monte_carlo(rng):
    num_tokens, num_experts, num_choices, num_draws = 256, 16, 2, 1000
    ids = draw_uniform_ids(rng, num_draws * num_tokens, num_experts, num_choices)
    draws = np.repeat(np.arange(num_draws), num_tokens)
    counts = analysis.group_expert_counts(ids[None], draws, num_experts, num_draws)[:, 0]
    low, high = analysis.uniform_load_band(num_tokens, num_experts, num_choices)
    inside = ((counts >= low) & (counts <= high)).all(-1).mean()
    assert 0.95 <= inside <= 0.99  # family-wise level, conservative by discreteness
    expected = analysis.expected_imbalance(num_tokens, num_experts, num_choices)
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(np.mean(MEASURES[name](counts)), value, rtol=0.04, err_msg=name)


def test_expected_imbalance_edges():
    assert analysis.expected_imbalance(10, 4, 4) == (0, 0, 0)
    # K = 1: sqrt((E - 1) / N) with E = 64, N = 512
    assert analysis.expected_imbalance(512, 64, 1).coefficient_of_variation == pytest.approx(math.sqrt(63 / 512))


def test_document_interval_covers_the_share_and_widens_with_correlation(rng):
    independent = rng.multinomial(50, [0.5, 0.3, 0.2], 200)[:, None]  # 200 documents, L = 1
    correlated = np.eye(3, dtype=int)[rng.choice(3, 200, p=[0.5, 0.3, 0.2])][:, None] * 50  # one expert a document
    narrow = analysis.document_load_interval(independent)
    wide = analysis.document_load_interval(correlated)
    assert narrow[0].shape == (1, 3)
    # binomial width: 2 * 1.96 * sqrt(p (1 - p) / n), with n = 10,000 tokens against n = 200 documents
    np.testing.assert_allclose((narrow[1] - narrow[0])[0, 0], 3.92 * math.sqrt(0.25 / 10_000), rtol=0.15)
    np.testing.assert_allclose((wide[1] - wide[0])[0, 0], 3.92 * math.sqrt(0.25 / 200), rtol=0.15)
    assert np.isnan(analysis.document_load_interval(np.zeros((2, 1, 3)))).all()


def test_dead_only_where_the_window_is_long_enough():
    counts = np.array([[0, 3], [2, 1]])
    # ln(E L / alpha) = ln(400) = 5.99; T K / E = 6 at T = 12, K = 1
    assert analysis.dead_expert_verdicts(counts, 12, 1) == [["dead", "alive"], ["alive", "alive"]]
    assert analysis.dead_expert_verdicts(counts, 11, 1) == [["unknown", "alive"], ["alive", "alive"]]
    # E = 64, L = 16, alpha = 1 %: m >= 11.5
    window = math.ceil(math.log(64 * 16 / 0.01) * 64)
    assert analysis.dead_expert_verdicts(np.zeros((16, 64)), window, 1)[0][0] == "dead"
    assert analysis.dead_expert_verdicts(np.zeros((16, 64)), window - 64, 1)[0][0] == "unknown"


def test_entropy_top_probability_and_margin_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]))
    # -(1/2 ln 1/2 + 1/4 ln 1/4 + 2/8 ln 1/8) = 1.75 ln 2
    np.testing.assert_allclose(analysis.router_entropy(logits), [1.75 * math.log(2), 0.0], atol=1e-6)
    np.testing.assert_allclose(analysis.top_probability(logits), [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(analysis.boundary_margin(logits[:1], 1), [math.log(2)], rtol=1e-5)
    np.testing.assert_allclose(analysis.boundary_margin(logits[:1], 3), [0.0], atol=1e-6)
    assert np.isinf(analysis.boundary_margin(logits, 4)).all()


def test_margin_is_what_flips_the_choice(rng):
    logits = rng.normal(size=(50, 6)).astype(np.float32)
    margin = np.asarray(analysis.boundary_margin(logits, 2))
    order = np.argsort(-logits, -1)
    for token in range(50):
        for push, flips in ((0.99, False), (1.01, True)):
            pushed = logits[token].copy()
            pushed[order[token, 2]] += push * margin[token]
            assert (set(np.argsort(-pushed)[:2]) != set(order[token, :2])) == flips


def test_token_statistics_respect_the_mask_and_emptiness():
    values, mask = np.array([[0.0, 1.0, np.inf, 9.0]]), np.array([True, True, True, False])
    assert analysis.token_quantiles(values, [0.0, 0.5, 1.0], mask).tolist() == [[0.0, 1.0, np.inf]]
    assert analysis.fraction_within_margin(values, 0.5, mask) == pytest.approx(1 / 3)
    assert analysis.token_mean(values, np.array([True, True, False, True])) == pytest.approx(10 / 3)
    nothing = np.zeros(4, bool)
    assert np.isnan(analysis.token_mean(values, nothing)).all()
    assert np.isnan(analysis.token_quantiles(values, [0.5], nothing)).all()
