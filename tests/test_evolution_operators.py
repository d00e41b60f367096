"""Operators and genomes: hand-worked cases, slow loops, and the constraints that repair promises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evolution import operators
from moe_jax.evolution.genomes import (
    LayerTopology,
    budget_genome,
    combine,
    decode_population,
    mask_genome,
    top_k_genome,
)

KEY = jax.random.key(0)
ORDER = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
GENOMES = {
    "mask": mask_genome(3, 4, total=8, min_per_layer=2, num_choices=2),
    "mask_range": mask_genome(3, 4, total=(6, 10), min_per_layer=1, num_choices=1),
    "budget": budget_genome(ORDER, total=7, min_per_layer=1, num_choices=1),
    "budget_range": budget_genome(ORDER, total=(6, 9), min_per_layer=2, num_choices=2),
    "top_k": top_k_genome(3, 4, max_choices=2),
    "mask_top_k": combine(mask_genome(3, 4, 8, 2, 2), top_k_genome(3, 4, 2)),
    "budget_top_k": combine(budget_genome(ORDER, 7, 2, 2), top_k_genome(3, 4, 2)),
}
LIMITS = {  # (least total, most total, least per layer)
    "mask": (8, 8, 2),
    "mask_range": (6, 10, 1),
    "budget": (7, 7, 1),
    "budget_range": (6, 9, 2),
    "top_k": (12, 12, 4),
    "mask_top_k": (8, 8, 2),
    "budget_top_k": (7, 7, 2),
}


def assert_uniform(counts: np.ndarray) -> None:
    """Counts of equally likely outcomes: chi-square within five standard deviations of its mean."""
    counts = np.asarray(counts, float).ravel()
    chi_square = np.sum((counts - counts.mean()) ** 2) / counts.mean()
    freedom = counts.size - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom), counts


def test_tournament_matches_its_win_probabilities():
    # Three individuals, tournaments of two with replacement: the best wins unless both entrants are others, 5/9; the
    # middle one wins 3/9, the worst needs both places, 1/9. Index 1 is invalid and the worst.
    winners = operators.select_tournament(KEY, jnp.array([2.0, jnp.inf, 1.0]), 9000, 2)
    np.testing.assert_allclose(np.bincount(winners, minlength=3) / 9000, [3 / 9, 1 / 9, 5 / 9], atol=0.025)


def test_crossover_masks_by_hand():
    np.testing.assert_array_equal(operators.one_point_mask(jnp.array([1, 3]), 4), [[0, 1, 1, 1], [0, 0, 0, 1]])
    cuts = jnp.array([1, 3]), jnp.array([3, 2])  # the second pair in the other order
    np.testing.assert_array_equal(operators.two_point_mask(*cuts, 4), [[0, 1, 1, 0], [0, 0, 1, 0]])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_crossover_takes_only_the_chosen_kind(kind):
    first, second = jnp.zeros((500, 6), jnp.int32), jnp.ones((500, 6), jnp.int32)
    children = np.asarray(operators.crossover(KEY, first, second, 1.0, jnp.eye(3)[kind]))
    switches = np.abs(np.diff(children, axis=1)).sum(axis=1)
    if kind == 0:
        assert np.all(switches == 1) and np.all(children[:, 0] == 0)
        assert_uniform(np.bincount(children.sum(axis=1))[1:])  # five inner cuts, equally likely
    elif kind == 1:
        # Two cuts inside the genome (0 switches where they coincide): its ends stay together.
        assert set(switches) == {0, 2} and not np.any(children[:, [0, -1]])
    else:
        assert_uniform(children.sum(axis=0))
    none = operators.crossover(KEY, first, second, 0.0, jnp.eye(3)[kind])
    np.testing.assert_array_equal(none, first)


def test_bit_mutation_flips_at_its_rate():
    genomes = jax.random.bernoulli(KEY, 0.5, (400, 25)).astype(jnp.int32)
    flipped = operators.mutate_bits(jax.random.key(1), genomes, 0.2) != genomes
    assert abs(np.mean(flipped) - 0.2) < 0.02  # 10,000 bits: five standard deviations are 0.02


def test_categorical_mutation_is_uniform_over_the_other_values():
    genomes = jnp.tile(jnp.array([[3, 0, 0]], jnp.int32), (6000, 1))
    mutated = np.asarray(operators.mutate_categories(KEY, genomes, jnp.array([4, 2, 1]), 1.0))
    assert_uniform(np.bincount(mutated[:, 0], minlength=4)[:3])
    assert not np.any(mutated[:, 0] == 3)
    np.testing.assert_array_equal(mutated[:, 1], 1)  # the only other value
    np.testing.assert_array_equal(mutated[:, 2], 0)  # a single value never changes


def test_moves_keep_the_sum_and_the_bounds():
    budgets = jax.random.randint(KEY, (300, 5), 1, 9)
    moved = np.asarray(operators.move_units(jax.random.key(1), budgets, 1, 8, 3, 1.0))
    np.testing.assert_array_equal(moved.sum(axis=1), np.sum(budgets, axis=1))
    assert moved.min() == 1 and moved.max() == 8
    difference = np.abs(moved - np.asarray(budgets))
    assert difference.max() == 3 and np.all((difference > 0).sum(axis=1) <= 4)  # two pairs of five genes
    np.testing.assert_array_equal(operators.move_units(KEY, budgets, 1, 8, 3, 0.0), budgets)


def test_mask_repair_opens_and_closes_as_few_as_needed():
    density = jax.random.uniform(jax.random.key(1), (200, 1, 1))
    masks = jax.random.bernoulli(KEY, density, (200, 3, 4)).astype(jnp.int32)
    repaired = np.asarray(operators.repair_mask(jax.random.key(2), masks, (6, 7), 1))
    masks = np.asarray(masks)
    assert np.all(repaired.sum(axis=2) >= 1) and set(repaired.sum(axis=(1, 2))) == {6, 7}
    for mask, result in zip(masks, repaired, strict=True):
        # Slow reckoning: empty rows must open one expert each; after that only the missing or the superfluous change.
        empty = int(np.sum(mask.sum(axis=1) == 0))
        total = mask.sum() + empty
        assert np.sum(mask != result) == empty + max(0, 6 - total) + max(0, total - 7)
    again = operators.repair_mask(jax.random.key(3), jnp.asarray(repaired), (6, 7), 1)
    np.testing.assert_array_equal(again, repaired)


def test_mask_repair_is_unbiased():
    # From nothing, exactly two of four in each of two layers: each of the six pairs is equally likely, layer by layer.
    masks = np.asarray(operators.repair_mask(KEY, jnp.zeros((6000, 2, 4), jnp.int32), (4, 4), 2))
    for layer in range(2):
        pairs = [tuple(np.flatnonzero(row)) for row in masks[:, layer]]
        assert_uniform([pairs.count(pair) for pair in itertools.combinations(range(4), 2)])
    # From everything, five of eight with at least one a layer; all experts survive equally often.
    masks = operators.repair_mask(KEY, jnp.ones((6000, 2, 4), jnp.int32), (5, 5), 1)
    assert_uniform(np.sum(masks, axis=0))


def test_budget_repair_by_hand_and_against_brute_force():
    # [5, 1, 1] in [1, 4] is clipped to [4, 1, 1]; the sum 8 needs a shift of one, [4, 2, 2].
    np.testing.assert_array_equal(operators.repair_budgets(KEY, jnp.array([[5, 1, 1]]), (8, 8), 1, 4), [[4, 2, 2]])
    budgets = jax.random.randint(KEY, (200, 3), -2, 8)
    repaired = np.asarray(operators.repair_budgets(KEY, budgets, (7, 8), 1, 5))
    grid = np.array(list(itertools.product(range(1, 6), repeat=3)))
    for budget, result in zip(np.clip(budgets, 1, 5), repaired, strict=True):
        allowed = grid[grid.sum(axis=1) == np.clip(budget.sum(), 7, 8)]
        nearest = np.min(np.sum((allowed - budget) ** 2, axis=1))
        assert result.min() >= 1 and result.max() <= 5
        assert np.sum((result - budget) ** 2) == nearest
    left_over = operators.repair_budgets(KEY, jnp.full((3000, 3), 2), (7, 7), 1, 5)
    assert_uniform(np.sum(np.asarray(left_over) == 3, axis=0))  # the one unit goes to each gene equally often


def test_repeats_against_a_loop():
    genomes = np.asarray(jax.random.randint(KEY, (60, 3), 0, 3))
    is_original = np.asarray(jax.random.bernoulli(KEY, 0.7, (60,)))
    expected = [any(is_original[j] and np.array_equal(genomes[j], g) for j in range(i)) for i, g in enumerate(genomes)]
    np.testing.assert_array_equal(operators.is_repeat(jnp.asarray(genomes), jnp.asarray(is_original)), expected)


@pytest.mark.parametrize("name", ["mask_range", "budget_range", "mask_top_k", "budget_top_k"])  # these hold all parts
def test_genomes_stay_valid_through_variation(name):
    genome, (low, high, least) = GENOMES[name], LIMITS[name]
    random, mutate, repair = jax.jit(jax.vmap(genome.random)), jax.jit(genome.mutate), jax.jit(genome.repair)
    keys = jax.random.split(KEY, 5)
    start = random(jax.random.split(keys[0], 64))
    crossed = jnp.where(jnp.arange(genome.size)[None, :] < 2, start, start[::-1])
    varied = repair(keys[2], mutate(keys[1], crossed, jnp.float32(3.0)))
    repaired_again, unedited = repair(keys[3], varied), mutate(keys[4], start, jnp.float32(0.0))
    np.testing.assert_array_equal(varied, repaired_again)
    np.testing.assert_array_equal(start, unedited)
    assert start.dtype == varied.dtype == jnp.int32 and start.shape == (64, genome.size)
    for genes in (start, varied):
        topology = decode_population(genome, genes)
        assert topology.keep.shape == (3, 64, 4) and topology.num_choices.shape == (3, 64)
        counts = np.sum(topology.keep, axis=2)  # [L, P]
        assert np.all(counts >= least) and np.all((low <= counts.sum(axis=0)) & (counts.sum(axis=0) <= high))
        assert np.all(topology.num_choices >= 1) and np.all(topology.num_choices <= counts)
        assert np.all(np.asarray(genes) >= 0) and np.all(np.asarray(genes) < np.array(genome.num_values))
    assert len(np.unique(start, axis=0)) > 5 and np.any(varied != crossed)
    totals = np.sum(decode_population(genome, start).keep, axis=(0, 2))
    assert set(totals.tolist()) == set(range(low, high + 1))


@pytest.mark.parametrize("name", GENOMES)
def test_decode_and_encode_are_inverse(name):
    genome = GENOMES[name]
    for key in jax.random.split(KEY, 5):
        genes = genome.random(key)
        np.testing.assert_array_equal(genome.encode(genome.decode(genes)), genes)


def test_decode_by_hand():
    # Budgets 1, 2, 4 of the orders 2031, 0123, 3210 keep {2}, {0, 1} and all.
    decoded = GENOMES["budget"].decode(jnp.array([1, 2, 4]))
    np.testing.assert_array_equal(decoded.keep, [[0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    both = GENOMES["mask_top_k"].decode(jnp.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0]))
    np.testing.assert_array_equal(both.keep, [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(both.num_choices, [1, 2, 1])
    topology = LayerTopology(both.keep, both.num_choices)
    np.testing.assert_array_equal(GENOMES["budget_top_k"].encode(topology), [2, 2, 4, 0, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((2, 4, 3, 2, 2), "must lie within"),
        ((2, 4, (4, 9), 2, 2), "must lie within"),
        ((2, 4, 6, 1, 2), "cannot fill its choices"),
    ],
)
def test_contradictory_constraints_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        mask_genome(*arguments)
    with pytest.raises(ValueError, match="permutation"):
        budget_genome(np.zeros((2, 4), int), 4, 1, 1)
