"""NSGA2: the elitist multi-objective search of Deb et al. (2002, IEEE TEC 6(2)), as an evosax strategy.

Parents and offspring compete together: whole fronts survive in the order of their rank, the last one thinned by
crowding distance. The first front of the population is the archive. Minimises every objective.

Two departures from the paper, both because evaluations are dear and genomes discrete: a genome that occurs twice
counts once (its repeats rank behind everything valid), and an individual with an objective that is not finite ranks
last, never enters the front, and is counted in the metrics.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm
from evosax.types import Metrics
from evosax.types import State as BaseState
from flax import struct

from moe_jax.evolution.breeding import Params, breed, default_params
from moe_jax.evolution.genomes import Genome
from moe_jax.evolution.operators import is_repeat
from moe_jax.evolution.pareto import crowding_distance, non_dominated_ranks
from moe_jax.types import Array


@struct.dataclass
class State(BaseState):
    """The population, best first.

    Attributes:
      population: `[P, N]` int32.
      objectives: `[P, M]` float32; +inf in every objective of an invalid individual.
      rank: `[P]` int32; 0 is the front. Repeats and invalid individuals have a rank that no front reaches.
      fitness: `[P]` float32, place in the order by (rank, crowding distance), which is what tournaments compare.
      generation_counter: `[]` int32.
    """

    population: Array
    objectives: Array
    rank: Array
    fitness: Array
    generation_counter: Array


class NSGA2(PopulationBasedAlgorithm):
    """Non-dominated sorting genetic algorithm II on integer genomes."""

    def __init__(self, population_size: int, genome: Genome, tournament_size: int = 2):
        """Builds the strategy.

        Args:
          population_size: P; also the number of offspring and the largest size of the front.
          genome: the genome kind.
          tournament_size: entrants of each tournament by (rank, crowding distance); 2 in the paper.
        """
        super().__init__(population_size, jnp.zeros(genome.size, jnp.int32))
        self.genome = genome
        self.tournament_size = tournament_size

    @property
    def _default_params(self) -> Params:
        return default_params()

    @partial(jax.jit, static_argnames=("self",))
    def init(self, key: Array, population: Array, fitness: Array, params: Params) -> State:
        """The state of an evaluated `[P, N]` population with objectives `fitness` `[P, M]`."""
        return self._survive(population, fitness, jnp.int32(0))

    @partial(jax.jit, static_argnames=("self",))
    def tell(
        self, key: Array, population: Array, fitness: Array, state: State, params: Params
    ) -> tuple[State, Metrics]:
        """Merges the asked `[P, N]` population, with objectives `fitness` `[P, M]`, into the state.

        Returns:
          The state, and the metrics `best_fitness` `[M]` (each objective's best over the front), `mean_fitness` `[M]`
          over the valid offspring, `num_front` and `num_invalid`.
        """
        is_valid = jnp.all(jnp.isfinite(fitness), axis=1)
        pool = jnp.concatenate([state.population, population])
        objectives = jnp.concatenate([state.objectives, fitness])
        state = self._survive(pool, objectives, state.generation_counter + 1)
        in_front = state.rank == 0
        num_valid = jnp.sum(is_valid)
        metrics = {
            "best_fitness": jnp.min(jnp.where(in_front[:, None], state.objectives, jnp.inf), axis=0),
            "mean_fitness": jnp.sum(jnp.where(is_valid[:, None], fitness, 0.0), axis=0) / num_valid,
            "num_front": jnp.sum(in_front),
            "num_invalid": self.population_size - num_valid,
        }
        return state, metrics

    def get_best_solution(self, state: State) -> Array:
        """The first individual of the front, `[N]`; among several objectives there is no single best one."""
        return state.population[0]

    def _ask(self, key: Array, state: State, params: Params) -> tuple[Array, State]:
        return breed(key, self.genome, state.population, state.fitness, params, self.tournament_size), state

    def _survive(self, pool: Array, objectives: Array, generation: Array) -> State:
        """The best P of a pool by (rank, crowding distance); repeats and then invalid ones come last."""
        pool_size = pool.shape[0]
        is_valid = jnp.all(jnp.isfinite(objectives), axis=1)
        objectives = jnp.where(is_valid[:, None], objectives, jnp.inf)
        is_eligible = is_valid & ~is_repeat(pool, is_valid)
        rank = non_dominated_ranks(objectives, is_eligible)
        crowding = crowding_distance(objectives, rank)
        rank = jnp.where(is_valid, rank, pool_size + 1)
        survivors = jnp.lexsort((-crowding, rank))[: self.population_size]
        return State(
            population=pool[survivors],
            objectives=objectives[survivors],
            rank=rank[survivors],
            fitness=jnp.where(is_valid[survivors], jnp.arange(self.population_size, dtype=jnp.float32), jnp.inf),
            generation_counter=generation,
        )
