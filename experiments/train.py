"""Trains a mixture-of-experts language model, or its dense twin, on text, and measures it on held-out documents.

Examples:
  python -m experiments.train
  python -m experiments.train --config.model.num_experts=32 --config.training.steps=2000
  python -m experiments.train --config.data.folders=mine=path/to/text --workdir runs/mine
  python -m experiments.train --workdir runs/mine --resume
  python -m experiments.train --config configs/train_mesh.py
  python -m experiments.train --config configs/train_mesh.py --config.mesh.data=-1 --hosts=10.0.0.1:29500,4,0
      (on the host 10.0.0.1, and on three others with 1, 2 and 3 at the end; see configs/cluster)
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.text import read_text
from moe_jax.data import DataConfig, pack, train_batches
from moe_jax.hosts import is_first_host
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.execution import Execution
from moe_jax.report import write_report
from moe_jax.report.results import describe_data, describe_model
from moe_jax.runs import Command, MetricsWriter, RunFolder, read_json, run_script, section
from moe_jax.runs.bars import progress_display
from moe_jax.training.evaluation import LOG2, bits_per_byte, make_evaluator
from moe_jax.training.loop import TrainingConfig
from moe_jax.training.mesh import MeshConfig, check_mesh, make_mesh
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.stage import train_stage
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step, merge_model


def train_model(run: RunFolder, display: Progress) -> dict[str, Any]:
    """Trains in a run's folder, from where an earlier process stopped.

    Args:
      run: the open run folder.
      display: where the bar is drawn.

    Returns:
      What `results.json` holds; `headline` has the held-out loss.
    """
    config = run.config
    data = section(DataConfig, config.data, "config.data")
    model = section(DecoderConfig, config.model, "config.model")
    training = section(TrainingConfig, config.training, "config.training")
    loss = section(LossConfig, config.loss, "config.loss")
    devices = make_mesh(section(MeshConfig, config.get("mesh", {}), "config.mesh"))
    check_mesh(devices, model, data.batch_size, loss.micro_batches)
    mesh = None if devices.size == 1 else devices
    execution = Execution(mesh, training.remat)
    init_key, batch_key, noise_key = jax.random.split(jax.random.key(config.seed), 3)
    splits = read_text(data)
    held_out = {
        name: pack(splits[name], data.sequence_length, context=data.sequence_length // 4)
        for name in ("selection", "test")
    }
    optimizer = make_optimizer(section(OptimizerConfig, config.optimizer, "config.optimizer"), training.steps)
    graphdef, initial = init_state(lambda key: Decoder(model, key=key, execution=execution), init_key, optimizer, mesh)
    evaluate = make_evaluator(nnx.graphdef(merge_model(graphdef, initial)), batch_size=32, mesh=mesh)
    evaluation = MetricsWriter(run.path, "evaluate")

    def measure(split: str, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        return evaluate(nnx.merge_state(state.params, state.balance), held_out[split])

    def on_save(step: int, state: TrainState) -> None:
        nll, targets = measure("selection", state)
        evaluation.append(step, {"bits_per_byte": nll.sum() / targets.sum() / LOG2})
        evaluation.flush()

    state = train_stage(
        run,
        display,
        "train",
        initial,
        make_train_step(graphdef, optimizer, loss, noise_key),
        lambda start: train_batches(splits["train"], data, batch_key, start, training.steps),
        steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        note=lambda values: f"{values['cross_entropy'] / LOG2:.2f} bits/byte",
        on_start=evaluation.truncate_after,
        on_save=on_save,
        mesh=mesh,
        keep_newest=training.keep_newest,
        keep_every=training.keep_every,
    )
    bits = {split: bits_per_byte(held_out[split], *measure(split, state)) for split in held_out}
    return {
        "title": "Training a language model",
        "headline": {"test bits/byte": bits["test"]["all"]},
        "data": describe_data(splits),
        "model": describe_model(model, state.params),
        "model_bits_per_byte": bits,
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Held-out loss by domain."""
    table = Table(title="Test split, bits per byte", title_justify="left", box=SIMPLE)
    table.add_column("domain")
    table.add_column("bits/byte", justify="right")
    bits = dict(results["model_bits_per_byte"]["test"])
    low, high = bits.pop("interval")
    for domain, value in bits.items():
        table.add_row(domain, f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if domain == "all" else ""))
    console.print(table)


def main(command: Command) -> None:
    """Runs, or continues, the job in its folder."""
    console = Console()
    with RunFolder(command.workdir, command.config, must_exist=command.resume) as run:
        if not run.is_finished:
            with progress_display() as display:
                run.write_results(train_model(run, display))
        run.finish()
        if is_first_host():
            print_table(console, read_json(run.path / "results.json"))
            console.print(f"report: {write_report(run.path)}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/train.py", takes_hosts=True))
