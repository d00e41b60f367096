"""The search stage of `evolve_topology`: every method with every seed, two at a time, each resumable."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.topology_model import Lab, model_state
from moe_jax.checkpoints import CheckpointStore
from moe_jax.data import Sequences
from moe_jax.evolution import LayerTopology, SearchResult, SearchStatus, start_search
from moe_jax.evolution.population import candidates_that_fit
from moe_jax.evolution.saliency import measure_saliency
from moe_jax.evolution.study import EvolutionConfig, Study, make_study, run_greedy, run_population_search
from moe_jax.report import search_stage
from moe_jax.routing import single_topology
from moe_jax.runs import MetricsWriter, section, write_atomic
from moe_jax.runs.bars import bar
from moe_jax.training.loop import NonFiniteError
from moe_jax.training.step import TrainState
from moe_jax.types import Topology

LOCAL, GREEDY = "(1+1) local search", "greedy removal"
FRONTS = ("NSGA-II", "random front")


class Found(NamedTuple):
    """What one method found with one seed.

    Attributes:
      keep: `[R, L', E]` bool: one topology, or a front.
      num_choices: `[R, L']` int32.
      evaluations: spent, `[]`.
      seconds: wall time, compilation included, `[]`.
    """

    keep: np.ndarray
    num_choices: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray


class TopologySearch:
    """Search over one trained model. Results lie in `stages/search`, unfinished searches in `checkpoints/search`."""

    def __init__(self, lab: Lab, state: TrainState):
        """Measures saliency on the search split and computes what all candidates share."""
        self.lab, self.model = lab, model_state(state)
        self.config = section(EvolutionConfig, lab.run.config.evolution, "config.evolution")
        tokens, mask = _inputs(lab.subset("search", self.config.search_per_domain))
        fits = candidates_that_fit(lab.model, len(tokens), tokens.shape[1], self.config.memory_limit_mb * 2**20)
        saliency = measure_saliency(lab.model_graphdef, self.model, tokens, mask)
        self.study: Study = make_study(lab.model_graphdef, lab.model, saliency, self.config, fits)
        self.data = self.study.mask.prepare(self.model, tokens, mask)
        self.files = threading.Lock()
        self.compiled_objectives = jax.jit(self.study.front.objectives)

    def run(self) -> dict[str, list[Found]]:
        """Runs every method with every seed; what an earlier process finished is read, what it began is continued.

        Two searches run at a time, since one spends much of its time compiling on a single core. They share nothing but
        the run's files, which a lock guards, so the results do not depend on it.
        """
        study, seeds = self.study, self.config.seeds
        tasks: dict[tuple[str, int], Callable[[], tuple[LayerTopology, int]]] = {
            (name, 0): lambda t=topology: (_as_population(t), 1) for name, topology in study.one_shot.items()
        }
        tasks[GREEDY, 0] = self._greedy
        for seed in range(seeds):  # first seeds first: they compile, the others find the programs
            for name in study.searches:
                if name != LOCAL or seed == 0:
                    tasks[name, seed] = lambda name=name, seed=seed: self._population(name, seed)
        with (
            self.lab.timed("search"),
            bar(self.lab.display, "search", len(tasks)) as progress,
            ThreadPoolExecutor(2) as pool,
        ):

            def run_one(task: tuple[str, int]) -> Found:
                progress.show(None, f"{task[0]}, seed {task[1]}")
                result = self._stored(*task, tasks[task])
                progress.advance()
                return result

            results = dict(zip(tasks, pool.map(run_one, tasks), strict=True))
        chains = results[LOCAL, 0]
        results |= {(LOCAL, i): _chain(chains, i) for i in range(seeds)}
        found: dict[str, list[Found]] = {}
        for (name, _), result in sorted(results.items(), key=lambda item: item[0][1]):
            found.setdefault(name, []).append(result)
        return found

    def objectives(self, topologies: Sequence[LayerTopology], sequences: Sequences) -> list[np.ndarray]:
        """`[R, 3]` objectives of each set of topologies on some text; the sets share batches of the population size."""
        front, size = self.study.front, self.config.population
        together = LayerTopology(*(jnp.concatenate(side) for side in zip(*topologies, strict=True)))
        genomes = np.asarray(jax.vmap(front.genome.encode)(together))
        padded = np.resize(genomes, (-(-len(genomes) // size) * size, genomes.shape[1]))
        data = front.prepare(self.model, *_inputs(sequences))
        parts = [
            np.asarray(self.compiled_objectives(rows, data)) for rows in padded.reshape(-1, size, genomes.shape[1])
        ]
        ends = np.cumsum([len(part.keep) for part in topologies])
        return np.split(np.concatenate(parts)[: len(genomes)], ends[:-1])

    def topology(self, found: Found) -> Topology:
        """The single topology of a result, over all L MoE layers of the model."""
        frozen = self.config.frozen_layers
        keep = np.pad(found.keep[0], ((frozen, 0), (0, 0)), constant_values=True)
        num_choices = np.pad(found.num_choices[0], (frozen, 0), constant_values=self.lab.model.num_choices)
        return single_topology(keep, num_choices)

    def _stored(self, name: str, seed: int, compute: Callable[[], tuple[LayerTopology, int]]) -> Found:
        """The stored result of a search, or a new one, which is stored."""
        path = self.lab.run.path / "stages" / f"{search_stage(name, seed)}.npz"
        if not path.is_file():
            start = time.perf_counter()
            topologies, evaluations = compute()
            arrays = Found(
                *map(np.asarray, topologies), np.asarray(evaluations), np.asarray(time.perf_counter() - start)
            )
            buffer = io.BytesIO()
            np.savez(buffer, **arrays._asdict())
            write_atomic(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as arrays:
            return Found(**{field: arrays[field] for field in Found._fields})

    def _greedy(self) -> tuple[LayerTopology, int]:
        topologies, result = run_greedy(self.study, self.data)
        self._require_finite(GREEDY, 0, result)
        writer = MetricsWriter(self.lab.run.path, search_stage(GREEDY, 0))
        writer.truncate_after(-1)
        # Until the last removal the fitness belongs to a mask that keeps more experts: only the end is comparable.
        writer.append(1, {"evaluations": result.evaluations, "best": result.best_fitness})
        writer.flush()
        return topologies, result.evaluations

    def _population(self, name: str, seed: int) -> tuple[LayerTopology, int]:
        """One population search, continued from its newest checkpoint if there is one."""
        strategy, evaluate, _, _, _ = self.study.searches[name]
        is_front, is_local = name in FRONTS, name == LOCAL
        writers = [
            MetricsWriter(self.lab.run.path, search_stage(name, s))
            for s in (range(self.config.seeds) if is_local else [seed])
        ]
        store = CheckpointStore(
            self.lab.run.subfolder("checkpoints", *search_stage(name, seed).split("/")), is_async=False
        )
        with self.files:
            restored = None
            if store.steps():
                like = start_search(strategy, strategy.default_params, evaluate, self.data, jax.random.key(seed))
                restored = store.restore_newest(like)
            for warning in restored.warnings if restored else ():
                self.lab.display.console.print(f"{search_stage(name, seed)}: {warning}", soft_wrap=True)
            for writer in writers:
                writer.truncate_after(-1 if restored is None else restored.step)

        def on_chunk(status: SearchStatus) -> None:
            with self.files:
                for column, writer in enumerate(writers):
                    for row, generation in enumerate(status.history["generation"]):
                        best = np.atleast_1d(status.history["best_fitness"][row])
                        spent = status.history["evaluations"][row] // len(writers)
                        values = {f"best_{i}": b for i, b in enumerate(best)} if is_front else {"best": best[column]}
                        writer.append(int(generation), {"evaluations": spent, **values})
                    writer.flush()
                store.save(status.generation, status.state)
                self.lab.run.report_progress(search_stage(name, seed), status.generation, store.path(status.generation))

        topologies, result = run_population_search(
            self.study, name, self.data, seed, None if restored is None else restored.tree, on_chunk
        )
        store.close()
        self._require_finite(name, seed, result)
        return topologies, result.evaluations // len(writers)

    def _require_finite(self, name: str, seed: int, result: SearchResult) -> None:
        """Stops the run if a search has nothing but invalid candidates; single ones were already set aside."""
        if not np.isfinite(result.fitness).all():
            raise NonFiniteError(
                f"{name}, seed {seed}: no candidate of {result.evaluations} evaluations has a finite fitness; "
                f"the trained model is the last good checkpoint ({self.lab.run.progress.last_checkpoint})"
            )


def _inputs(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """`[N, S]` input tokens and their mask."""
    return sequences.tokens[:, :-1].astype(np.int32), sequences.mask[:, :-1]


def _chain(found: Found, index: int) -> Found:
    """One chain of a local search whose chains ran as one population."""
    return found._replace(keep=found.keep[index : index + 1], num_choices=found.num_choices[index : index + 1])


def _as_population(topology: LayerTopology) -> LayerTopology:
    return LayerTopology(*(np.asarray(side)[None] for side in topology))
