"""Stages of `evolve_topology` around the model: text, training, recorded routing, healing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.progress import Progress

from experiments.text import read_text
from moe_jax.analysis import RoutingTrace, save_trace, summarise_routing, trace_routing
from moe_jax.data import DataConfig, Sequences, balanced_subset, pack, train_batches
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.execution import Execution
from moe_jax.routing import full_topology
from moe_jax.runs import MetricsWriter, RunFolder, read_json, section, write_json
from moe_jax.runs.bars import bar
from moe_jax.training.evaluation import LOG2, make_evaluator
from moe_jax.training.loop import TrainingConfig
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.stage import train_stage
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step, merge_model
from moe_jax.types import Topology


class Lab:
    """What every stage needs: the run's folder, the settings, the text, the model's structure and compiled programs."""

    def __init__(self, run: RunFolder, display: Progress):
        """Reads settings and text, initialises the model.

        Args:
          run: the open run folder.
          display: where bars are drawn.
        """
        config = run.config
        self.run, self.display = run, display
        self.data = _section(DataConfig, config, "data")
        self.model = _section(DecoderConfig, config, "model")
        self.training = _section(TrainingConfig, config, "training")
        self.key = jax.random.key(config.seed)
        self.splits = read_text(self.data)
        length = self.data.sequence_length
        self.packed = {name: pack(documents, length) for name, documents in self.splits.items()}
        # Overlapping windows, since a model's first bytes of a window have little to go by and an n-gram's have all.
        self.selection, self.test = (
            pack(self.splits[name], length, context=length // 4) for name in ("selection", "test")
        )
        steps, heal_steps = self.training.steps, self.training.heal_steps
        optimizer = make_optimizer(_section(OptimizerConfig, config, "optimizer"), steps, heal_steps)
        self.graphdef, self.initial = init_state(
            lambda key: Decoder(self.model, key=key, execution=Execution(remat=self.training.remat)),
            jax.random.fold_in(self.key, 0),
            optimizer,
        )
        self.step = make_train_step(
            self.graphdef, optimizer, _section(LossConfig, config, "loss"), jax.random.fold_in(self.key, 3)
        )
        self.model_graphdef = nnx.graphdef(merge_model(self.graphdef, self.initial))
        self.evaluate = make_evaluator(self.model_graphdef, batch_size=32)
        self.open_topology = full_topology(self.model.num_moe_layers, self.model.num_experts, self.model.num_choices)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall seconds of a stage to the run's record; a resumed stage adds to what was there."""
        start = time.perf_counter()
        yield
        path = self.run.path / "stages" / "timing.json"
        seconds = read_json(path) if path.is_file() else {}
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        write_json(path, seconds)

    def subset(self, split: str, per_domain: int) -> Sequences:
        """The same number of sequences of every domain, or all that the smallest domain allows."""
        sequences = self.packed[split]
        smallest = int(np.bincount(sequences.domain, minlength=len(sequences.domain_names)).min())
        return balanced_subset(sequences, min(per_domain, smallest), jax.random.fold_in(self.key, 2))


def train_model(lab: Lab) -> TrainState:
    """Trains the model, or what is left of it, with a checkpoint and a held-out loss at every mark."""
    evaluation = MetricsWriter(lab.run.path, "evaluate")

    def on_save(step: int, state: TrainState) -> None:
        nll, targets = lab.evaluate(model_state(state), lab.selection, lab.open_topology)
        evaluation.append(step, {"bits_per_byte": nll.sum() / targets.sum() / LOG2})
        evaluation.flush()

    with lab.timed("train"):
        return _train_stage(
            lab,
            "train",
            lab.initial,
            steps=lab.training.steps,
            checkpoint_every=lab.training.checkpoint_every,
            topology=lab.open_topology,
            on_start=evaluation.truncate_after,
            on_save=on_save,
        )


def heal(lab: Lab, role: str, state: TrainState, topology: Topology) -> TrainState:
    """A short continuation of training, optimizer state and schedule included, under a topology."""
    steps = lab.training.heal_steps
    with lab.timed("heal"):
        return _train_stage(
            lab,
            f"heal/{role}",
            state,
            steps=lab.training.steps + steps,
            checkpoint_every=steps,
            topology=topology,
        )


def _train_stage(lab: Lab, stage: str, initial: TrainState, *, steps: int, **options: Any) -> TrainState:
    """Trains until step `steps` on the training split."""
    key = jax.random.fold_in(lab.key, 1)
    return train_stage(
        lab.run,
        lab.display,
        stage,
        initial,
        lab.step,
        lambda start: train_batches(lab.splits["train"], lab.data, key, start, steps),
        steps=steps,
        note=lambda values: f"{values['cross_entropy'] / LOG2:.2f} bits/byte",
        **options,
    )


def record_routing(lab: Lab, state: TrainState) -> dict:
    """Routes the selection split once, keeps the trace, and gives its statistics."""
    path = lab.run.path / "stages" / "routing.json"
    if path.is_file():
        return read_json(path)
    sequences = lab.packed["selection"]
    inputs, mask = sequences.tokens[:, :-1].astype(np.int32), sequences.mask[:, :-1]

    @jax.jit
    def route(state: nnx.State, tokens: jax.Array, mask: jax.Array) -> tuple:
        return nnx.merge(lab.model_graphdef, state)(tokens, mask, trace="full")[1]

    with lab.timed("routing report"), bar(lab.display, "routing report", 1) as progress:
        routed = route(model_state(state), inputs, mask)
        length = inputs.shape[1]
        trace: RoutingTrace = trace_routing(
            routed,
            token_ids=inputs,
            token_mask=mask,
            position=np.tile(np.arange(length), len(inputs)),
            domain=np.repeat(sequences.domain, length),
            document=np.repeat(sequences.document, length),
            domain_names=sequences.domain_names,
        )
        save_trace(lab.run.path / "traces" / "routing.npz", trace)
        write_json(path, summarise_routing(trace, routed.stats))
        progress.advance()
    return read_json(path)


def model_state(state: TrainState) -> nnx.State:
    """The model's parameters and balance state, as one state."""
    return nnx.merge_state(state.params, state.balance)


def _section(kind: type, config: ConfigDict, name: str):
    return section(kind, config[name], f"config.{name}")
