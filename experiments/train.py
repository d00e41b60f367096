"""Trains a mixture-of-experts language model, or its dense twin, on text, and measures it on held-out documents.

Examples:
  python -m experiments.train
  python -m experiments.train --config.model.num_experts=32 --config.training.steps=2000
  python -m experiments.train --config.data.folders=mine=path/to/text --workdir runs/mine
  python -m experiments.train --config.data.tokenizer=bpe:4096 --config.model.vocab_size=4096 --config.data.packing=pack
  python -m experiments.train --workdir runs/mine --resume
  python -m experiments.train --config configs/train_mesh.py
  python -m experiments.train --config configs/train_mesh.py --config.mesh.data=-1 --hosts=10.0.0.1:29500,4,0
      (on the host 10.0.0.1, and on three others with 1, 2 and 3 at the end; see configs/cluster)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.text import Splits, read_tokens
from moe_jax.data import Batch, DataConfig, Document, train_batches
from moe_jax.hosts import is_first_host
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.execution import Execution
from moe_jax.report import write_report
from moe_jax.report.results import describe_data, describe_model
from moe_jax.runs import Command, MetricsWriter, RunFolder, flatten, read_json, run_script, section
from moe_jax.runs.bars import progress_display
from moe_jax.training.evaluation import LOG2
from moe_jax.training.held_out import HeldOut
from moe_jax.training.loop import TrainingConfig
from moe_jax.training.mesh import MeshConfig, batch_share, check_mesh, make_mesh
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.spikes import skip_spikes, watch_spikes
from moe_jax.training.stage import train_stage
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step, merge_model
from moe_jax.training.throughput import Meter, useful_flops
from moe_jax.training.tracking import Tracker, TrackingConfig


class Job:
    """What a training run needs: the settings, the text, the model's structure, its first state and its step."""

    def __init__(self, run: RunFolder, display: Progress):
        """Reads settings and text, and initialises the model on its mesh."""
        config = run.config
        self.data = section(DataConfig, config.data, "config.data")
        self.model = section(DecoderConfig, config.model, "config.model")
        self.training = section(TrainingConfig, config.training, "config.training")
        self.tracking = section(TrackingConfig, config.get("tracking", {}), "config.tracking")
        loss = section(LossConfig, config.loss, "config.loss")
        mesh = make_mesh(section(MeshConfig, config.get("mesh", {}), "config.mesh"))
        check_mesh(mesh, self.model, self.data.batch_size, loss.micro_batches)
        self.mesh = None if mesh.size == 1 else mesh
        init_key, self.batch_key, noise_key = jax.random.split(jax.random.key(config.seed), 3)
        self.splits: Splits = read_tokens(self.data, self.model.vocab_size, run.path, display)
        optimizer = make_optimizer(section(OptimizerConfig, config.optimizer, "config.optimizer"), self.training.steps)
        execution = Execution(self.mesh, self.training.remat)
        graphdef, self.initial = init_state(
            lambda key: Decoder(self.model, key=key, execution=execution), init_key, optimizer, self.mesh
        )
        self.step = make_train_step(graphdef, optimizer, loss, noise_key)
        if (spikes := self.training.spikes) is not None:
            self.initial, self.step = watch_spikes(self.initial, spikes), skip_spikes(self.step, spikes)
        model_graphdef = nnx.graphdef(merge_model(graphdef, self.initial))
        self.held_out = HeldOut(self.splits, self.data.sequence_length, model_graphdef, self.mesh)

    def batches(self, start: int) -> Iterator[Batch]:
        """This process's share of the batches behind step `start`."""
        share = (0, 1) if self.mesh is None else batch_share(self.mesh)
        return train_batches(self.splits["train"], self.data, self.batch_key, start, self.training.steps, *share)

    def meter(self, run: RunFolder) -> Meter:
        """What takes the time."""
        return Meter(
            MetricsWriter(run.path, "timing"),
            tokens_per_step=self.data.batch_size * self.data.sequence_length,
            flops_per_token=useful_flops(self.model, self.data.sequence_length),
            every=self.tracking.every,
            num_devices=1 if self.mesh is None else self.mesh.size,
        )


def train_model(
    run: RunFolder, display: Progress, on_evaluate: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """Trains in a run's folder, from where an earlier process stopped.

    Args:
      run: the open run folder.
      display: where the bar is drawn.
      on_evaluate: called with the step once its held-out loss is on disk; an exception ends the training there.

    Returns:
      What `results.json` holds; `headline` has the held-out loss.
    """
    job = Job(run, display)
    evaluation, meter = MetricsWriter(run.path, "evaluate"), job.meter(run)
    nats_per_bit = LOG2 * job.held_out.bytes_per_token
    tracking = job.tracking if is_first_host() else TrackingConfig()
    with Tracker(tracking, run.path, flatten(run.config)) as tracker:

        def on_start(start: int) -> None:
            evaluation.truncate_after(start)
            tracker.start(start)
            meter.start(start)

        def on_record(step: int, values: dict[str, np.ndarray]) -> None:
            tracker.record(step, values | meter.record(step))

        def on_save(step: int, state: TrainState) -> None:
            evaluation.append(step, {"bits_per_byte": job.held_out.selection_loss(state)})
            evaluation.flush()
            meter.flush()
            on_evaluate(step)

        state = train_stage(
            run,
            display,
            "train",
            job.initial,
            job.step,
            job.batches,
            steps=job.training.steps,
            checkpoint_every=job.training.checkpoint_every,
            note=lambda values: f"{values['cross_entropy'] / nats_per_bit:.2f} bits/byte",
            on_start=on_start,
            on_record=on_record,
            on_save=on_save,
            mesh=job.mesh,
            keep_newest=job.training.keep_newest,
            keep_every=job.training.keep_every,
        )
    return training_results(job.splits, job.model, state.params, job.held_out.bits_per_byte(state))


def training_results(
    splits: Mapping[str, Sequence[Document]], model: DecoderConfig, params: nnx.State, bits: dict[str, Any]
) -> dict[str, Any]:
    """What `results.json` holds, from `bits_per_byte` of each held-out split."""
    return {
        "title": "Training a language model",
        "headline": {"test bits/byte": bits["test"]["all"]},
        "data": describe_data(splits),
        "model": describe_model(model, params),
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
