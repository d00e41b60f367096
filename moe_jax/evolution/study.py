"""A study: search methods side by side on one trained model, at equal evaluations, from the same starts.

At a fixed number of experts (one objective, KL to the full model on the search split):

    GA, mask / GA, budget      DiscreteGA over which experts stay / over how many stay per layer, in REAP's order
    random search              the GA's genome, starts and repair, no selection
    (1+1) local search         one chain per seed, started from the best one-shot mask
    greedy removal             one expert at a time; when the evaluations run out, by the last complete ranking
    frequency, gate_sum, reap, gate_norm     no search: equal budgets, the most salient experts of every layer

Over three objectives: NSGA-II, random search with the same genome and starts, and the saliency ladder, which keeps the
most salient experts at every size and every k and needs no search.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm
from flax import nnx

from moe_jax.evolution.baselines import LocalSearch, RandomFront, RandomSearch, greedy_removal
from moe_jax.evolution.discrete_ga import DiscreteGA
from moe_jax.evolution.genomes import Genome, LayerTopology, budget_genome, combine, mask_genome, top_k_genome
from moe_jax.evolution.nsga2 import NSGA2
from moe_jax.evolution.population import PopulationData, PopulationEvaluator
from moe_jax.evolution.saliency import SALIENCIES, prune_uniformly
from moe_jax.evolution.search import EvaluateFn, SearchResult, SearchState, SearchStatus, run_search
from moe_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """The search.

    Attributes:
      population: P of every population search.
      generations: generations, the initial population included; `population * generations` evaluations per search.
      chunk: generations between two checkpoints.
      seeds: independent searches of every method that has chance in it.
      kept_fraction: share of the experts that stay in the one-objective comparison.
      frozen_layers: leading MoE layers that stay whole and are computed once for all candidates.
      edits: expected mutations of a child.
      search_per_domain: sequences of each domain that the fitness is computed on.
      selection_per_domain: sequences of each domain of the selection split on which results are compared.
      front_per_domain: sequences of each domain of the test split on which fronts are reported.
      reference_kl: first coordinate of the hypervolume's fixed reference point, nats per byte.
      reference_load: its third coordinate, max/mean load; the second is the full model's FLOPs.
      memory_limit_mb: bound on the activations of one micro-batch of candidates; a larger one is slower on a CPU.
    """

    population: int = 32
    generations: int = 10
    chunk: int = 5
    seeds: int = 3
    kept_fraction: float = 0.5
    frozen_layers: int = 0
    edits: float = 1.0
    search_per_domain: int = 2
    selection_per_domain: int = 8
    front_per_domain: int = 8
    reference_kl: float = 1.0
    reference_load: float = 4.0
    memory_limit_mb: int = 128

    def __post_init__(self) -> None:
        """Refuses values no search can work with."""
        for name in ("population", "generations", "chunk", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"evolution.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.kept_fraction < 1:
            raise ValueError(f"evolution.kept_fraction must be in (0, 1), got {self.kept_fraction}")


class Search(NamedTuple):
    """A population search of a study. Keep the object: compiled programs hang on the identity of its strategy.

    Attributes:
      strategy: ask and tell, with its genome.
      evaluate: fitness `[P]` or objectives `[P, M]` of genomes.
      starts: `[I]` topologies that the initial population begins with.
      generations: until the evaluations are spent.
      chunk: generations between two looks of the host.
    """

    strategy: PopulationBasedAlgorithm
    evaluate: EvaluateFn
    starts: LayerTopology
    generations: int
    chunk: int


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Genomes, searches and starts of one model; made by `make_study`.

    Attributes:
      config: sizes of the search.
      total: experts kept in the one-objective comparison.
      one_shot: pruning without search, a topology per saliency.
      searches: the population searches by name.
      mask: evaluates masks of exactly `total` experts.
      front: evaluates any mask that leaves enough experts, with per-layer top-k; reads every other topology too.
      ladder: `[R]` topologies of the saliency ladder.
    """

    config: EvolutionConfig
    total: int
    one_shot: Mapping[str, LayerTopology]
    searches: Mapping[str, Search]
    mask: PopulationEvaluator
    front: PopulationEvaluator
    ladder: LayerTopology

    @property
    def evaluations(self) -> int:
        """The most evaluations that a method may spend."""
        return self.config.population * self.config.generations


def make_study(
    graphdef: nnx.GraphDef,
    model: DecoderConfig,
    saliency: Mapping[str, np.ndarray],
    config: EvolutionConfig,
    micro_batch: int,
) -> Study:
    """Builds the genomes and searches.

    Args:
      graphdef: structure of the decoder.
      model: its architecture.
      saliency: `[L, E]` per name, from `measure_saliency`.
      config: sizes of the search.
      micro_batch: candidates per compiled batch.
    """
    num_layers = model.num_moe_layers - config.frozen_layers
    num_experts, num_choices = model.num_experts, model.num_choices
    saliency = {name: values[config.frozen_layers :] for name, values in saliency.items()}
    least, most = num_layers * num_choices, num_layers * num_experts
    total = max(round(config.kept_fraction * most), least)

    def evaluator(genome: Genome) -> PopulationEvaluator:
        return PopulationEvaluator(graphdef, model, genome, micro_batch, config.frozen_layers)

    by_reap = np.argsort(-saliency["reap"], axis=1, kind="stable")
    mask = evaluator(mask_genome(num_layers, num_experts, total, num_choices, num_choices))
    budget = evaluator(budget_genome(jnp.asarray(by_reap), total, num_choices, num_choices))
    front = evaluator(
        combine(
            mask_genome(num_layers, num_experts, (least, most), num_choices, num_choices),
            top_k_genome(num_layers, num_experts, num_choices),
        )
    )
    one_shot = {name: prune_uniformly(saliency[name], total, num_choices) for name in SALIENCIES}
    starts = _stack(one_shot.values())
    rungs = [
        prune_uniformly(saliency["reap"], kept * num_layers, choices)
        for kept in range(num_choices, num_experts + 1)
        for choices in range(1, num_choices + 1)
    ]
    untouched = prune_uniformly(saliency["reap"], most, num_choices)
    size, rounds = config.population, (config.generations, config.chunk)
    chains = (config.population * config.generations, config.population * config.chunk)
    return Study(
        config,
        total,
        one_shot,
        {
            "GA, mask": Search(DiscreteGA(size, mask.genome), mask.divergence, starts, *rounds),
            # As budgets the one-shot masks are all the same, so one stands for them.
            "GA, budget": Search(
                DiscreteGA(size, budget.genome), budget.divergence, _stack([one_shot["reap"]]), *rounds
            ),
            "random search": Search(RandomSearch(size, mask.genome), mask.divergence, starts, *rounds),
            "(1+1) local search": Search(
                LocalSearch(config.seeds, mask.genome),
                mask.divergence,
                _stack([one_shot["reap"]] * config.seeds),
                *chains,
            ),
            "NSGA-II": Search(
                NSGA2(size, front.genome), front.objectives, _stack([untouched, *one_shot.values()]), *rounds
            ),
            "random front": Search(
                RandomFront(size, front.genome), front.objectives, _stack([untouched, *one_shot.values()]), *rounds
            ),
        },
        mask,
        front,
        _stack(rungs),
    )


def run_population_search(
    study: Study,
    name: str,
    data: PopulationData,
    seed: int,
    state: SearchState | None = None,
    on_chunk: Callable[[SearchStatus], bool | None] | None = None,
) -> tuple[LayerTopology, SearchResult]:
    """Runs or continues one of the study's searches with one seed.

    Args:
      study: from `make_study`.
      name: a key of `study.searches`.
      data: the search split, from `PopulationEvaluator.prepare`.
      seed: of the search.
      state: where to continue; None starts.
      on_chunk: sees the status between chunks; a true return stops.

    Returns:
      The best topology, or the front, or each chain's end: `keep [R, L', E]`, `num_choices [R, L']`; and the search's
      result.
    """
    strategy, evaluate, starts, generations, chunk = study.searches[name]
    initial = jax.vmap(strategy.genome.encode)(starts)[: strategy.population_size]
    result = run_search(
        strategy,
        strategy.default_params.replace(edits=jnp.float32(study.config.edits)),
        evaluate,
        data,
        jax.random.key(seed),
        generations,
        chunk,
        state=state,
        on_chunk=on_chunk,
        initial=initial,
    )
    genomes = result.genomes
    if isinstance(strategy, LocalSearch):
        assert result.state is not None  # a population search returns one
        genomes = np.asarray(result.state.strategy.population)
    return jax.vmap(strategy.genome.decode)(jnp.asarray(genomes)), result


def run_greedy(
    study: Study, data: PopulationData, on_step: Callable[[int, int], bool | None] | None = None
) -> tuple[LayerTopology, SearchResult]:
    """Greedy removal from all experts down to the study's total, within its evaluations; see `greedy_removal`."""
    model, genome = study.mask.config, study.front.genome
    untouched = jax.tree.map(lambda side: side[-1], study.ladder)
    result = greedy_removal(
        genome,
        study.front.divergence,
        data,
        untouched,
        study.total,
        model.num_choices,
        study.config.population,
        study.evaluations,
        on_step,
    )
    return jax.vmap(genome.decode)(jnp.asarray(result.genomes)), result


def _stack(topologies: Iterable[LayerTopology]) -> LayerTopology:
    """Topologies with a new leading axis."""
    return LayerTopology(*(jnp.stack(side) for side in zip(*topologies, strict=True)))
