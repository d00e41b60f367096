"""Searches without evolution, for comparison at equal evaluations: random, local, greedy.

Random and local search are strategies too, so that `run_search` gives them the initialisation, repair, chunks,
resumption, handling of invalid fitness and count of evaluations that the evolutionary ones get. Greedy removal needs
another number of evaluations at every step and has its own loop on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based.base import State

from moe_jax.evolution.breeding import Params
from moe_jax.evolution.discrete_ga import DiscreteGA
from moe_jax.evolution.genomes import Genome, LayerTopology
from moe_jax.evolution.nsga2 import NSGA2
from moe_jax.evolution.nsga2 import State as FrontState
from moe_jax.evolution.search import EvaluateFn, SearchResult
from moe_jax.types import Array, ArrayTree


def _random_genomes(key: Array, genome: Genome, population_size: int) -> Array:
    """`[P, N]` independent genomes from the initial distribution."""
    return jax.vmap(genome.random)(jax.random.split(key, population_size))


class RandomSearch(DiscreteGA):
    """Every population is drawn like the first; the state keeps the best. One objective."""

    def _ask(self, key: Array, state: State, params: Params) -> tuple[Array, State]:
        return _random_genomes(key, self.genome, self.population_size), state


class RandomFront(NSGA2):
    """Random search with several objectives; the state keeps the front, at most P of it, as NSGA2 does."""

    def _ask(self, key: Array, state: FrontState, params: Params) -> tuple[Array, FrontState]:
        return _random_genomes(key, self.genome, self.population_size), state


class LocalSearch(DiscreteGA):
    """P independent (1+1) chains side by side: mutate, keep the child unless it is worse. No restarts.

    Chain `i` is row `i` of the state's population, so a run is P seeds of a search with one evaluation a generation;
    `best_fitness` and `mean_fitness` of its history are `[G, P]` and `[G]`.
    """

    def _ask(self, key: Array, state: State, params: Params) -> tuple[Array, State]:
        key_mutate, key_repair = jax.random.split(key)
        return self.genome.repair(key_repair, self.genome.mutate(key_mutate, state.population, params.edits)), state

    def _tell(self, key: Array, population: Array, fitness: Array, state: State, params: Params) -> State:
        is_accepted = fitness <= state.fitness
        return state.replace(
            population=jnp.where(is_accepted[:, None], population, state.population),
            fitness=jnp.where(is_accepted, fitness, state.fitness),
        )

    @partial(jax.jit, static_argnames=("self",))
    def tell(self, key: Array, population: Array, fitness: Array, state: State, params: Params) -> tuple[State, dict]:
        """As in DiscreteGA, with each chain's own best in the metrics."""
        state, metrics = super().tell(key, population, fitness, state, params)
        return state, metrics | {"best_fitness": state.fitness}


def greedy_removal(
    genome: Genome,
    evaluate: EvaluateFn,
    data: ArrayTree,
    start: LayerTopology,
    total: int,
    min_per_layer: int,
    batch_size: int,
    max_evaluations: int,
    on_step: Callable[[int, int], bool | None] | None = None,
) -> SearchResult:
    """Removes experts one at a time, always the one whose loss hurts least, until `total` are left.

    A step evaluates every removal that the minimum allows, in batches of a fixed size (a short one is filled up, and
    the filling is not counted). Where the budget does not cover a whole step, it and all later ones follow the
    ranking of the last complete step. One evaluation is held back for the final mask.

    Args:
      genome: a mask genome (alone or combined) whose `encode` represents every mask on the way.
      evaluate: fitness `[P]` of genomes `[P, N]`, one objective.
      data: problem data.
      start: where to begin, usually all experts; `num_choices` stays as it is.
      total: experts to keep.
      min_per_layer: least experts kept in a layer.
      batch_size: P of the evaluations, a program of its own; limited by memory as a population is.
      max_evaluations: budget, at least 1.
      on_step: called with (evaluations so far, experts left) after each step; a true return ends the search there.

    Returns:
      A SearchResult with the final genome. A history row is one removal: `evaluations` so far, `best_fitness` of the
      mask after it (NaN if not evaluated), `layer`, `expert`, `is_exact` (chosen by evaluation), `num_invalid`.
    """
    keep, num_choices = np.array(start.keep, bool), start.num_choices
    evaluate_batch = jax.jit(evaluate)
    evaluations, rows, is_exact = 0, [], True
    ranking = np.empty((0, 2), np.int64)  # (layer, expert), the least harmful first

    def fitness_of(masks: list[np.ndarray]) -> np.ndarray:
        genomes = np.stack([np.asarray(genome.encode(LayerTopology(jnp.asarray(mask), num_choices))) for mask in masks])
        padded = np.resize(genomes, (-(-len(genomes) // batch_size) * batch_size, genomes.shape[1]))
        batches = padded.reshape(-1, batch_size, genomes.shape[1])
        values = np.concatenate([np.asarray(evaluate_batch(jnp.asarray(batch), data)) for batch in batches])
        return values[: len(masks)]

    while keep.sum() > total:
        removable = np.argwhere(keep & (keep.sum(axis=1, keepdims=True) > min_per_layer))
        is_exact = is_exact and evaluations + len(removable) + 1 <= max_evaluations
        best_fitness, num_invalid = np.nan, 0
        if is_exact:
            fitness = fitness_of([_without(keep, *expert) for expert in removable])
            num_invalid = int(np.sum(~np.isfinite(fitness)))
            fitness = np.where(np.isfinite(fitness), fitness, np.inf)
            evaluations += len(removable)
            ranking = removable[np.argsort(fitness, kind="stable")]
            best_fitness = fitness.min()
        elif not len(ranking):
            raise ValueError(f"{max_evaluations} evaluations do not cover the first step, which takes {len(removable)}")
        allowed = {tuple(expert) for expert in removable}
        layer, expert = next(tuple(candidate) for candidate in ranking if tuple(candidate) in allowed)
        keep = _without(keep, layer, expert)
        rows.append((evaluations, best_fitness, layer, expert, is_exact, num_invalid))
        if on_step is not None and on_step(evaluations, int(keep.sum())):
            break
    final = fitness_of([keep])
    names = ("evaluations", "best_fitness", "layer", "expert", "is_exact", "num_invalid")
    history = dict(zip(names, (np.array(column) for column in zip(*rows, strict=True)), strict=True))
    genomes = np.asarray(genome.encode(LayerTopology(jnp.asarray(keep), num_choices)))[None]
    return SearchResult(genomes, final, evaluations + 1, history, None)


def _without(keep: np.ndarray, layer: int, expert: int) -> np.ndarray:
    """A copy of the `[L, E]` mask with one expert removed."""
    keep = keep.copy()
    keep[layer, expert] = False
    return keep
