"""Stages of `evolve_topology` around the search: run every method, choose on one split, report on another."""

import io
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.topology_model import LOG2, Lab, bits_per_byte, document_interval, model_state
from moe_jax.analysis import paired_permutation_test, verdict, win_rate
from moe_jax.checkpoints import CheckpointStore
from moe_jax.data import Sequences
from moe_jax.evolution import LayerTopology, SearchResult, SearchStatus, hypervolume, is_non_dominated, start_search
from moe_jax.evolution.population import OBJECTIVES, candidates_that_fit
from moe_jax.evolution.saliency import measure_saliency
from moe_jax.evolution.study import EvolutionConfig, Study, make_study, run_greedy, run_population_search
from moe_jax.report import search_stage
from moe_jax.routing import single_topology
from moe_jax.runs import MetricsWriter, section, write_atomic
from moe_jax.training.loop import NonFiniteError
from moe_jax.training.step import TrainState
from moe_jax.types import Topology

LOCAL, GREEDY, FULL = "(1+1) local search", "greedy removal", "untouched model"
EVOLVED, FRONTS = ("GA, mask", "GA, budget"), ("NSGA-II", "random front")
GENOMES = {"GA, budget": "budget in REAP order", "NSGA-II": "mask and top-k", "random front": "mask and top-k"}


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
        with self.lab.timed("search"), self.lab.bar("search", len(tasks)) as bar, ThreadPoolExecutor(2) as pool:

            def run_one(task: tuple[str, int]) -> Found:
                bar.show(None, f"{task[0]}, seed {task[1]}")
                result = self._stored(*task, tasks[task])
                bar.advance()
                return result

            results = dict(zip(tasks, pool.map(run_one, tasks), strict=True))
        chains = results[LOCAL, 0]
        results |= {(LOCAL, i): _chain(chains, i) for i in range(seeds)}
        found: dict[str, list[Found]] = {}
        for (name, _), result in sorted(results.items(), key=lambda item: item[0][1]):
            found.setdefault(name, []).append(result)
        return found

    def objectives(self, topologies: LayerTopology, sequences: Sequences) -> np.ndarray:
        """`[R, 3]` objectives of any topologies on some text, in batches of the population size."""
        encode = jax.vmap(self.study.front.genome.encode)
        genomes = np.asarray(encode(jax.tree.map(jnp.asarray, topologies)))
        data = self.study.front.prepare(self.model, *_inputs(sequences))
        size = self.config.population
        padded = np.resize(genomes, (-(-len(genomes) // size) * size, genomes.shape[1]))
        parts = [self.compiled_objectives(padded[i : i + size], data) for i in range(0, len(padded), size)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(genomes)]

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
            last, state = store.latest_step(), None
            if last is not None:
                like = start_search(strategy, strategy.default_params, evaluate, self.data, jax.random.key(seed))
                state = store.restore(last, like)
            for writer in writers:
                writer.truncate_after(-1 if last is None else last)

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

        topologies, result = run_population_search(self.study, name, self.data, seed, state, on_chunk)
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


def compare_methods(search: TopologySearch, found: Mapping[str, list[Found]]) -> dict[str, Any]:
    """Chooses on the selection split, measures on the test split.

    Returns:
      `results["search"]` of the report's schema, and beside it `chosen`: name and seed of the evolved topology and of
      the baseline with the lowest KL on the selection split.
    """
    lab, config, test = search.lab, search.config, search.lab.test
    selection = lab.subset("selection", config.selection_per_domain)
    calibration = lab.subset("search", config.search_per_domain)
    single = {name: runs for name, runs in found.items() if name not in FRONTS}
    nll_full, targets = lab.evaluate(search.model, test, lab.open_topology)
    full = bits_per_byte(test, nll_full, targets)
    methods, losses = [], {}
    with lab.timed("test"), lab.bar("test split", sum(map(len, single.values()))) as bar:
        for name, runs in single.items():
            nlls = [lab.evaluate(search.model, test, search.topology(run))[0] for run in runs]
            bar.advance(len(runs))
            losses[name] = np.mean(nlls, axis=0)
            stacked = LayerTopology(
                np.concatenate([run.keep for run in runs]), np.concatenate([run.num_choices for run in runs])
            )
            on_selection = search.objectives(stacked, selection)
            methods.append(
                {
                    "name": name,
                    "kind": "evolved" if name in EVOLVED else "baseline",
                    "genome": GENOMES.get(name, "mask"),
                    "seeds": list(range(len(runs))),
                    "evaluations": int(runs[0].evaluations),
                    "seconds": float(np.mean([run.seconds for run in runs])),
                    "search_kl": search.objectives(stacked, calibration)[:, 0].tolist(),
                    "selection_kl": on_selection[:, 0].tolist(),
                    "test_bpb": [float(nll.sum() / targets.sum() / LOG2) for nll in nlls],
                    "test_bpb_interval": list(document_interval(test, losses[name], targets)[1:]),
                    "delta_vs_full": _difference(test, losses[name], nll_full, targets),
                    "active_flops_per_token": float(on_selection[:, 1].mean()),
                    "max_over_mean_load": float(on_selection[:, 2].mean()),
                }
            )
    for method in methods:
        if method["kind"] == "evolved":
            rivals = [name for name in losses if name not in EVOLVED]
            method["comparisons"] = [
                _compare(test, losses[method["name"]], losses[rival], targets, rival) for rival in rivals
            ]
    reference = {"name": FULL, "kind": "reference", "test_bpb": [full["all"]], "test_bpb_interval": full["interval"]}
    return {
        "description": [
            "Every population search starts with the same four one-shot masks beside random ones, repairs the same "
            f"way, and spends {search.study.evaluations} evaluations a seed on the same {len(calibration)} sequences.",
            "Local search starts each chain from REAP's mask. Greedy removal counts every evaluation and stops at the "
            "same number; removals left over then follow its last complete ranking.",
        ],
        "budget": {
            "evaluations": search.study.evaluations,
            "experts_kept": search.study.total,
            "experts": search.study.mask.config.num_moe_layers * lab.model.num_experts,
            "seeds": config.seeds,
        },
        "methods": [reference, *methods],
        "chosen": {kind: _best_on_selection(methods, kind) for kind in ("evolved", "baseline")},
        **_fronts(search, found, selection),
    }


def _fronts(search: TopologySearch, found: Mapping[str, list[Found]], selection: Sequences) -> dict[str, Any]:
    """Fronts chosen on the selection split and measured on the test split, with their hypervolumes."""
    test = search.lab.subset("test", search.config.front_per_domain)
    ladder = Found(*map(np.asarray, search.study.ladder), np.asarray(0), np.asarray(0.0))
    untouched = jax.tree.map(lambda side: side[-1:], search.study.ladder)
    full = search.objectives(untouched, test)[0]
    reference = np.array([search.config.reference_kl, 1.001 * full[1], search.config.reference_load])
    fronts, volumes = [], []
    for name, runs in [*((name, found[name]) for name in FRONTS), ("saliency ladder", [ladder])]:
        values = []
        for seed, run in enumerate(runs):
            candidates = LayerTopology(run.keep, run.num_choices)
            is_best = is_non_dominated(search.objectives(candidates, selection))
            points = search.objectives(LayerTopology(*(side[is_best] for side in candidates)), test)
            values.append(hypervolume(points, reference) / float(np.prod(reference)))
            fronts.append({"method": name, "seed": seed, "points": points.tolist()})
        volumes.append({"method": name, "evaluations": int(runs[0].evaluations), "values": values})
    return {
        "objectives": list(OBJECTIVES),
        "front": fronts,
        "full_model": full.tolist(),
        "reference_point": reference.tolist(),
        "hypervolume": volumes,
    }


def _best_on_selection(methods: list[dict[str, Any]], kind: str) -> tuple[str, int]:
    """Name and seed of the lowest selection KL among the methods of a kind."""
    ranked = [(kl, m["name"], seed) for m in methods if m["kind"] == kind for seed, kl in enumerate(m["selection_kl"])]
    return min(ranked)[1:]


def _difference(sequences: Sequences, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Paired difference in bits per byte with an interval over documents."""
    estimate, low, high = document_interval(sequences, ours - theirs, targets)
    return {"estimate": estimate, "interval": [low, high]}


def _compare(
    sequences: Sequences, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray, name: str
) -> dict[str, Any]:
    """Ours against a baseline, paired by test document; lower is better."""
    interval = document_interval(sequences, ours - theirs, targets)
    size = np.bincount(sequences.document, targets)
    mine, other = (np.bincount(sequences.document, nll)[size > 0] / size[size > 0] for nll in (ours, theirs))
    return {
        "against": name,
        "difference": interval.estimate,
        "interval": [interval.low, interval.high],
        "p_value": paired_permutation_test(mine - other),
        "win_rate": win_rate(mine, other),
        "verdict": verdict(interval),
    }


def _inputs(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """`[N, S]` input tokens and their mask."""
    return sequences.tokens[:, :-1].astype(np.int32), sequences.mask[:, :-1]


def _chain(found: Found, index: int) -> Found:
    """One chain of a local search whose chains ran as one population."""
    return found._replace(keep=found.keep[index : index + 1], num_choices=found.num_choices[index : index + 1])


def _as_population(topology: LayerTopology) -> LayerTopology:
    return LayerTopology(*(np.asarray(side)[None] for side in topology))
