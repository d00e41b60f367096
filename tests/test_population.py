"""Fitness of topologies on a real decoder against one candidate at a time, and the searches of a study on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.evolution import LayerTopology, combine, mask_genome, top_k_genome
from moe_jax.evolution.population import OBJECTIVES, PopulationEvaluator, candidates_that_fit
from moe_jax.evolution.saliency import measure_saliency
from moe_jax.evolution.study import EvolutionConfig, make_study, run_greedy, run_population_search
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.routing import single_topology
from tests.tiny_model import TINY

CONFIG = dataclasses.replace(TINY, backend="blocked")
LAYERS, EXPERTS, CHOICES = CONFIG.num_moe_layers, CONFIG.num_experts, CONFIG.num_choices
GENOME = combine(mask_genome(LAYERS, EXPERTS, (4, 8), 2, CHOICES), top_k_genome(LAYERS, EXPERTS, CHOICES))
GRAPHDEF, STATE = nnx.split(Decoder(CONFIG, key=jax.random.key(0)))
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, CONFIG.vocab_size)
MASK = jnp.arange(7)[None, :] < jnp.array([7, 4, 6])[:, None]  # 17 of 21 positions
# The population, the full topology first; the others differ from it and from one another.
KEEP = np.array(
    [
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 0, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 0, 0], [0, 0, 1, 1]],
        [[1, 1, 1, 1], [0, 1, 1, 0]],
        [[0, 1, 1, 1], [1, 0, 0, 1]],
    ],
    bool,
)
NUM_CHOICES = np.array([[2, 2], [2, 2], [2, 1], [2, 2], [1, 1]], np.int32)
POPULATION = len(KEEP)


def encode(genome, keep, num_choices):
    return jax.vmap(genome.encode)(LayerTopology(jnp.asarray(keep), jnp.asarray(num_choices)))


def evaluate(evaluator, genomes, data):
    return np.asarray(jax.jit(evaluator.objectives)(genomes, data))


@jax.jit
def run_one(topology):
    return nnx.merge(GRAPHDEF, STATE)(TOKENS, MASK, topology, trace="topk")


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def slow_objectives(keep, num_choices):
    """One candidate: a plain forward pass, then loops over positions, layers and slots."""
    reference, _ = run_one(single_topology(np.ones_like(keep), np.full_like(num_choices, CHOICES)))
    logits, routed = run_one(single_topology(keep, num_choices))
    reference, logits = np.asarray(reference), np.asarray(logits)
    positions = [tuple(position) for position in np.argwhere(MASK)]
    divergence = 0.0
    for position in positions:
        full, other = log_softmax(reference[position]), log_softmax(logits[position])
        divergence += sum(np.exp(p) * (p - q) for p, q in zip(full, other, strict=True)) / len(positions)
    expert_ids = np.asarray(routed.plan.expert_ids).reshape(LAYERS, *TOKENS.shape, CHOICES)
    flops, load = 0.0, 0.0
    for layer in range(LAYERS):
        counts = np.zeros(EXPERTS)
        for position in positions:
            for expert in expert_ids[layer][position]:
                if expert < EXPERTS:
                    assert keep[layer][expert]
                    counts[expert] += 1
        flops += 2 * 3 * CONFIG.width * CONFIG.expert_hidden * counts.sum() / len(positions)
        load += counts.max() / counts[keep[layer]].mean() / LAYERS
    return np.array([divergence, flops, load])


@pytest.fixture(scope="module")
def expected():
    return np.stack([slow_objectives(*candidate) for candidate in zip(KEEP, NUM_CHOICES, strict=True)])


@pytest.fixture(scope="module")
def whole():
    """All candidates in one batch, and what they share."""
    evaluator = PopulationEvaluator(GRAPHDEF, CONFIG, GENOME, POPULATION)
    return evaluator, evaluator.prepare(STATE, TOKENS, MASK), encode(GENOME, KEEP, NUM_CHOICES)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, POPULATION, 64])
def test_objectives_equal_one_candidate_at_a_time(micro_batch, whole, expected):
    _, data, genomes = whole
    evaluator = PopulationEvaluator(GRAPHDEF, CONFIG, GENOME, micro_batch)
    values = evaluate(evaluator, genomes, data)
    assert values.shape == (POPULATION, len(OBJECTIVES)) and values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert np.all(values[1:, 0] > 1e-4)  # every other candidate differs from the full model by more than rounding


def test_the_full_topology_costs_nothing_and_the_smallest_is_cheapest(whole):
    values = evaluate(whole[0], whole[2], whole[1])
    assert abs(values[0, 0]) < 1e-6
    # 2 layers x 2 experts x 6 D F = 4 * 6 * 16 * 6 = 2304 FLOPs; with one choice in each layer half of it.
    np.testing.assert_array_equal(values[[0, 4], 1], [2304.0, 1152.0])
    # Layer 0 and 1 of candidate 2 keep two experts; with two choices both are always used: load 1 in layer 0.
    assert values[2, 2] <= (1 + 2) / 2 and np.all(values[:, 2] >= 1)


def test_candidates_do_not_see_each_other(whole):
    evaluator, data, genomes = whole
    order = np.array([3, 0, 4, 2, 1])
    values = evaluate(evaluator, genomes, data)
    np.testing.assert_allclose(evaluate(evaluator, genomes[order], data), values[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(evaluator.divergence)(genomes, data), values[:, 0])


def test_masked_tokens_are_inert(whole):
    evaluator, data, genomes = whole
    other = evaluator.prepare(STATE, jnp.where(MASK, TOKENS, 5), MASK)
    assert np.any(other.hidden != data.hidden)
    np.testing.assert_array_equal(evaluate(evaluator, genomes, other), evaluate(evaluator, genomes, data))


def test_frozen_layers_equal_open_layers(whole):
    evaluator, data, _ = whole
    last = combine(mask_genome(1, EXPERTS, (2, 4), 2, CHOICES), top_k_genome(1, EXPERTS, CHOICES))
    frozen = PopulationEvaluator(GRAPHDEF, CONFIG, last, 2, frozen_layers=1)
    keep, num_choices = KEEP.copy(), NUM_CHOICES.copy()
    keep[:, 0], num_choices[:, 0] = True, CHOICES
    assert (evaluator.first_layer, frozen.first_layer) == (1, 2)
    np.testing.assert_allclose(
        evaluate(frozen, encode(last, keep[:, 1:], num_choices[:, 1:]), frozen.prepare(STATE, TOKENS, MASK)),
        evaluate(evaluator, encode(GENOME, keep, num_choices), data),
        rtol=1e-4,
        atol=1e-6,
    )


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="push each other out"):
        PopulationEvaluator(GRAPHDEF, dataclasses.replace(CONFIG, capacity_factor=1.25), GENOME, 2)
    with pytest.raises(ValueError, match="candidates would change each other's routing"):
        config = dataclasses.replace(CONFIG, rule="expert_choice", allow_noncausal=True)
        PopulationEvaluator(GRAPHDEF, config, GENOME, 2)
    with pytest.raises(ValueError, match="frozen_layers=2 must leave"):
        PopulationEvaluator(GRAPHDEF, CONFIG, GENOME, 2, frozen_layers=2)


@pytest.mark.parametrize(
    ("config", "num_sequences", "length"),
    [
        (CONFIG, 3, 7),
        (DecoderConfig(layers=("moe", "moe")), 4, 64),
        (DecoderConfig(layers=("moe",), num_heads=8, num_experts=64, num_choices=8, expert_hidden=16), 2, 256),
        (DecoderConfig(layers=("moe",), width=32, vocab_size=4096, backend="gather", num_experts=4), 4, 32),
    ],
    ids=["tiny", "main job", "many choices, long", "vocabulary"],
)
def test_the_memory_estimate_is_safe(config, num_sequences, length):
    assert candidates_that_fit(config, num_sequences, length, 0) == 1
    limit = 100e6
    fit = candidates_that_fit(config, num_sequences, length, limit)
    assert fit > 2
    total = config.num_moe_layers * config.num_experts
    genome = mask_genome(config.num_moe_layers, config.num_experts, total, config.num_choices, config.num_choices)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))
    evaluator = PopulationEvaluator(graphdef, config, genome, fit)
    tokens = jax.ShapeDtypeStruct((num_sequences, length), jnp.int32)
    data = jax.eval_shape(evaluator.prepare, state, tokens, tokens.update(dtype=jnp.bool))
    genomes = jax.ShapeDtypeStruct((fit, genome.size), jnp.int32)
    used = jax.jit(evaluator.objectives).lower(genomes, data).compile().memory_analysis().temp_size_in_bytes
    assert limit / 5 < used <= limit


SEARCH = EvolutionConfig(population=6, generations=4, chunk=2, seeds=2)
FRONTS = ("NSGA-II", "random front")
# Each is a program of its own; the random ones differ from their neighbours in one line and take as long to compile.
SEARCHES = [
    "GA, mask",
    "GA, budget",
    pytest.param("random search", marks=pytest.mark.slow),
    "(1+1) local search",
    "NSGA-II",
    pytest.param("random front", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def study():
    return make_study(GRAPHDEF, CONFIG, measure_saliency(GRAPHDEF, STATE, TOKENS, MASK), SEARCH, micro_batch=3)


@pytest.fixture(scope="module")
def run(study, whole):
    """Runs a search of the study once, however many tests ask for it."""
    return functools.cache(lambda name: run_population_search(study, name, whole[1], seed=0))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_study_has_every_search(study):
    names = [getattr(entry, "values", (entry,))[0] for entry in SEARCHES]
    assert list(study.searches) == names
    assert study.total == 4 and study.evaluations == 24


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_keep_the_constraints_and_spend_equally(name, study, run, whole):
    topologies, result = run(name)
    chains = SEARCH.seeds if name == "(1+1) local search" else 1
    assert result.evaluations == study.evaluations * chains and result.history["num_invalid"].sum() == 0
    kept = np.asarray(topologies.keep).sum(axis=2)
    assert np.all(kept >= CHOICES) and topologies.num_choices.shape == kept.shape
    if name in FRONTS:
        return
    assert kept.shape == (chains, LAYERS) and np.all(kept.sum(axis=1) == study.total)
    candidates = [topologies, *(jax.tree.map(lambda side: side[None], start) for start in study.one_shot.values())]
    stacked = jax.tree.map(lambda *sides: jnp.concatenate(sides), *candidates)
    values = evaluate(whole[0], encode(GENOME, *stacked), whole[1])[:, 0]
    ends = result.state.strategy.fitness if chains > 1 else result.fitness
    np.testing.assert_allclose(values[:chains], ends, rtol=1e-4, atol=1e-6)
    # The searches over masks start from every one-shot mask (local search from REAP's), so they never end worse.
    one_shot = dict(zip(study.one_shot, values[chains:], strict=True))
    assert name == "GA, budget" or np.max(ends) <= (one_shot["reap"] if chains > 1 else min(one_shot.values())) + 1e-6


@pytest.mark.parametrize("name", ["GA, mask", "(1+1) local search", "NSGA-II"])
def test_a_stopped_search_continues_bit_for_bit(name, study, run, whole):
    (topologies, result), data, states = run(name), whole[1], []
    _, half = run_population_search(study, name, data, 0, on_chunk=lambda status: states.append(status.state) or True)
    assert half.evaluations == result.evaluations // 2
    saved = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), states[0])
    continued, rest = run_population_search(study, name, data, 99, saved)  # the seed is in the state
    assert_same((continued, rest.state, rest.fitness), (topologies, result.state, result.fitness))
    assert_same({key: np.concatenate([half.history[key], rest.history[key]]) for key in rest.history}, result.history)


def poisoned(data):
    """The data with NaN in one expert of the first MoE layer, and the healthy model's reference."""
    state = jax.tree.map(lambda leaf: leaf, data.state)
    w_in = state["stacks"][1]["feed_forward"]["experts"]["w_in"]
    w_in[...] = w_in[...].at[0, 1].set(jnp.nan)
    return data._replace(state=state)


def test_nan_weights_invalidate_the_candidates_that_use_them(whole):
    values = evaluate(whole[0], whole[2], poisoned(whole[1]))
    uses_expert = KEEP[:, 0, 1]
    np.testing.assert_array_equal(np.isnan(values[:, 0]), uses_expert)
    assert uses_expert.any() and not uses_expert.all()


@pytest.mark.parametrize("name", ["GA, mask", "NSGA-II"])
def test_invalid_topologies_are_counted_and_never_archived(name, study, whole):
    topologies, result = run_population_search(study, name, poisoned(whole[1]), 0)
    assert 0 < result.history["num_invalid"].sum() < 24
    assert np.all(np.isfinite(result.fitness)) and len(result.fitness) > 0
    assert not np.any(topologies.keep[:, 0, 1])
    everywhere = whole[1]._replace(state=jax.tree.map(lambda leaf: leaf * jnp.nan, whole[1].state))
    topologies, result = run_population_search(study, name, everywhere, 0)
    assert result.history["num_invalid"].sum() == 24 and not np.any(np.isfinite(result.fitness))
    assert name != "NSGA-II" or topologies.keep.shape == (0, LAYERS, EXPERTS)


def test_greedy_removal_stays_within_its_evaluations(study, whole):
    topologies, result = run_greedy(study, whole[1])
    # Steps of 8 and 7 removals are paid for; the next would make 22 and leave 1 for the final mask: 6 + 1 still fit.
    assert 8 + 7 < result.evaluations <= study.evaluations
    keep = np.asarray(topologies.keep)
    assert keep.shape == (1, LAYERS, EXPERTS) and keep.sum() == study.total and np.all(keep.sum(axis=2) >= CHOICES)
    values = evaluate(whole[0], encode(GENOME, *topologies), whole[1])
    np.testing.assert_allclose(values[0, 0], result.best_fitness, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("setting", "value"), [("population", 0), ("kept_fraction", 1.0), ("kept_fraction", 0.0)])
def test_impossible_sizes_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"evolution.{setting} must be"):
        dataclasses.replace(SEARCH, **{setting: value})
