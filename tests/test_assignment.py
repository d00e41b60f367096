"""The auction against scipy's exact assignment and its own certificate; Sinkhorn against what balance means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.assignment import assign_by_auction
from moe_jax.ops.sinkhorn import sinkhorn_potentials
from tests.oracles.assignment import balanced_matrix, exact_assignment

auction = jax.jit(assign_by_auction, static_argnames=("tolerance", "max_rounds"))


def affinities_of(kind, num_tokens, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_tokens, num_experts))
    popular = noise + 3 * rng.normal(size=num_experts)
    alike = rng.normal(size=(num_tokens, 1)) * rng.normal(size=num_experts) + 0.1 * noise
    return {"noise": noise, "popular": popular, "alike": alike, "ties": np.round(noise)}[kind].astype(np.float32)


def total(affinities, experts):
    """Sum over the seated tokens, in float64."""
    seated = np.flatnonzero(experts < affinities.shape[1])
    return affinities[seated, experts[seated]].astype(np.float64).sum()


def test_by_hand():
    # Both tokens like expert 0 best; token 0 gives up 1 at expert 1, token 1 gives up 3: 2 + 3 beats 3 + 0.
    affinities = jnp.array([[3.0, 2.0], [3.0, 0.0]])
    result = auction(affinities, jnp.array([1, 1]))
    np.testing.assert_array_equal(result.expert_ids, [1, 0])
    # Each is content at these prices: token 0 has 2 - p_1 >= 3 - p_0 and token 1 has 3 - p_0 >= 0 - p_1.
    assert 1 - 0.01 <= result.prices[0] - result.prices[1] <= 3 + 0.01


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["noise", "popular", "alike", "ties"])
def test_the_sum_is_as_close_to_the_optimum_as_promised(kind, tolerance):
    affinities, seats = affinities_of(kind, 96, 6), np.array([20, 12, 0, 16, 32, 16])
    result = auction(affinities, jnp.asarray(seats), tolerance=tolerance)
    experts = np.asarray(result.expert_ids)
    np.testing.assert_array_equal(np.bincount(experts, minlength=6), seats)
    slack = len(affinities) * tolerance * np.ptp(affinities) * 1.001  # float32 rounding
    exact = exact_assignment(affinities, seats, np.ones(affinities.shape, bool))
    assert total(affinities, experts) >= total(affinities, exact) - slack
    # Weak duality: no assignment exceeds this bound, so it certifies the sum without knowing the optimum.
    values = np.where(seats > 0, affinities - np.asarray(result.prices), -np.inf)
    bound = values.max(1).sum() + (seats * np.asarray(result.prices)).sum()
    assert total(affinities, exact) - 1e-3 <= bound <= total(affinities, experts) + slack


def test_a_price_war_is_shortened_by_a_coarse_start():
    """Three tokens fight for two seats worth 1 and leave the third, worth 0, only when both cost 1."""
    affinities = jnp.tile(jnp.array([[1.0, 1.0, 0.0]]), (3, 1))
    result = auction(affinities, jnp.array([1, 1, 1]), tolerance=1e-5)
    assert sorted(result.expert_ids.tolist()) == [0, 1, 2]
    assert result.num_rounds < 1000  # 1 / tolerance is 100,000


@pytest.mark.parametrize("seed", range(3))
def test_closed_pairs_are_used_only_where_nothing_else_is_left(seed):
    rng = np.random.default_rng(seed)
    affinities, seats = affinities_of("noise", 40, 5, seed), np.full(5, 7)
    is_open = (rng.random(affinities.shape) < 0.4) | (np.arange(5) == rng.integers(0, 5, (40, 1)))
    is_open[:12] = np.arange(5) == 3  # twelve tokens for the seven seats of expert 3
    is_open[35:] = False  # masked
    result = auction(affinities, jnp.asarray(seats), is_open, tolerance=1e-4)
    experts, exact = np.asarray(result.expert_ids), exact_assignment(affinities, seats, is_open)
    assert (experts[:12] == 5).sum() >= 5 and (experts[35:] == 5).all()
    assert (experts == 5).sum() == (exact == 5).sum()
    slack = 35 * 1e-4 * np.ptp(affinities[is_open]) * 1.001
    assert abs(total(affinities, experts) - total(affinities, exact)) <= slack


def test_masked_tokens_are_inert():
    affinities, is_open = affinities_of("noise", 20, 4), np.arange(20)[:, None] < np.full(4, 12)
    garbage = np.where(is_open, affinities, np.nan)
    first, second = (auction(a, jnp.full(4, 3), is_open) for a in (affinities, garbage))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_degenerate_problems_end():
    everyone = auction(jnp.zeros((8, 4)), jnp.full(4, 2))
    np.testing.assert_array_equal(np.bincount(everyone.expert_ids), 2)
    np.testing.assert_array_equal(auction(jnp.ones((3, 1)), jnp.array([3])).expert_ids, 0)
    nobody = auction(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32), jnp.zeros((3, 2), bool))
    np.testing.assert_array_equal(nobody.expert_ids, 2)
    one_left = auction(jnp.zeros((3, 2)), jnp.array([0, 3]), jnp.tile(jnp.array([[False, True]]), (3, 1)))
    np.testing.assert_array_equal(one_left.expert_ids, 1)
    broken = auction(jnp.full((4, 2), jnp.nan), jnp.full(2, 2), max_rounds=50)
    np.testing.assert_array_equal(np.bincount(broken.expert_ids), 2)


@pytest.mark.parametrize("max_rounds", [0, 3, 20])
def test_where_a_bound_on_the_rounds_strikes_every_seat_is_filled_all_the_same(max_rounds):
    affinities, seats, is_token = affinities_of("popular", 64, 8), np.arange(8) + 4, np.arange(64) >= 4
    result = auction(affinities, jnp.asarray(seats), is_token[:, None] & np.ones(8, bool), max_rounds=max_rounds)
    np.testing.assert_array_equal(np.bincount(result.expert_ids, minlength=9), [*seats, 4])
    assert result.num_rounds == max_rounds


def test_vmap_runs_each_auction_to_its_own_end():
    batch = np.stack([affinities_of(kind, 32, 4) for kind in ("noise", "popular", "ties")])
    run = functools.partial(assign_by_auction, seats=jnp.full(4, 8))
    together = jax.jit(jax.vmap(run))(batch)
    for i, affinities in enumerate(batch):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, jax.jit(run)(affinities)
        )


def test_neither_has_a_gradient_but_both_let_one_pass_by():
    def value(z):
        return (assign_by_auction(z, jnp.full(2, 2)).prices + sinkhorn_potentials(z)).sum() + z.sum()

    np.testing.assert_array_equal(jax.grad(value)(jnp.asarray(affinities_of("noise", 4, 2))), 1.0)


def test_a_tolerance_below_float32_is_refused():
    with pytest.raises(ValueError, match="tolerance must be at least 1e-06"):
        assign_by_auction(jnp.zeros((2, 2)), jnp.ones(2, jnp.int32), tolerance=1e-8)


def matrix_of(logits, v, is_open):
    matrix = np.where(is_open, np.exp(logits.astype(np.float64) + np.asarray(v)), 0.0)
    sums = matrix.sum(1, keepdims=True)
    return matrix / np.where(sums > 0, sums, 1.0)


def test_sinkhorn_by_hand():
    # [[4, 1], [1, 1]] scaled to sums of 1 is [[p, 1-p], [1-p, p]] with p^2 / (1-p)^2 = 4 (the cross-ratio stays): 2/3.
    logits = np.log(np.array([[4.0, 1.0], [1.0, 1.0]]))
    matrix = matrix_of(logits, sinkhorn_potentials(logits, tolerance=1e-7), np.ones((2, 2), bool))
    np.testing.assert_allclose(matrix, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]], atol=1e-5)


@pytest.mark.parametrize("is_masked", [False, True])
def test_sinkhorn_balances(is_masked):
    logits = 2 * affinities_of("popular", 60, 5)
    is_open = np.ones(logits.shape, bool)
    if is_masked:
        is_open[40:], is_open[:, 3], is_open[:9, 1] = False, False, False
    matrix = matrix_of(logits, sinkhorn_potentials(logits, is_open), is_open)
    is_column = is_open.any(0)
    np.testing.assert_allclose(matrix.sum(0), is_column * is_open.any(1).sum() / is_column.sum(), rtol=2e-4)
    np.testing.assert_allclose(matrix, balanced_matrix(logits.astype(float), is_open), atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_sinkhorn_stays_finite(scale):
    logits = scale * affinities_of("noise", 12, 3)
    unbalanceable = np.arange(3) == np.arange(12)[:, None] // 5  # each row has one column, columns have 5, 5 and 2
    for is_open in (None, unbalanceable, np.zeros((12, 3), bool)):
        assert np.isfinite(sinkhorn_potentials(logits, is_open)).all()
