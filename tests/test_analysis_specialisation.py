"""Specialisation and co-activation: found where they are, and at chance where they are not."""

import itertools
import math

import numpy as np
import pytest

from moe_jax import analysis
from tests.synthetic_routing import draw_uniform_ids, make_documents


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
