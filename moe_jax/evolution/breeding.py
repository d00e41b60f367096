"""One generation of offspring: tournament, crossover, mutation, repair; for one objective and for several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from evosax.algorithms.population_based.base import Params as BaseParams
from flax import struct

from moe_jax.evolution.genomes import Genome
from moe_jax.evolution.operators import crossover, is_repeat, select_tournament
from moe_jax.types import Array

_MAX_ATTEMPTS = 3


@struct.dataclass
class Params(BaseParams):
    """Rates, all traced: changing them recompiles nothing.

    Attributes:
      crossover_rate: `[]` probability that a child has two parents.
      crossover_mix: `[3]` weights of one-point, two-point and uniform crossover.
      edits: `[]` expected number of mutations of a child (of each part of a combined genome).
    """

    crossover_rate: Array
    crossover_mix: Array
    edits: Array


def default_params() -> Params:
    """Crossover in 90 % of the children, each kind equally often, and two edits a child."""
    return Params(
        crossover_rate=jnp.float32(0.9), crossover_mix=jnp.full(3, 1 / 3, jnp.float32), edits=jnp.float32(2.0)
    )


def breed(key: Array, genome: Genome, population: Array, fitness: Array, params: Params, tournament_size: int) -> Array:
    """Offspring of a population, one for each individual.

    A child that repeats a living individual or an earlier sibling would waste an evaluation; it is mutated again.

    Args:
      key: PRNG key, consumed.
      genome: the genome kind.
      population: `[P, N]` int32.
      fitness: `[P]` float32, lower is better; +inf for invalid.
      params: rates.
      tournament_size: entrants of each tournament.

    Returns:
      `[P, N]` int32, valid genomes.
    """
    size = population.shape[0]
    key_select, key_cross, key_edit = jax.random.split(key, 3)
    parents = population[select_tournament(key_select, fitness, 2 * size, tournament_size)]
    children = crossover(key_cross, parents[:size], parents[size:], params.crossover_rate, params.crossover_mix)

    def is_needed(carry: tuple[Array, Array, Array]) -> Array:
        attempt, _, is_unfinished = carry
        return (attempt < _MAX_ATTEMPTS) & jnp.any(is_unfinished)

    def edit(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        attempt, children, is_unfinished = carry
        key_mutate, key_repair = jax.random.split(jax.random.fold_in(key_edit, attempt))
        edited = genome.repair(key_repair, genome.mutate(key_mutate, children, params.edits))
        children = jnp.where(is_unfinished[:, None], edited, children)
        known = jnp.concatenate([population, children])
        return attempt + 1, children, is_repeat(known, jnp.ones(2 * size, bool))[size:]

    # The first round mutates every child, the later ones those that repeat something.
    return jax.lax.while_loop(is_needed, edit, (jnp.int32(0), children, jnp.ones(size, bool)))[1]
