"""Searches on instances small enough to enumerate: optimum, front, resumption, seeds, invalid fitness, baselines."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evolution import (
    STRATEGIES,
    DiscreteGA,
    LayerTopology,
    advance_search,
    greedy_removal,
    hypervolume,
    is_non_dominated,
    mask_genome,
    run_search,
    start_search,
)

# 2 layers of 8 experts, exactly 4 kept in each: C(8, 4)^2 = 4,900 masks.
GENOME = mask_genome(2, 8, total=8, min_per_layer=4, num_choices=2)
ROWS = np.array([[int(i in kept) for i in range(8)] for kept in itertools.combinations(range(8), 4)])
ALL_MASKS = np.array([np.concatenate(pair) for pair in itertools.product(ROWS, ROWS)], np.int32)
POPULATION = 32


def interaction_loss(genomes, weights):
    """Pairwise interactions of all experts, across layers too, so that no layer can be optimised alone."""
    kept = genomes.astype(jnp.float32)
    return jnp.einsum("pi,ij,pj->p", kept, weights, kept)


def three_losses(genomes, weights):
    """Three conflicting objectives: two interaction losses, and the imbalance of the kept experts' fixed loads."""
    load = jnp.sum(genomes * jnp.arange(1.0, 17.0)[None, :], axis=1)
    rounded = jnp.round(jnp.stack([interaction_loss(genomes, weights), interaction_loss(genomes, weights.T[::-1])], 1))
    return jnp.concatenate([rounded, jnp.abs(load - 60)[:, None]], axis=1)


def partly_invalid_loss(genomes, weights):
    """NaN where expert 0 is kept, -inf where expert 1 is kept and 0 is not."""
    loss = interaction_loss(genomes, weights)
    return jnp.where(genomes[:, 0] > 0, jnp.nan, jnp.where(genomes[:, 1] > 0, -jnp.inf, loss))


def partly_invalid_losses(genomes, weights):
    return jnp.stack([partly_invalid_loss(genomes, weights), interaction_loss(genomes, -weights)], axis=1)


WEIGHTS = jax.random.normal(jax.random.key(5), (16, 16))
STRATEGY = {name: strategy(POPULATION, GENOME) for name, strategy in STRATEGIES.items()}
LOSS = {name: three_losses if name.endswith("front") else interaction_loss for name in STRATEGIES}


def search(name, generations=40, evaluate=None, seed=0, **options):
    strategy = STRATEGY[name]
    options = {"chunk": 20} | options
    evaluate = evaluate or LOSS[name]
    key = jax.random.key(seed)
    return run_search(strategy, strategy.default_params, evaluate, WEIGHTS, key, generations, **options)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_enumeration_is_complete():
    assert ALL_MASKS.shape == (4900, 16) and len(np.unique(ALL_MASKS, axis=0)) == 4900


def test_discrete_ga_finds_the_optimum_for_every_seed():
    optimum = float(np.min(interaction_loss(ALL_MASKS, WEIGHTS)))
    for seed in range(5):
        result = search("discrete_ga", seed=seed)
        assert result.best_fitness == pytest.approx(optimum, abs=1e-4)
        assert result.evaluations == 40 * POPULATION < len(ALL_MASKS)
        assert np.all(np.diff(result.history["best_fitness"]) <= 0)
        assert_same(result.best_genome.reshape(2, 8).sum(axis=1), np.array([4, 4]))


def test_nsga2_finds_the_whole_front():
    objectives = np.asarray(three_losses(ALL_MASKS, WEIGHTS))
    exact = np.unique(objectives[is_non_dominated(objectives)], axis=0)
    result = search("nsga2_front", generations=120)
    assert result.evaluations < len(ALL_MASKS)
    found = np.unique(result.fitness, axis=0)
    assert 5 < len(exact) < POPULATION  # a front that fits into the population
    np.testing.assert_allclose(found, exact, atol=1e-4)
    assert len(np.unique(result.genomes, axis=0)) == len(result.genomes)
    reference = objectives.max(axis=0) + 1
    assert hypervolume(found, reference) == pytest.approx(hypervolume(exact, reference))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_counts_and_resumes_bit_for_bit(name):
    whole = search(name)
    statuses = []
    half = search(name, on_chunk=lambda status: statuses.append(status) or status.generation == 20)  # cancels at 20
    assert [status.generation for status in statuses] == [20] and half.evaluations == 20 * POPULATION
    # The state survives as plain arrays, here through text.
    leaves, structure = jax.tree.flatten(statuses[0].state)
    stored = json.loads(json.dumps([[str(leaf.dtype), np.asarray(leaf).tolist()] for leaf in leaves]))
    state = jax.tree.unflatten(structure, [jnp.asarray(values, dtype) for dtype, values in stored])
    rest = search(name, state=state, seed=99)  # the key is in the state
    assert_same((whole.state, whole.genomes, whole.fitness), (rest.state, rest.genomes, rest.fitness))
    joined = {column: np.concatenate([half.history[column], rest.history[column]]) for column in whole.history}
    assert_same(whole.history, joined)
    np.testing.assert_array_equal(whole.history["evaluations"], POPULATION * np.arange(1, 41))
    np.testing.assert_allclose(LOSS[name](jnp.asarray(whole.genomes), WEIGHTS), whole.fitness, rtol=1e-5, atol=1e-4)
    assert np.all(whole.genomes.reshape(-1, 2, 8).sum(axis=2) == 4)


def test_initial_genomes_are_evaluated_and_kept():
    best = ALL_MASKS[np.argmin(interaction_loss(ALL_MASKS, WEIGHTS))]
    result = search("discrete_ga", generations=20, initial=jnp.asarray(best)[None])
    assert_same(result.best_genome, best)
    assert result.history["best_fitness"][0] == result.best_fitness


def test_seeds_vectorise_and_rates_do_not_recompile():
    strategy = STRATEGY["discrete_ga"]
    params = strategy.default_params
    keys = jax.random.split(jax.random.key(3), 3)
    traces = []

    @jax.jit
    def run(params, keys, weights):
        traces.append(1)

        def one(key):
            state = start_search(strategy, params, interaction_loss, weights, key)
            return advance_search(strategy, interaction_loss, 20, state, params, weights)[0].strategy.best_fitness

        return jax.vmap(one)(keys)

    together = run(params, keys, WEIGHTS)
    apart = [run_search(strategy, params, interaction_loss, WEIGHTS, key, 20, 20).best_fitness for key in keys]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    run(params.replace(edits=jnp.float32(1.0), crossover_rate=jnp.float32(0.1)), keys, WEIGHTS)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["discrete_ga", "local_search", "nsga2_front"])  # the others share their tell
def test_invalid_fitness_never_enters(name):
    result = search(name, evaluate=partly_invalid_losses if name.endswith("front") else partly_invalid_loss)
    assert np.all(np.isfinite(result.fitness)) and len(result.fitness) > 0
    assert not np.any(result.genomes[:, :2])  # whoever keeps expert 0 or 1 is invalid
    # 1 - C(6, 4) / C(8, 4) = 55/70 of random masks are invalid; the first generation is random.
    assert abs(result.history["num_invalid"][0] - POPULATION * 55 / 70) < 5 * np.sqrt(POPULATION * 55 / 70 * 15 / 70)


def test_local_search_chains_never_worsen_and_are_independent():
    result = search("local_search")
    assert result.history["best_fitness"].shape == (40, POPULATION)
    assert np.all(np.diff(result.history["best_fitness"], axis=0) <= 0)
    np.testing.assert_array_equal(result.history["best_fitness"][-1], result.state.strategy.fitness)
    assert result.best_fitness == result.history["best_fitness"].min()


def test_the_search_beats_random_search_at_equal_evaluations():
    wins = [
        search("discrete_ga", 20, seed=s).best_fitness <= search("random_search", 20, seed=s).best_fitness
        for s in range(8)
    ]
    assert sum(wins) >= 7  # by chance with probability 9/256


def slow_greedy(weights, total, least):
    """The same removals, one evaluation at a time; the removals and the number of evaluations."""
    keep, removed, evaluations = np.ones((2, 8), int), [], 0
    while keep.sum() > total:
        candidates = []
        for layer, expert in np.argwhere(keep):
            if keep[layer].sum() > least:
                trial = keep.copy()
                trial[layer, expert] = 0
                candidates.append((float(interaction_loss(trial.reshape(1, 16), weights)[0]), layer, expert))
        evaluations += len(candidates)
        _, layer, expert = min(candidates)
        keep[layer, expert] = 0
        removed.append((layer, expert))
    return removed, evaluations


def greedy(max_evaluations, evaluate=interaction_loss, **options):
    start = LayerTopology(jnp.ones((2, 8), bool), jnp.full(2, 2))
    return greedy_removal(GENOME, evaluate, WEIGHTS, start, 8, 4, POPULATION, max_evaluations, **options)


def test_greedy_removal_matches_the_loop():
    removed, evaluations = slow_greedy(WEIGHTS, 8, 4)
    result = greedy(10_000)
    assert list(zip(result.history["layer"], result.history["expert"], strict=True)) == removed
    assert result.evaluations == evaluations + 1 and np.all(result.history["is_exact"])
    assert result.best_fitness == pytest.approx(result.history["best_fitness"][-1])
    assert_same(result.best_genome.reshape(2, 8).sum(axis=1), np.array([4, 4]))


def test_greedy_removal_falls_back_to_its_last_ranking():
    # 16 + 15 evaluations and the one held back: two exact steps, the other six in the order of the second.
    result = greedy(32)
    np.testing.assert_array_equal(result.history["is_exact"], [True, True] + [False] * 6)
    assert result.evaluations == 32
    keep = np.ones(16, bool)
    keep[result.history["layer"][0] * 8 + result.history["expert"][0]] = False
    losses = {
        i: float(interaction_loss((keep & (np.arange(16) != i)).astype(int)[None], WEIGHTS)[0])
        for i in np.flatnonzero(keep)
    }
    expected, removed = [], {0: 0, 1: 0}
    removed[int(result.history["layer"][0])] += 1
    for i in sorted(losses, key=losses.get):
        if removed[i // 8] < 4:
            expected.append(i)
            removed[i // 8] += 1
    np.testing.assert_array_equal(result.history["layer"][1:] * 8 + result.history["expert"][1:], expected)
    with pytest.raises(ValueError, match="do not cover the first step"):
        greedy(16)


def test_greedy_removal_avoids_invalid_masks_and_can_be_stopped():
    def invalid_without_expert_2(genomes, weights):
        return jnp.where(genomes[:, 2] == 0, jnp.nan, interaction_loss(genomes, weights))

    result = greedy(10_000, invalid_without_expert_2)
    assert result.best_genome[2] == 1 and np.all(result.history["num_invalid"][:4] <= 1)
    assert result.history["num_invalid"].sum() > 0
    steps = []
    stopped = greedy(10_000, on_step=lambda evaluations, left: steps.append((evaluations, left)) or left == 14)
    assert steps == [(16, 15), (31, 14)] and stopped.best_genome.sum() == 14


def test_chunks_and_seeds_reuse_one_program():
    strategy = DiscreteGA(16, GENOME)
    traces = []

    def counted(genomes, weights):
        traces.append(1)
        return interaction_loss(genomes, weights)

    for seed in range(3):
        run_search(strategy, strategy.default_params, counted, WEIGHTS, jax.random.key(seed), 10, 5)
    assert len(traces) == 2  # once for the shape of its result, once for the program
