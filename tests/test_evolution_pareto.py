"""Ranks, crowding, non-dominated filter and hypervolume against loops, hand values and Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evolution.pareto import crowding_distance, hypervolume, is_non_dominated, non_dominated_ranks


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranks_by_loop(points):
    left, ranks, front = set(range(len(points))), [0] * len(points), 0
    while left:
        best = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        for i in best:
            ranks[i] = front
        left, front = left - best, front + 1
    return ranks


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_ranks_match_the_loop(num_objectives):
    points = np.random.default_rng(num_objectives).integers(0, 6, (40, num_objectives)).astype(np.float32)  # with ties
    expected = ranks_by_loop(points)
    ranks = jax.jit(non_dominated_ranks)(jnp.asarray(points), jnp.ones(40, bool))
    np.testing.assert_array_equal(ranks, expected)
    np.testing.assert_array_equal(is_non_dominated(points), np.array(expected) == 0)


def test_ineligible_points_dominate_nobody():
    points = jnp.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [3.0, 3.0]])
    ranks = non_dominated_ranks(points, jnp.array([False, True, True, True]))
    np.testing.assert_array_equal(ranks, [4, 0, 0, 1])


def test_crowding_by_hand():
    # Front 0 is (0, 4), (1, 2), (4, 0): the ends are infinite; the middle one has (4 - 0)/4 + (4 - 0)/4 = 2.
    # Front 1 is (2, 6), (3, 5), (5, 3), (6, 2): both inner ones have 3/4 + 3/4 = 1.5.
    points = jnp.array([[0, 4], [1, 2], [4, 0], [2, 6], [3, 5], [5, 3], [6, 2], [9, 9]], jnp.float32)
    ranks = jnp.array([0, 0, 0, 1, 1, 1, 1, 8])
    order = jax.random.permutation(jax.random.key(0), 8)
    distance = jax.jit(crowding_distance)(points[order], ranks[order])
    np.testing.assert_allclose(distance[jnp.argsort(order)], [np.inf, 2, np.inf, np.inf, 1.5, 1.5, np.inf, 0])


def test_crowding_of_a_flat_objective_is_finite():
    points = jnp.array([[0, 1], [1, 1], [3, 1], [4, 1]], jnp.float32)
    distance = crowding_distance(points, jnp.zeros(4, jnp.int32))
    assert not np.any(np.isnan(distance))
    # Only the first objective counts: (3 - 0)/4.
    assert distance[1] == 0.75


def test_hypervolume_by_hand():
    # Staircase below (4, 4): (1, 3) adds 3 x 1, (2, 1) adds 2 x 2 more; (3, 2) is dominated; (5, 0) lies outside.
    points = np.array([[2, 1], [1, 3], [3, 2], [5, 0]])
    assert hypervolume(points, np.array([4, 4])) == 7
    # Two boxes of 2 x 2 x 1 and 1 x 1 x 3 under (3, 3, 3) overlap in 1 x 1 x 1: 4 + 3 - 1.
    assert hypervolume(np.array([[1, 1, 2], [2, 2, 0]]), np.array([3, 3, 3])) == 6
    assert hypervolume(np.empty((0, 2)), np.array([1, 1])) == 0
    assert hypervolume(np.array([[np.nan, 0.0], [1.0, 0.0]]), np.array([1, 1])) == 0
    with pytest.raises(ValueError, match=r"need points \[P, 2\]"):
        hypervolume(np.zeros((3, 4)), np.zeros(4))


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_hypervolume_matches_monte_carlo(num_objectives):
    random = np.random.default_rng(num_objectives)
    points = random.uniform(0, 1.1, (12, num_objectives))
    samples = random.uniform(0, 1, (200_000, num_objectives))
    share = np.mean(np.any(np.all(points[None] <= samples[:, None], axis=2), axis=1))
    volume = hypervolume(points, np.ones(num_objectives))
    assert abs(volume - share) < 5 * np.sqrt(share * (1 - share) / len(samples))
    assert hypervolume(points[is_non_dominated(points)], np.ones(num_objectives)) == pytest.approx(volume, abs=1e-12)
