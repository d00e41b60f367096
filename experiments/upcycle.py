"""Continues a dense model as mixtures of experts and as itself, on the same data and at the same FLOPs.

Every contestant starts from the same parent; a receipt says how far from the parent's function it starts. All train on
the same batches for the same number of steps; one whose step costs more FLOPs than the dense model's trains once more
for fewer steps, so that there is a comparison at equal FLOPs too. The table has bits per byte on held-out text, and the
difference to continued dense training paired by document; the run's folder has a report of each mixture's routing.

Examples:
  python -m experiments.upcycle
  python -m experiments.upcycle --config=configs/upcycle_smollm2.py
  python -m experiments.upcycle --config.parent=models/llama --config.steps=1000
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.text import read_text
from moe_jax.checkpoints.model_folder import find_model, load_model, save_model
from moe_jax.data import DataConfig, fetch_smollm2, find_tokenizer, pack, tokenize, train_batches
from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.models.decoder import Decoder
from moe_jax.models.upcycle import Receipt, Upcycling, receipt, upcycle, upcycled_config
from moe_jax.report.pictures.tournament import plot_ranking
from moe_jax.report.text_routing import report_text_routing
from moe_jax.runs import Command, RunFolder, read_json, run_script, section, write_json
from moe_jax.runs.bars import bar, progress_display
from moe_jax.training.evaluation import LOG2, compare_losses, make_evaluator
from moe_jax.training.loop import train
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, make_train_step, state_of

DENSE, PARENT = "continued dense", "the parent"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """How the parent goes on: `upcycling` is None for a dense one; the name says where fewer steps equal its FLOPs."""

    name: str
    upcycling: Upcycling | None
    steps: int


class Lab:
    """What all contestants share: text, settings, the parent."""

    def __init__(self, run: RunFolder, display: Progress):
        """Reads the text; opens or trains the parent."""
        config = run.config
        self.run, self.display, self.config = run, display, config
        self.data = section(DataConfig, config.data, "config.data")
        self.loss = section(LossConfig, config.loss, "config.loss")
        self.parent_key, self.batch_key, self.noise_key, self.key = jax.random.split(jax.random.key(config.seed), 4)
        self.splits = read_text(self.data)
        if config.parent:
            folder = find_model(fetch_smollm2() if config.parent == "smollm2" else config.parent)
            self.parent = load_model(folder, dtype="float32")
            tokenizer = find_tokenizer(folder, self.parent.config.vocab_size)
            self.splits = {name: tokenize(documents, tokenizer) for name, documents in self.splits.items()}
        self.test = pack(self.splits["test"], self.data.sequence_length, context=self.data.sequence_length // 4)
        self.bytes_per_token = self.test.num_bytes.sum() / self.test.is_scored.sum()
        if not config.parent:
            self.parent = self._train_parent()

    def _train_parent(self) -> Decoder:
        """A dense model of our own, or the one that an earlier process trained."""
        folder = self.run.path / "parent"
        if not folder.exists():
            dense = section(DecoderConfig, self.config.model, "config.model")
            model = Decoder(dense, key=self.parent_key)
            save_model(self.train(PARENT, model, self.config.parent_steps, self.parent_key), folder)
        return load_model(folder)

    def train(self, title: str, model: Decoder, steps: int, batch_key: jax.Array) -> Decoder:
        """The model after so many steps."""
        optimizer = make_optimizer(section(OptimizerConfig, self.config.optimizer, "config.optimizer"), steps)
        # Copied, since training donates its state.
        graphdef, state = nnx.graphdef(model), state_of(jax.tree.map(jnp.copy, model), optimizer)
        step = make_train_step(graphdef, optimizer, self.loss, self.noise_key)
        with bar(self.display, title, steps) as progress:

            def record(number: int, metrics: dict[str, np.ndarray]) -> None:
                progress.show(number, f"{metrics['cross_entropy'] / LOG2 / self.bytes_per_token:.2f} bits/byte")

            batches = train_batches(self.splits["train"], self.data, batch_key, 0, steps)
            state = train(state, step, batches, checkpoint_every=steps, save=lambda *_: None, record=record)
        return nnx.merge(graphdef, state.params, state.balance)

    def play(self, contestant: Contestant) -> list[dict[str, Any]]:
        """Trains and measures all seeds of a contestant, those left by an earlier process excepted."""
        path = self.run.path / "stages" / f"{contestant.name.replace(' ', '_')}.json"
        done = read_json(path) if path.is_file() else []
        for seed in range(len(done), self.config.seeds):
            key = jax.random.fold_in(self.key, seed)
            model, start = self.parent, Receipt(0.0, 0.0)
            if contestant.upcycling is not None:
                model = upcycle([self.parent], contestant.upcycling, key=key)
                start = receipt(self.parent, model, jnp.asarray(self.test.tokens[:4, :-1], jnp.int32))
            batch_key = jax.random.fold_in(self.batch_key, seed)
            trained = self.train(f"{contestant.name}, seed {seed}", model, contestant.steps, batch_key)
            if seed == 0 and trained.config.num_moe_layers:
                texts = {name: self._tokens_of(name) for name in self.test.domain_names}
                report_text_routing(trained, texts, self.run.path / "routing" / path.stem, contestant.name)
            done.append(self.measure(trained) | {"receipt": start._asdict()})
            write_json(path, done)
        return done

    def _tokens_of(self, domain: str) -> np.ndarray:
        """A domain's test text."""
        return np.concatenate([one.tokens for one in self.splits["test"] if one.domain == domain])

    def measure(self, model: Decoder) -> dict[str, Any]:
        """Bits per byte of the test split, nats of each of its windows, and the forward FLOPs of a token."""
        graphdef, state = nnx.split(model)
        nll, num_bytes = make_evaluator(graphdef, batch_size=16)(state, self.test)
        cost = model_cost(model.config, self.data.sequence_length)
        return {
            "bits_per_byte": float(nll.sum() / num_bytes.sum() / LOG2),
            "nll": [float(x) for x in nll],
            "flops_per_token": float(cost.flops),
            "parameters": int(cost.parameters),
        }


def contestants_of(config: ConfigDict, parent: DecoderConfig, sequence_length: int) -> list[Contestant]:
    """All entries at equal data, and those that cost more also at equal FLOPs."""
    dense_flops = model_cost(parent, sequence_length).flops
    found = []
    for name, settings in config.entries.to_dict().items():
        if name == DENSE:
            found.append(Contestant(DENSE, None, config.steps))
            continue
        upcycling = section(Upcycling, settings, f"config.entries.{name}")
        found.append(Contestant(name, upcycling, config.steps))
        ratio = model_cost(upcycled_config(parent, upcycling), sequence_length).flops / dense_flops
        if ratio > 1.05:
            found.append(Contestant(f"{name}, equal FLOPs", upcycling, round(config.steps / ratio)))
    return found


def summarise(lab: Lab, contestants: list[Contestant], played: dict[str, list[dict]]) -> dict[str, Any]:
    """The results, best first, each with its difference to continued dense training, paired by document."""
    mean_nll = {name: np.mean([seed["nll"] for seed in seeds], axis=0) for name, seeds in played.items()}
    rows = []
    for contestant in contestants:
        seeds = played[contestant.name]
        row = {"name": contestant.name, "steps": contestant.steps}
        row |= {key: seeds[0][key] for key in ("flops_per_token", "parameters", "receipt")}
        row["bits_per_byte"] = [seed["bits_per_byte"] for seed in seeds]
        if contestant.name != DENSE:
            row["against_dense"] = compare_losses(
                lab.test, mean_nll[contestant.name], mean_nll[DENSE], lab.test.num_bytes
            )
        rows.append(row)
    rows.sort(key=lambda row: np.mean(row["bits_per_byte"]))
    return {
        "title": "Upcycling against continued dense training",
        "headline": {"best bits/byte": float(np.mean(rows[0]["bits_per_byte"]))},
        "parent_bits_per_byte": lab.measure(lab.parent)["bits_per_byte"],
        "rows": rows,
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    """The final table."""
    title = f"Test split; the parent has {results['parent_bits_per_byte']:.3f} bits per byte"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("model", no_wrap=True)
    columns = ("steps", "MFLOP a token", "parameters", "KL at step 0", "bits/byte", "vs dense [95 %]")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in results["rows"]:
        difference = ""
        if paired := row.get("against_dense"):
            low, high = paired["interval"]
            difference = f"{paired['difference']:+.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(
            row["name"],
            str(row["steps"]),
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['parameters']:,}",
            f"{row['receipt']['kl']:.1e}",
            f"{np.mean(row['bits_per_byte']):.3f}",
            difference,
        )
    console.print(table)


def main(command: Command) -> None:
    """Runs, or continues, the experiment in its folder."""
    console = Console()
    console.width = max(console.width, 120)  # the table is cut otherwise
    with RunFolder(command.workdir, command.config, must_exist=command.resume) as run:
        if not run.is_finished:
            with progress_display() as display:
                lab = Lab(run, display)
                contestants = contestants_of(command.config, lab.parent.config, lab.data.sequence_length)
                played = {}
                for index, contestant in enumerate(contestants):
                    played[contestant.name] = lab.play(contestant)
                    run.report_progress(contestant.name, index + 1)
            run.write_results(summarise(lab, contestants, played))
        run.finish()
        results = read_json(run.path / "results.json")
        picture = run.subfolder("pictures") / "ranking.png"
        names, bits = zip(*((row["name"], row["bits_per_byte"]) for row in results["rows"]), strict=True)
        plot_ranking(names, bits, reference=DENSE).savefig(picture, dpi=160, facecolor="white")
        print_table(console, results)
        console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/upcycle.py"))
