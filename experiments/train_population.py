"""The engine `vmap` of `experiments.sweep`: trials that differ in numbers only, trained as one compiled program.

Every trial gets the folder that it would have alone, but for checkpoints: those of a population lie in
`populations/<digest of its trials>` beside the trials, and a population that was killed goes on from them. A member
whose loss or gradient stops being finite has failed; the others go on.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.progress import Progress

from experiments.text import read_text
from experiments.train import training_results
from moe_jax.checkpoints import CheckpointStore
from moe_jax.data import DataConfig, train_batches
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs import ConfigError, MetricsWriter, RunFolder, section, to_json
from moe_jax.runs.bars import bar
from moe_jax.training.evaluation import LOG2
from moe_jax.training.held_out import HeldOut
from moe_jax.training.loop import NonFiniteError, TrainingConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.population import (
    MEMBER_SETTINGS,
    init_population,
    make_population_step,
    member_of,
    population_mesh,
    shard_population,
    stack_members,
)
from moe_jax.training.step import LossConfig, TrainState, merge_model
from moe_jax.training.sweeps import Trial, apply

# The only values with which members are the runs that they would be alone.
ONLY: dict[str, Any] = {
    "data.tokenizer": "",
    "data.packing": "crop",
    "optimizer.name": "adamw",
    "optimizer.average_decay": 0.0,
    "training.spikes": None,
    "training.remat": "none",
    "mesh.data": 1,
    "mesh.expert": 1,
    "mesh.tensor": 1,
    "tracking.tensorboard": False,
    "tracking.mlflow": False,
    "tracking.wandb": False,
}


class PopulationEngine:
    """Trains what it is given, as many trials at a time as fit together."""

    def __init__(self, size: int, display: Progress):
        """Nothing is compiled yet.

        Args:
          size: members of a population, at most.
          display: where bars are drawn.
        """
        self._size, self._display = size, display
        self._ended: list[tuple[Trial, str]] = []

    def room(self) -> int:
        """Everything, so that populations are as large as they can be; nothing while trials wait to be taken."""
        return 0 if self._ended else 2**31

    def start(self, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
        """Trains."""
        together: dict[str, list[Trial]] = {}
        for trial in trials:
            together.setdefault(_what_is_shared(trial), []).append(trial)
        for group in together.values():
            for start in range(0, len(group), self._size):
                members = group[start : start + self._size]
                known = set(self._display.task_ids)
                try:
                    Population(members, self._display).train()
                except Exception as error:  # recorded in the members' folders, if they were open already
                    wrong = f"{type(error).__name__}: {error}"
                    self._display.console.print(f"{members[0].name} and those with it failed: {wrong}", markup=False)
                    self._ended += [(trial, wrong) for trial in members]
                else:
                    self._ended += [(trial, "") for trial in members]
                for task in set(self._display.task_ids) - known:
                    self._display.remove_task(task)

    def wait(self) -> list[tuple[Trial, str]]:
        """What was trained."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Nothing to give back."""


def _what_is_shared(trial: Trial) -> str:
    """The configuration without what members may have for themselves."""
    keys = [f"{section}.{name}" for section, names in MEMBER_SETTINGS.items() for name in names]
    return to_json(apply(trial.config, dict.fromkeys([*keys, "seed"])))


def check_population(config: ConfigDict) -> None:
    """Refuses what a run of its own has and a member of a population has not.

    Raises:
      ConfigError: naming the keys, and the values that they may have.
    """
    given = {key: config.get(key.split(".")[0], {}).get(key.split(".")[1], only) for key, only in ONLY.items()}
    refused = [f"{key}={given[key]!r}" for key, only in ONLY.items() if given[key] != only]
    if refused:
        known = ", ".join(f"{key}={value!r}" for key, value in ONLY.items())
        raise ConfigError(
            f"the engine vmap does not train with {', '.join(refused)}; take another engine, or leave {known}"
        )


class Population:
    """Trials that are trained together."""

    def __init__(self, trials: Sequence[Trial], display: Progress):
        """Reads the text and makes the states at step 0."""
        self.trials, self.display = trials, display
        config = trials[0].config
        self.mesh = population_mesh(len(trials))
        # Devices have the same number of members each; those that are added to make it so are trained for nothing.
        rows = [*trials, *[trials[0]] * (-len(trials) % self.mesh.size)]
        self.data = section(DataConfig, config.data, "config.data")
        self.model = section(DecoderConfig, config.model, "config.model")
        self.training = section(TrainingConfig, config.training, "config.training")
        optimizers = [section(OptimizerConfig, row.config.optimizer, "config.optimizer") for row in rows]
        losses = [section(LossConfig, row.config.loss, "config.loss") for row in rows]
        # Each member splits its seed as `experiments.train` does.
        self.seeds = [row.config.seed for row in rows]
        keys = [jax.random.split(jax.random.key(seed), 3) for seed in self.seeds]
        self.batch_keys = {seed: key[1] for seed, key in zip(self.seeds, keys, strict=True)}
        settings = [
            {"optimizer": vars(one), "loss": vars(other)} for one, other in zip(optimizers, losses, strict=True)
        ]
        self.members = shard_population(stack_members(settings, [(key[0], key[2]) for key in keys]), self.mesh)
        self.splits = read_text(self.data)
        model = self.model
        graphdef, self.initial = init_population(
            lambda key: Decoder(model, key=key), self.members, optimizers[0], self.training.steps
        )
        self.step = jax.jit(
            make_population_step(graphdef, optimizers[0], losses[0], self.training.steps, self.mesh), donate_argnums=0
        )
        model_graphdef = nnx.graphdef(merge_model(graphdef, member_of(self.initial, 0)))
        self.held_out = HeldOut(self.splits, self.data.sequence_length, model_graphdef)
        digest = hashlib.sha256(" ".join(trial.name for trial in trials).encode()).hexdigest()[:12]
        self.folder = trials[0].folder.parent.parent / "populations" / digest

    def train(self) -> None:
        """Trains from the newest checkpoint, and writes every member's results."""
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(RunFolder(trial.folder, trial.config)) for trial in self.trials]
            state, failed = self._train(runs)
            for index, run in enumerate(runs):
                with contextlib.suppress(NonFiniteError), run:
                    if str(index) in failed:
                        raise NonFiniteError(failed[str(index)])
                    run.write_results(self._measure(member_of(state, index)))
                    run.finish()

    def _train(self, runs: Sequence[RunFolder]) -> tuple[TrainState, dict[str, str]]:
        """The last states, and why members failed, by their index (a string, as JSON wants its keys)."""
        writers = [MetricsWriter(run.path, "train") for run in runs]
        evaluations = [MetricsWriter(run.path, "evaluate") for run in runs]
        steps, title = self.training.steps, f"{runs[0].path.name} and {len(runs) - 1} more"
        with (
            CheckpointStore(self.folder / "checkpoints", is_async=False) as store,
            bar(self.display, title, steps) as progress,
        ):
            host = jax.tree.map(np.asarray, self.initial)
            start, failed = store.latest_step() or 0, {}
            if start:
                host, failed = store.restore(start, host), store.read_metadata(start)["failed"]
            for writer in [*writers, *evaluations]:
                writer.truncate_after(start)
            state = shard_population(host, self.mesh)
            for number, (tokens, mask) in enumerate(self._batches(start), start + 1):
                state, metrics = self.step(state, self.members, *shard_population((tokens, mask), self.mesh))
                values = jax.tree.map(np.asarray, jax.device_get(metrics))
                _note_failures(number, values, failed)
                for index, writer in enumerate(writers):
                    if str(index) not in failed:
                        writer.append(number, member_of(values, index))
                progress.show(number, f"{np.nanmean(values['cross_entropy']) / LOG2:.2f} bits/byte")
                if number % self.training.checkpoint_every == 0 or number == steps:
                    host = jax.tree.map(np.asarray, jax.device_get(state))
                    for index, (run, writer, evaluation) in enumerate(zip(runs, writers, evaluations, strict=True)):
                        writer.flush()
                        if str(index) not in failed:
                            bits = self.held_out.selection_loss(member_of(host, index))
                            evaluation.append(number, {"bits_per_byte": bits})
                            evaluation.flush()
                        run.report_progress("train", number)
                    store.save(number, host, {"failed": failed})
        return host, failed

    def _batches(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and masks `[P, B, S+1]` of each step; members with the same seed read the same ones."""
        streams = {
            seed: train_batches(self.splits["train"], self.data, key, start, self.training.steps)
            for seed, key in self.batch_keys.items()
        }
        for batches in zip(*streams.values(), strict=True):
            by_seed = dict(zip(streams, batches, strict=True))
            chosen = [by_seed[seed] for seed in self.seeds]
            yield np.stack([batch.tokens for batch in chosen]), np.stack([batch.mask for batch in chosen])

    def _measure(self, state: TrainState) -> dict[str, Any]:
        """A member's results."""
        return training_results(self.splits, self.model, state.params, self.held_out.bits_per_byte(state))


def _note_failures(step: int, metrics: dict[str, np.ndarray], failed: dict[str, str]) -> None:
    """Adds the members whose numbers are no longer finite."""
    for index, name in itertools.product(range(len(metrics["loss"])), ("loss", "grad_norm")):
        if str(index) not in failed and not np.isfinite(metrics[name][index]):
            failed[str(index)] = f"{name} is {metrics[name][index]} at step {step}; lower optimizer.learning_rate"
