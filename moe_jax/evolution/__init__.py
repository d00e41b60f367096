"""Evolution of routing topologies: genomes, evosax strategies on them, the search loop and its baselines."""

from moe_jax.evolution.baselines import LocalSearch, RandomFront, RandomSearch, greedy_removal
from moe_jax.evolution.breeding import Params
from moe_jax.evolution.discrete_ga import DiscreteGA
from moe_jax.evolution.genomes import (
    Genome,
    LayerTopology,
    budget_genome,
    combine,
    decode_population,
    mask_genome,
    top_k_genome,
)
from moe_jax.evolution.nsga2 import NSGA2
from moe_jax.evolution.pareto import hypervolume, is_non_dominated
from moe_jax.evolution.search import (
    EvaluateFn,
    SearchResult,
    SearchState,
    SearchStatus,
    advance_search,
    run_search,
    start_search,
)

__all__ = [
    "NSGA2",
    "STRATEGIES",
    "DiscreteGA",
    "EvaluateFn",
    "Genome",
    "LayerTopology",
    "LocalSearch",
    "Params",
    "RandomFront",
    "RandomSearch",
    "SearchResult",
    "SearchState",
    "SearchStatus",
    "advance_search",
    "budget_genome",
    "combine",
    "decode_population",
    "greedy_removal",
    "hypervolume",
    "is_non_dominated",
    "mask_genome",
    "run_search",
    "start_search",
    "top_k_genome",
]

# (population_size, genome) -> strategy. Those named "front" take several objectives.
STRATEGIES = {
    "discrete_ga": DiscreteGA,
    "random_search": RandomSearch,
    "local_search": LocalSearch,
    "nsga2_front": NSGA2,
    "random_front": RandomFront,
}
