"""The search loop: ask -> evaluate -> tell as one jitted scan per chunk of generations, with the host in between.

Generation 0 evaluates the initial population, so `generations` times the population size is the exact number of
evaluations. All randomness is `fold_in(key, generation)`: a search that is stopped between chunks and resumed from its
`SearchState` equals the uninterrupted one bit for bit. Strategy and evaluation are static, everything else (rates,
problem data, seed) is an argument of the compiled program, because XLA would fold data that is closed over into
constants at compile time. One program therefore serves every seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.population_based.base import PopulationBasedAlgorithm

from moe_jax.types import Array, ArrayTree

# (genomes [P, N] int32, data) -> fitness [P], or objectives [P, M]; lower is better. Pure and jittable.
EvaluateFn = Callable[[Array, ArrayTree], Array]


class SearchState(NamedTuple):
    """All that a resumed search needs: a pytree of plain arrays, to be saved and restored by the caller.

    Attributes:
      strategy: the strategy's own state.
      key: `[2]` uint32, data of the key that generations fold into.
      generation: `[]` int32 number of generations done.
    """

    strategy: ArrayTree
    key: Array
    generation: Array


class SearchStatus(NamedTuple):
    """What the host sees between two chunks.

    Attributes:
      generation: generations done.
      generations: generations asked for.
      evaluations: evaluations spent since generation 0.
      num_invalid: evaluations of this call whose fitness was not finite.
      genomes: `[R, N]` the best genome (R = 1), or the front.
      fitness: `[R]` or `[R, M]` their fitness.
      elapsed_s: wall seconds of this call.
      history: the chunk's rows of `SearchResult.history`.
      state: the state to save.
    """

    generation: int
    generations: int
    evaluations: int
    num_invalid: int
    genomes: np.ndarray
    fitness: np.ndarray
    elapsed_s: float
    history: dict[str, np.ndarray]
    state: SearchState


class SearchResult(NamedTuple):
    """What every search returns, baselines included.

    Attributes:
      genomes: `[R, N]` the best genome (R = 1), or the front of distinct genomes.
      fitness: `[R]` or `[R, M]` their fitness.
      evaluations: evaluations spent since generation 0.
      history: one row for each generation of this call: `generation`, `evaluations`, `best_fitness`, `mean_fitness`,
        `num_invalid` and what else the strategy reports.
      state: the last state; None for a search that cannot be resumed.
    """

    genomes: np.ndarray
    fitness: np.ndarray
    evaluations: int
    history: dict[str, np.ndarray]
    state: SearchState | None

    @property
    def best_genome(self) -> np.ndarray:
        """The first of `genomes`, `[N]`."""
        return self.genomes[0]

    @property
    def best_fitness(self) -> float:
        """Fitness of `best_genome`; of a search with one objective."""
        return float(self.fitness[0])


def start_search(
    strategy: PopulationBasedAlgorithm,
    params: Any,
    evaluate: EvaluateFn,
    data: ArrayTree,
    key: Array,
    initial: Array | None = None,
) -> SearchState:
    """The state before generation 0: an initial population that is still to be evaluated. Pure; evaluates nothing.

    Args:
      strategy: a strategy with a `genome`.
      params: its rates.
      evaluate: only asked for the shape of its result.
      data: problem data.
      key: PRNG key of the whole search.
      initial: `[I, N]` valid genomes that replace the first of the random ones (baselines to start from); I <= P.

    Returns:
      A SearchState at generation 0.
    """
    key_population, key_loop = jax.random.split(key)
    population = jax.vmap(strategy.genome.random)(jax.random.split(key_population, strategy.population_size))
    if initial is not None:
        population = population.at[: initial.shape[0]].set(initial)
    fitness = jnp.full(jax.eval_shape(evaluate, population, data).shape, jnp.inf, jnp.float32)
    state = strategy.init(key_loop, population, fitness, params)
    # init orders and archives by fitness, of which there is none yet.
    return SearchState(state.replace(population=population), jax.random.key_data(key_loop), jnp.int32(0))


def advance_search(
    strategy: PopulationBasedAlgorithm,
    evaluate: EvaluateFn,
    num_generations: int,
    state: SearchState,
    params: Any,
    data: ArrayTree,
) -> tuple[SearchState, Mapping[str, Array]]:
    """Runs some generations as one scan. Pure: jit it with three static arguments, vmap it over states (seeds).

    Args:
      strategy: ask and tell.
      evaluate: see `EvaluateFn`.
      num_generations: G, length of the scan.
      state: where to continue.
      params: the strategy's rates.
      data: problem data, handed to `evaluate`.

    Returns:
      The new state, and the strategy's metrics, each with a leading `[G]`.
    """

    def one_generation(state: SearchState, _: None) -> tuple[SearchState, Mapping[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.generation)
        key_ask, key_tell = jax.random.split(key)
        offspring, asked = strategy.ask(key_ask, state.strategy, params)
        # Generation 0 goes through the same program: the initial population takes the place of offspring.
        is_first = state.generation == 0
        genomes = jnp.where(is_first, state.strategy.population, offspring)
        told, metrics = strategy.tell(key_tell, genomes, evaluate(genomes, data), asked, params)
        return SearchState(told, state.key, state.generation + 1), metrics

    return jax.lax.scan(one_generation, state, None, length=num_generations)


_start = partial(jax.jit, static_argnums=(0, 2))(start_search)
_advance = partial(jax.jit, static_argnums=(0, 1, 2))(advance_search)


def run_search(
    strategy: PopulationBasedAlgorithm,
    params: Any,
    evaluate: EvaluateFn,
    data: ArrayTree,
    key: Array,
    generations: int,
    chunk: int,
    state: SearchState | None = None,
    on_chunk: Callable[[SearchStatus], bool | None] | None = None,
    initial: Array | None = None,
) -> SearchResult:
    """Runs a search, or continues one, up to a number of generations.

    Args:
      strategy: a strategy with a `genome`, such as `DiscreteGA`; reuse the object, its program is cached by identity.
      params: the strategy's rates.
      evaluate: see `EvaluateFn`; a module-level function or one kept by the caller, for the same reason.
      data: problem data, a pytree of arrays.
      key: PRNG key; a resumed search uses the one in `state` instead.
      generations: generations in all, the initial population and those before `state` included.
      chunk: generations between two looks of the host. Chunks end at multiples of it, so that an interrupted search
        resumes with the same program; a shorter last chunk costs a second compilation.
      state: state to resume from.
      on_chunk: called with a SearchStatus after every chunk; a true return stops the search there.
      initial: `[I, N]` genomes to put into the initial population.

    Returns:
      A SearchResult; after a stop, that of the generations done.
    """
    start = time.perf_counter()
    if state is None:
        state = _start(strategy, params, evaluate, data, key, initial)
    size = strategy.population_size
    chunks: list[dict[str, np.ndarray]] = []
    generation, num_invalid = int(state.generation), 0
    while generation < generations:
        length = min(chunk - generation % chunk, generations - generation)
        state, metrics = _advance(strategy, evaluate, length, state, params, data)
        done = np.arange(generation + 1, generation + length + 1)
        rows = {name: np.asarray(values) for name, values in metrics.items()}
        chunks.append({"generation": done, "evaluations": done * size} | rows)
        generation += length
        num_invalid += int(np.sum(rows["num_invalid"]))
        if on_chunk is not None:
            genomes, fitness = best_of(state.strategy)
            status = SearchStatus(
                generation,
                generations,
                generation * size,
                num_invalid,
                genomes,
                fitness,
                time.perf_counter() - start,
                chunks[-1],
                state,
            )
            if on_chunk(status):
                break
    genomes, fitness = best_of(state.strategy)
    history = {name: np.concatenate([rows[name] for rows in chunks]) for name in chunks[0]} if chunks else {}
    return SearchResult(genomes, fitness, generation * size, history, state)


def best_of(strategy_state: Any) -> tuple[np.ndarray, np.ndarray]:
    """The best genome `[1, N]` and fitness `[1]` of a strategy's state, or its front `[R, N]`, `[R, M]`."""
    if hasattr(strategy_state, "objectives"):
        in_front = np.asarray(strategy_state.rank) == 0
        return np.asarray(strategy_state.population)[in_front], np.asarray(strategy_state.objectives)[in_front]
    return np.asarray(strategy_state.best_solution)[None], np.asarray(strategy_state.best_fitness)[None]
