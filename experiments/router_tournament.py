"""Trains every causal routing rule at equal active FLOPs, and the dense twin, and compares them on held-out text.

Each contestant is trained from several seeds on the same batches; the table gives bits per byte on the test split, the
difference to the reference paired by document, how evenly experts are loaded, what a capacity of 1.25 would drop, how
many assignments still change late in training (churn), and the time of a step beside the reference's, in turns.

Examples:
  python -m experiments.router_tournament
  python -m experiments.router_tournament --config=configs/router_tournament_quick.py
  python -m experiments.router_tournament --config.seeds=5 --config.steps=2000 --workdir runs/long
  python -m experiments.router_tournament --workdir runs/long --resume
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.text import read_text
from experiments.timing import measure_interleaved, summarize
from experiments.topology_model import model_state
from moe_jax.analysis import max_violation
from moe_jax.data import DataConfig, pack, train_batches
from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.models.decoder import Decoder
from moe_jax.models.twin import dense_twin
from moe_jax.report.pictures.tournament import plot_ranking
from moe_jax.runs import Command, RunFolder, read_json, run_script, section, write_json
from moe_jax.runs.bars import bar, progress_display
from moe_jax.training.evaluation import LOG2, compare_losses, make_evaluator
from moe_jax.training.loop import train
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, TrainState, TrainStep, init_state, make_train_step

DENSE = "dense twin"
CAPACITY = 1.25
REPEATS = 15  # timed steps of each contestant


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant."""

    name: str
    model: DecoderConfig
    loss: LossConfig


def entries_of(config: ConfigDict) -> list[Entry]:
    """The contestants of a configuration; the dense twin is that of the reference."""
    plain = config.to_dict()

    def entry(name: str) -> Entry:
        changes = plain["entries"][name]
        model = section(DecoderConfig, plain["model"] | changes.get("model", {}), f"config.entries.{name}.model")
        loss = section(LossConfig, plain["loss"] | changes.get("loss", {}), f"config.entries.{name}.loss")
        return Entry(name, model, loss)

    entries = [entry(name) for name in plain["entries"] if name != DENSE]
    if DENSE in plain["entries"]:
        reference = entry(config.reference)
        entries.append(Entry(DENSE, dense_twin(reference.model), reference.loss))
    return entries


class Tournament:
    """What all contestants share: text, settings, the run's folder."""

    def __init__(self, run: RunFolder, display: Progress, reference: Entry):
        """Reads the text."""
        config, self.reference = run.config, reference
        self.run, self.display = run, display
        self.data = section(DataConfig, config.data, "config.data")
        self.optimizer = section(OptimizerConfig, config.optimizer, "config.optimizer")
        self.steps, self.num_seeds = config.steps, config.seeds
        self.model_key, self.batch_key, self.noise_key = jax.random.split(jax.random.key(config.seed), 3)
        self.splits = read_text(self.data)
        length = self.data.sequence_length
        self.test = pack(self.splits["test"], length, context=length // 4)
        self.probe = pack(self.splits["selection"], length)

    def play(self, entry: Entry) -> dict[str, Any]:
        """Trains and measures all seeds of a contestant, those left by an earlier process excepted.

        Returns:
          `seeds`, what `_train` gives of each, and `time`, the figures of `timing.summarize` against the reference.
        """
        path = self.run.path / "stages" / f"{entry.name.replace(' ', '_')}.json"
        done = read_json(path) if path.is_file() else {"seeds": []}
        if "time" in done:
            return done
        graphdef, step = self._program(entry)
        for seed in range(len(done["seeds"]), self.num_seeds):
            state = self._start(entry, seed)
            done["seeds"].append(self._train(entry, f"{entry.name}, seed {seed}", graphdef, state, step))
            write_json(path, done)
        calls = {"own": self._step_call(entry, step), "reference": self._reference_call}
        samples = measure_interleaved(calls, REPEATS)
        write_json(path, done | {"time": summarize(samples["own"], samples["reference"])})
        return read_json(path)

    def _program(self, entry: Entry) -> tuple[nnx.GraphDef, TrainStep]:
        """The structure of a contestant's model, and its training step."""
        optimizer = make_optimizer(self.optimizer, self.steps)
        graphdef, _ = init_state(lambda key: Decoder(entry.model, key=key), self.model_key, optimizer)
        return graphdef, make_train_step(graphdef, optimizer, entry.loss, self.noise_key)

    def _start(self, entry: Entry, seed: int) -> TrainState:
        """The state that a seed's training starts from."""
        optimizer = make_optimizer(self.optimizer, self.steps)
        return init_state(
            lambda key: Decoder(entry.model, key=key), jax.random.fold_in(self.model_key, seed), optimizer
        )[1]

    def _step_call(self, entry: Entry, step: TrainStep) -> Callable[[], None]:
        """What trains one more step when called."""
        compiled, states = jax.jit(step, donate_argnums=0), [self._start(entry, 0)]
        batch = next(iter(train_batches(self.splits["train"], self.data, self.batch_key, 0, 1)))

        def call() -> None:
            states[0], _ = compiled(states[0], batch.tokens, batch.mask, None, batch.segments)
            jax.block_until_ready(states[0])

        return call

    @functools.cached_property
    def _reference_call(self) -> Callable[[], None]:
        """A step of the reference."""
        return self._step_call(self.reference, self._program(self.reference)[1])

    def _train(self, entry: Entry, title: str, graphdef: nnx.GraphDef, state: TrainState, step: Any) -> dict[str, Any]:
        """One seed: trains, notes the routing at 90 % and at the end, and measures."""
        inputs, mask = self.probe.tokens[:, :-1].astype(np.int32), self.probe.mask[:, :-1]
        model_graphdef = nnx.graphdef(nnx.merge(graphdef, state.params, state.balance))
        plans, start = [], time.perf_counter()

        @jax.jit
        def plan_of(state: nnx.State) -> Any:
            return nnx.merge(model_graphdef, state)(inputs, mask, trace="topk")[1].plan

        def probe(number: int, state: TrainState) -> None:
            if entry.model.num_moe_layers and number >= round(0.9 * self.steps):
                plans.append(np.asarray(plan_of(model_state(state)).expert_ids)[:, mask.ravel()])

        with bar(self.display, title, self.steps) as progress:

            def record(number: int, metrics: dict[str, np.ndarray]) -> None:
                progress.show(number, f"{metrics['cross_entropy'] / LOG2:.2f} bits/byte")

            batches = train_batches(self.splits["train"], self.data, self.batch_key, 0, self.steps)
            mark = max(1, round(0.9 * self.steps))
            state = train(state, step, batches, checkpoint_every=mark, save=probe, record=record)
        nll, num_bytes = make_evaluator(model_graphdef, batch_size=32)(model_state(state), self.test)
        result = {
            "bits_per_byte": float(nll.sum() / num_bytes.sum() / LOG2),
            "nll": [float(x) for x in nll],
            "seconds": time.perf_counter() - start,
        }
        num_true = entry.model.num_experts - entry.model.rule_settings.get("num_null", 0)
        return result | (measure_routing(plans, num_true) if plans else {})


def measure_routing(plans: list[np.ndarray], num_experts: int) -> dict[str, float]:
    """Statistics of `[L, T, K]` plans of one text, the last two of a training; means over layers.

    Returns:
      `choices` experts a token, and where a token has any, `max_violation`, `over_capacity` (share of the assignments
      that a capacity factor of 1.25 would drop) and `churn` (share of the assignments of either plan that the other
      does not have).
    """
    names = np.arange(num_experts)
    before, after = ((plan[..., None] == names).any(2) for plan in plans[-2:])  # [L, T, E]
    counts = after.sum(1)
    if not counts.any(1).all():
        return {"choices": float(after.sum(2).mean())}
    room = CAPACITY * counts.mean(1, keepdims=True)
    return {
        "choices": float(after.sum(2).mean()),
        "max_violation": float(np.mean(max_violation(counts))),
        "over_capacity": float((np.maximum(counts - room, 0).sum(1) / counts.sum(1)).mean()),
        "churn": float(1 - ((before & after).sum((1, 2)) / (before | after).sum((1, 2))).mean()),
    }


def summarise(tournament: Tournament, entries: list[Entry], played: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results, best first, each with its paired difference to the reference."""
    test, config = tournament.test, tournament.run.config
    num_bytes = test.num_bytes
    mean_nll = {name: np.mean([seed["nll"] for seed in done["seeds"]], axis=0) for name, done in played.items()}
    rows = []
    for entry in entries:
        seeds = played[entry.name]["seeds"]
        row = {"name": entry.name, "bits_per_byte": [seed["bits_per_byte"] for seed in seeds]}
        row |= {"step_ms": played[entry.name]["time"]["ms"], "step_ratio": played[entry.name]["time"]["ratio"]}
        for key in ("choices", "max_violation", "over_capacity", "churn"):
            if all(key in seed for seed in seeds):
                row[key] = float(np.mean([seed[key] for seed in seeds]))
        choices = [row["choices"]] * entry.model.num_moe_layers if "choices" in row else None
        cost = model_cost(entry.model, tournament.data.sequence_length, choices)
        row |= {"flops_per_token": float(cost.flops), "parameters": int(cost.parameters)}
        if entry.name != config.reference:
            row["against_reference"] = compare_losses(test, mean_nll[entry.name], mean_nll[config.reference], num_bytes)
        rows.append(row)
    rows.sort(key=lambda row: np.mean(row["bits_per_byte"]))
    best = rows[0]
    return {
        "title": "A tournament of routing rules",
        "reference": config.reference,
        "steps": config.steps,
        "headline": {"best bits/byte": float(np.mean(best["bits_per_byte"]))},
        "rows": rows,
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    """The final table."""
    title = f"Test split after {results['steps']} steps, means over seeds; reference: {results['reference']}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("rule", no_wrap=True)
    for column in ("bits/byte", "vs reference [95 %]", "experts", "MaxVio", "over", "churn", "step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results["rows"]:
        difference = ""
        if paired := row.get("against_reference"):
            low, high = paired["interval"]
            difference = f"{paired['difference']:+.3f} [{low:.3f}, {high:.3f}]"
        numbers = [
            f"{row[key]:.2f}" if key in row else "" for key in ("choices", "max_violation", "over_capacity", "churn")
        ]
        table.add_row(
            row["name"], f"{np.mean(row['bits_per_byte']):.3f}", difference, *numbers, f"{row['step_ratio']:.2f}"
        )
    console.print(table)


def main(command: Command) -> None:
    """Runs, or continues, the tournament in its folder."""
    console = Console()
    console.width = max(console.width, 120)  # the table is cut otherwise
    with RunFolder(command.workdir, command.config, must_exist=command.resume) as run:
        entries = entries_of(command.config)
        if not run.is_finished:
            with progress_display() as display:
                reference = next(entry for entry in entries if entry.name == command.config.reference)
                tournament = Tournament(run, display, reference)
                played = {}
                for index, entry in enumerate(entries):
                    played[entry.name] = tournament.play(entry)
                    run.report_progress(entry.name, index + 1)
            run.write_results(summarise(tournament, entries, played))
        run.finish()
        results = read_json(run.path / "results.json")
        picture = run.subfolder("pictures") / "ranking.png"
        plot_ranking(
            [row["name"] for row in results["rows"]],
            [row["bits_per_byte"] for row in results["rows"]],
            reference=results["reference"],
        ).savefig(picture, dpi=160, facecolor="white")
        print_table(console, results)
        console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/router_tournament.py"))
