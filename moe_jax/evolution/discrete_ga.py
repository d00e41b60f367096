"""DiscreteGA: an elitist genetic algorithm on integer genomes, as an evosax strategy (evosax 0.3.2 has none).

The next population is the best P of the offspring and the elite of the old one, so the best individual is never lost
and no individual is evaluated twice for surviving. Minimises. A fitness that is not finite counts as +inf: it loses
against every finite one, never becomes the best, and is counted in the metrics.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm, State
from evosax.types import Metrics

from moe_jax.evolution.breeding import Params, breed, default_params
from moe_jax.evolution.genomes import Genome
from moe_jax.types import Array


def search_metrics(key: Array, population: Array, fitness: Array, state: State, params: Params) -> Metrics:
    """What one generation reports (evosax's own metrics would stack whole genomes through the scan).

    Args:
      key: unused, part of evosax's signature.
      population: `[P, N]` the offspring.
      fitness: `[P]` their fitness, +inf where invalid.
      state: the state, whose best already includes the offspring.
      params: unused, part of evosax's signature.

    Returns:
      `best_fitness` so far, `mean_fitness` of the valid offspring (NaN if there is none), `num_invalid`.
    """
    is_valid = jnp.isfinite(fitness)
    num_valid = jnp.sum(is_valid)
    mean = jnp.sum(jnp.where(is_valid, fitness, 0.0)) / num_valid
    return {"best_fitness": state.best_fitness, "mean_fitness": mean, "num_invalid": fitness.size - num_valid}


class DiscreteGA(PopulationBasedAlgorithm):
    """Tournament selection, mixed crossover, mutation with repair, elitism."""

    def __init__(self, population_size: int, genome: Genome, tournament_size: int = 3, elite_ratio: float = 0.1):
        """Builds the strategy.

        Args:
          population_size: P; the offspring of a generation are also P.
          genome: the genome kind.
          tournament_size: entrants of each tournament.
          elite_ratio: share of the old population that competes with the offspring; at least one individual does.
        """
        super().__init__(population_size, jnp.zeros(genome.size, jnp.int32), metrics_fn=search_metrics)
        self.genome = genome
        self.tournament_size = tournament_size
        self.elite_ratio = elite_ratio

    @property
    def _default_params(self) -> Params:
        return default_params()

    @partial(jax.jit, static_argnames=("self",))
    def tell(
        self, key: Array, population: Array, fitness: Array, state: State, params: Params
    ) -> tuple[State, Metrics]:
        """Updates the state with the fitness `[P]` of the asked `[P, N]` population."""
        return super().tell(key, population, jnp.where(jnp.isfinite(fitness), fitness, jnp.inf), state, params)

    def _init(self, key: Array, params: Params) -> State:
        return State(
            population=jnp.zeros((self.population_size, self.num_dims), jnp.int32),
            fitness=jnp.full(self.population_size, jnp.inf),
            best_solution=jnp.zeros(self.num_dims, jnp.int32),
            best_fitness=jnp.float32(jnp.inf),
            generation_counter=jnp.int32(0),
        )

    def _ask(self, key: Array, state: State, params: Params) -> tuple[Array, State]:
        return breed(key, self.genome, state.population, state.fitness, params, self.tournament_size), state

    def _tell(self, key: Array, population: Array, fitness: Array, state: State, params: Params) -> State:
        # Offspring first: among equals the sort keeps the younger, so the search can drift across plateaus.
        elite = jnp.argsort(state.fitness)[: self.num_elites]
        pool = jnp.concatenate([population, state.population[elite]])
        pool_fitness = jnp.concatenate([fitness, state.fitness[elite]])
        survivors = jnp.argsort(pool_fitness)[: self.population_size]
        return state.replace(population=pool[survivors], fitness=pool_fitness[survivors])
