"""Statistics of routing against hand values, slow loops, Monte Carlo and their edge cases."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import analysis
from moe_jax.types import RouterOutput, RouterStats, RoutingPlan

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


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw_uniform_ids(rng, num_tokens, num_experts, num_choices):
    """`[T, K]` distinct experts, uniformly."""
    return np.argsort(rng.random((num_tokens, num_experts)), -1)[:, :num_choices]


# Counting


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


# Load


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


# Confidence


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


# Specialisation


def test_domain_specialisation_matches_a_loop_and_leaves_unused_domains_undefined(rng):
    expert_ids, domain = draw_uniform_ids(rng, 40, 4, 2)[None], rng.integers(0, 2, 40)
    mask = rng.random(40) < 0.8
    shares = analysis.domain_specialisation(expert_ids, domain, 4, 3, mask)
    for d, e in itertools.product(range(2), range(4)):
        tokens = [t for t in range(40) if domain[t] == d and mask[t]]
        served = [t for t in tokens if e in expert_ids[0, t]]
        assert shares[0, d, e] == pytest.approx(len(served) / len(tokens))
    assert np.isnan(shares[0, 2]).all()
    np.testing.assert_allclose(shares[0, :2].sum(-1), 2)  # K choices per token


def test_mutual_information_by_hand_and_loop(rng):
    assert analysis.mutual_information(np.diag([5, 5])) == pytest.approx(math.log(2))
    assert analysis.mutual_information(np.outer([1, 2], [3, 4])) == pytest.approx(0, abs=1e-12)
    assert analysis.mutual_information(np.zeros((2, 2))) == 0
    table = rng.integers(0, 9, (3, 4))
    joint = table / table.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    expected = sum(
        joint[x, y] * math.log(joint[x, y] / (rows[x] * columns[y]))
        for x, y in itertools.product(range(3), range(4))
        if joint[x, y] > 0
    )
    assert analysis.mutual_information(table) == pytest.approx(expected)


def test_miller_madow_removes_the_bias_of_independent_samples(rng):
    # full 4 x 6 table: (24 - 4 - 6 + 1) / 2N = 15 / 600
    tables = rng.multinomial(300, np.full(24, 1 / 24), 500).reshape(500, 4, 6)
    bias = analysis.miller_madow_bias(tables)
    assert analysis.miller_madow_bias(np.ones((4, 6))) == pytest.approx(15 / 48)
    plug_in = analysis.mutual_information(tables)
    assert plug_in.mean() > 0.02
    assert abs((plug_in - bias).mean()) < 0.002


def make_documents(rng, num_documents=48, length=60, num_experts=6, effect=0.0, document_effect=0.0, byte_effect=0.0):
    """Synthetic routing with chosen causes: domain, document, or byte (bytes differ in frequency between domains)."""
    document = np.repeat(np.arange(num_documents), length)
    domain = document % 3
    token_ids = np.where(rng.random(len(document)) < 0.7, domain, rng.integers(0, 5, len(document)))
    logits = rng.gumbel(size=(1, len(document), num_experts))
    logits += effect * rng.normal(size=(3, num_experts))[domain]
    logits += document_effect * rng.normal(size=(num_documents, num_experts))[document]
    logits += byte_effect * rng.normal(size=(5, num_experts))[token_ids]
    return np.argsort(-logits, -1)[..., :2], domain, document, token_ids


def information_tests(expert_ids, domain, document, token_ids, num_experts=6):
    num_documents = document.max() + 1
    counts = analysis.group_expert_counts(expert_ids, document, num_experts, num_documents)
    labels = np.arange(num_documents) % 3
    return (
        analysis.domain_information(counts, labels, 3),
        analysis.conditional_domain_information(expert_ids, domain, document, token_ids, num_experts),
    )


def test_a_domain_effect_is_found_with_and_without_the_byte(rng):
    plain, given_byte = information_tests(*make_documents(rng, effect=1.0))
    assert plain.p_value[0] == pytest.approx(1 / 201)
    assert given_byte.p_value[0] == pytest.approx(1 / 101)
    assert plain.information[0] > 3 * plain.null_high[0]


def test_correlated_documents_alone_are_no_specialisation(rng):
    plain, _ = information_tests(*make_documents(rng, document_effect=1.0))
    # Shuffling tokens instead of documents would call this significant: independent tokens have a far smaller bias.
    independent_bias = (3 * 6 - 3 - 6 + 1) / (2 * 48 * 60 * 2)
    assert plain.information[0] > 5 * independent_bias
    assert plain.p_value[0] > 0.05
    assert plain.null_low[0] <= plain.information[0] <= plain.null_high[0]


def test_a_router_keyed_on_bytes_specialises_but_not_beyond_the_byte(rng):
    plain, given_byte = information_tests(*make_documents(rng, byte_effect=1.5))
    assert plain.p_value[0] == pytest.approx(1 / 201)
    assert given_byte.p_value[0] > 0.05
    assert given_byte.information[0] < plain.information[0]


def test_control_p_values_are_uniform_without_an_effect():
    p_values = []
    for seed in range(40):
        documents = make_documents(np.random.default_rng(seed), num_documents=12, length=20)
        p_values.append([test.p_value[0] for test in information_tests(*documents)])
    # 40 uniform draws: each share has a standard deviation of 0.07
    assert (np.mean(np.array(p_values) <= 0.25, axis=0) < 0.5).all()
    assert (np.mean(np.array(p_values) <= 0.75, axis=0) > 0.5).all()


def test_conditional_information_matches_a_loop(rng):
    expert_ids, domain, document, token_ids = make_documents(rng, num_documents=9, length=20, effect=1.0)
    mask = rng.random(len(domain)) < 0.8
    expected = 0.0
    for token_id in range(5):
        table = np.zeros((3, 6))
        for t in np.flatnonzero(mask & (token_ids == token_id)):
            table[domain[t], expert_ids[0, t]] += 1
        expected += table.sum() / (2 * mask.sum()) * float(analysis.mutual_information(table))
    test = analysis.conditional_domain_information(
        expert_ids, domain, document, token_ids, 6, token_mask=mask, num_shuffles=3
    )
    assert test.information[0] == pytest.approx(expected)


# Co-activation and drops


def test_coactivation_counts_all_pairs(rng):
    # 3 choices: the pair (0, 2) of ranks 1 and 3 counts although the ranks are not adjacent
    assert analysis.coactivation_counts(np.array([[[0, 1, 2]]]), 3)[0].tolist() == [[1, 1, 1]] * 3
    expert_ids = draw_uniform_ids(rng, 60, 5, 3)[None].copy()
    expert_ids[0, :5, 2] = 5  # empty slots
    mask = rng.random(60) < 0.9
    counts = analysis.coactivation_counts(expert_ids, 5, mask)
    for i, j in itertools.product(range(5), range(5)):
        assert counts[0, i, j] == sum(i in expert_ids[0, t] and j in expert_ids[0, t] for t in range(60) if mask[t]), (
            i,
            j,
        )


def test_lift_is_one_by_chance_and_conditional_share_is_olmoes(rng):
    counts = analysis.coactivation_counts(draw_uniform_ids(rng, 20_000, 6, 3)[None], 6)
    lift = analysis.coactivation_lift(counts)[0]
    off_diagonal = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(lift[off_diagonal], 1, atol=0.05)
    assert np.isnan(np.diagonal(lift)).all()
    share = analysis.conditional_coactivation(counts)[0]
    np.testing.assert_allclose(share[off_diagonal], 2 / 5, atol=0.02)
    # experts 0 and 1 always together, 2 and 3 always together: expected 2 of 12 pairs each, observed 4 of 8
    paired = analysis.coactivation_counts(np.array([[[0, 1], [2, 3]]]), 5)
    assert analysis.coactivation_lift(paired)[0, 0, 1] == pytest.approx(3)
    assert np.isnan(analysis.conditional_coactivation(paired)[0, 4]).all()


def router_stats(num_layers=2, kept=6.0, capacity=3.0, topology=1.0):
    layers = jnp.ones(num_layers)
    vector = jnp.full((num_layers, 2), kept / 2)
    return RouterStats(
        vector, vector, vector, layers, layers, layers * capacity, layers * topology, layers * 5, layers * 0
    )


def test_drop_rates_by_cause():
    rates = analysis.drop_rates(router_stats())
    np.testing.assert_allclose(np.stack(rates)[:, 0], [0.6, 0.3, 0.1])
    assert np.isnan(np.stack(analysis.drop_rates(router_stats(kept=0.0, capacity=0.0, topology=0.0)))).all()


def test_empty_slots_by_position():
    expert_ids = np.array([[[0, 1], [0, 2], [2, 2], [1, 2]]])  # 2 is the sentinel
    by_position = analysis.empty_slots_by_position(expert_ids, [0, 1, 0, 1], 2, 3)
    np.testing.assert_array_equal(by_position, [[0.5, 0.5, np.nan]])
    masked = analysis.empty_slots_by_position(expert_ids, [0, 1, 0, 1], 2, 3, [True, True, False, True])
    np.testing.assert_array_equal(masked, [[0.0, 0.5, np.nan]])


# Intervals


def test_document_mean_interval_covers_at_its_level():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 20, 40)
        document = np.repeat(np.arange(40), sizes)
        values = rng.normal(size=40)[document] + rng.normal(size=len(document))
        interval = analysis.document_mean(values, document, num_resamples=300, seed=seed)
        assert interval.estimate == pytest.approx(values.mean())
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98  # percentile intervals of 40 blocks fall a little short of 95 %


def test_intervals_without_support_are_nan():
    assert np.isnan(analysis.document_mean([], [])).all()
    assert analysis.document_mean([1.0, 3.0], [0, 0]).estimate == 2
    assert np.isnan(analysis.document_mean([1.0, 3.0], [0, 0]).low)
    assert np.isnan(analysis.t_interval([4.0]).low)
    assert np.isnan(analysis.t_interval([]).estimate)
    assert np.isnan(analysis.win_rate([], []))


def test_t_interval_by_hand():
    # mean 2, s = 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4842
    np.testing.assert_allclose(analysis.t_interval([1.0, 2.0, 3.0]), [2, -0.48414, 4.48414], atol=1e-4)


def test_win_rate_counts_ties_half():
    assert analysis.win_rate([1, 2, 3, 4], [2, 2, 2, 5]) == pytest.approx(2.5 / 4)


def test_sign_test_by_hand():
    # 5 of 5 positive: 2 / 32; 4 of 5: 2 * 6 / 32; zeros are left out; an even split cannot exceed 1
    assert analysis.sign_test([1, 2, 3, 4, 5, 0]) == pytest.approx(2 / 32)
    assert analysis.sign_test([1, 2, 3, 4, -5]) == pytest.approx(12 / 32)
    assert analysis.sign_test([1, -1]) == 1
    assert analysis.sign_test([0.0]) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6))
def test_permutation_test_matches_enumeration(differences):
    observed = abs(sum(differences))
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean([s >= observed for s in sums])
    # Thirds and the like are not exact in binary: ties must stay ties.
    assert analysis.paired_permutation_test(np.array(differences) / 30) == pytest.approx(expected)


def test_permutation_test_exact_and_sampled():
    assert analysis.paired_permutation_test([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert analysis.paired_permutation_test([0.0, 0.0]) == 1
    assert analysis.paired_permutation_test(np.ones(20)) == pytest.approx(1 / 10_001, rel=2)
    assert analysis.paired_permutation_test(np.tile([1.0, -1.0], 10)) > 0.9


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -1, "better"), (1, 2, "worse"), (-1, 1, "tie"), (0, 1, "tie"), (np.nan, np.nan, "unknown")],
)
def test_verdict_calls_an_interval_with_zero_a_tie(low, high, expected):
    assert analysis.verdict(analysis.Interval(0.0, low, high)) == expected


# Traces and the summary


def make_trace(rng, effect=1.0, num_masked=10):
    expert_ids, domain, document, token_ids = make_documents(rng, num_documents=12, length=30, effect=effect)
    num_tokens = len(domain)
    logits = rng.normal(size=(1, num_tokens, 6)).astype(np.float32)
    plan = RoutingPlan(jnp.asarray(expert_ids, jnp.int32), jnp.full((1, num_tokens, 2), 0.5), 6, None)
    mask = np.arange(num_tokens) < num_tokens - num_masked
    return analysis.trace_routing(
        RouterOutput(plan=plan, logits=jnp.asarray(logits), stats=None),
        token_ids=token_ids,
        token_mask=mask,
        position=np.arange(num_tokens) % 30,
        domain=np.where(mask, domain, 0),
        document=np.where(mask, document, 0),
        domain_names=("speech", "novel", "code"),
    )


def test_trace_round_trips_and_joins(tmp_path, rng):
    trace = make_trace(rng)
    path = tmp_path / "traces" / "routing.npz"
    analysis.save_trace(path, trace)
    loaded = analysis.load_trace(path)
    assert (loaded.num_experts, loaded.domain_names) == (6, ("speech", "novel", "code"))
    np.testing.assert_array_equal(loaded.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(loaded.margin, trace.margin)
    assert [p.name for p in path.parent.iterdir()] == ["routing.npz"]
    joined = analysis.join_traces([trace, loaded])
    assert joined.entropy.shape == (1, 720)
    assert joined.document.shape == (720,)


def test_trace_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match='level "full"'):
        analysis.trace_routing(
            RouterOutput(plan=None, logits=None, stats=None),
            token_ids=[],
            token_mask=[],
            position=[],
            domain=[],
            document=[],
            domain_names=[],
        )
    np.savez(tmp_path / "other.npz", expert_ids=np.zeros(3))
    with pytest.raises(ValueError, match="lacks gates, entropy"):
        analysis.load_trace(tmp_path / "other.npz")


def test_summary_is_strict_json_and_agrees_with_its_parts(rng):
    trace = make_trace(rng)
    summary = analysis.summarise_routing(trace, router_stats(1), num_shuffles=50)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    layer = summary["layers"][0]
    counts = analysis.expert_counts(trace.expert_ids, 6, trace.token_mask)
    assert layer["counts"] == counts[0].tolist()
    assert sum(layer["counts"]) == summary["num_tokens"] * 2 == 700
    assert layer["gini"] == pytest.approx(float(analysis.gini(counts)[0]))
    assert layer["domain_information"]["p_value"] == pytest.approx(1 / 51)
    assert layer["drops"] == pytest.approx({"kept": 0.6, "capacity": 0.3, "topology": 0.1})
    assert layer["router_entropy"]["estimate"] == pytest.approx(float(trace.entropy[0, trace.token_mask].mean()))


def test_masked_tokens_do_not_reach_the_summary(rng):
    trace = make_trace(rng)
    poisoned = analysis.without_masked_tokens(trace)
    assert analysis.summarise_routing(poisoned, num_shuffles=5) == analysis.summarise_routing(trace, num_shuffles=5)


def test_summary_of_nothing_says_so(rng):
    trace = make_trace(rng, num_masked=360)
    layer = analysis.summarise_routing(trace, num_shuffles=5)["layers"][0]
    assert layer["gini"] is None
    assert layer["verdicts"] == ["unknown"] * 6
    assert layer["domain_load"] == [[None] * 6] * 3
