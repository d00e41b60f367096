"""A stage of training meets signals, damaged checkpoints, a full disk and a folder that nobody may write to."""

import io
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress

from moe_jax.checkpoints import CheckpointError
from moe_jax.data import DataConfig, Document, train_batches
from moe_jax.errors import MendableError
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs import MetricsWriter, RunError, RunFolder, read_metrics, read_progress
from moe_jax.runs.stop import Stopped
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.stage import train_stage
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step

CONFIG = ConfigDict({"seed": 0, "training": {"steps": 12}})
MODEL = DecoderConfig(vocab_size=256, width=8, layers=("dense",), num_heads=1, num_kv_heads=1, dense_hidden=8)
TEXT = np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def parts():
    """A state at step 0 and its step."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=3), 12)
    graphdef, initial = init_state(lambda key: Decoder(MODEL, key=key), jax.random.key(0), optimizer)
    return initial, make_train_step(graphdef, optimizer, LossConfig())


def life(folder: pathlib.Path, parts, at: int = 0, event=lambda: None, keep_every: int = 0) -> tuple[TrainState, str]:
    """One life of a process, with checkpoints after 5, 10 and 12 steps and an event at step `at`; and what it says."""
    initial, step = parts
    data = DataConfig(sequence_length=12, batch_size=4, domain_weights=())
    numbers = itertools.count(1)

    def note(values: dict[str, np.ndarray]) -> str:
        if next(numbers) == at:
            event()
        return ""

    console = Console(file=io.StringIO(), record=True)
    with RunFolder(folder, CONFIG) as run, Progress(console=console) as display:
        evaluation = MetricsWriter(run.path, "evaluate")

        def on_start(start: int) -> None:
            nonlocal numbers
            numbers = itertools.count(start + 1)
            evaluation.truncate_after(start)

        def on_save(step: int, state: TrainState) -> None:
            evaluation.append(step, {"loss": 1.0 / step})
            evaluation.flush()

        state = train_stage(
            run,
            display,
            "train",
            initial,
            step,
            lambda start: train_batches([Document(TEXT, "a", "a")], data, jax.random.key(1), start, 12),
            steps=12,
            checkpoint_every=5,
            note=note,
            on_start=on_start,
            on_save=on_save,
            keep_every=keep_every,
        )
        run.finish()
    return state, console.export_text()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Metrics and the newest checkpoint's digests."""
    files = [*folder.glob("metrics/**/*"), folder / "checkpoints/train/12/facts/metadata"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def straight(parts, tmp_path_factory) -> dict[str, bytes]:
    """What a run leaves that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    life(folder, parts)
    assert len(contents(folder)) == 7
    return contents(folder)


def checkpoints(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints" / "train").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_and_the_rest_is_as_if_there_had_been_none(tmp_path, parts, straight, number, code):
    """At a step between two checkpoints, at one that has a checkpoint, twice in one segment, and at the last."""
    handler = signal.getsignal(number)
    for at in (2, 4, 5, 12):
        with pytest.raises(Stopped) as stopped:
            life(tmp_path / "run", parts, at, lambda: os.kill(os.getpid(), number))
        assert stopped.value.code == code and signal.getsignal(number) == handler
        progress = read_progress(tmp_path / "run")
        assert (progress.status, progress.step) == ("interrupted", at)
        assert progress.last_checkpoint == f"checkpoints/train/{at}"
        assert list(read_metrics(tmp_path / "run", "train")["step"]) == list(range(1, at + 1))
    life(tmp_path / "run", parts)
    assert read_progress(tmp_path / "run").status == "finished"
    assert contents(tmp_path / "run") == straight


def test_checkpoints_that_stay_for_good(tmp_path, parts):
    for at in (3, 7, 8):
        with pytest.raises(Stopped):
            life(tmp_path / "run", parts, at, lambda: os.kill(os.getpid(), signal.SIGTERM), keep_every=5)
    assert checkpoints(tmp_path / "run") == ["5", "7", "8"]
    life(tmp_path / "run", parts, keep_every=5)
    assert checkpoints(tmp_path / "run") == ["10", "12", "5"]


def damage(folder: pathlib.Path, step: int) -> None:
    """Turns one bit of what a checkpoint says of itself."""
    path = folder / "checkpoints" / "train" / str(step) / "facts" / "metadata"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, parts, straight):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        life(folder, parts, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert checkpoints(folder) == ["10", "11"]
    damage(folder, 11)
    state, said = life(folder, parts)
    assert "train: the checkpoint of step 11 is damaged (its facts have changed since they were saved)" in said
    assert "going on from step 10" in said
    assert int(state.step) == 12 and contents(folder) == straight
    assert checkpoints(folder) == ["10", "12", "damaged"]
    for step in (10, 12):
        damage(folder, step)
    before = checkpoints(folder)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(12: .*; 10: .*\); check the disk"):
        life(folder, parts)
    assert checkpoints(folder) == before and read_progress(folder).status == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 megabytes, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"a full disk is not tested: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: pathlib.Path) -> None:
    """Takes all that is left of a disk, when no checkpoint is being written: see `test_a_write_that_fails_is_told`."""
    while list(folder.glob("run/checkpoints/*/*.orbax-checkpoint-tmp*")):
        time.sleep(0.01)
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_ends_the_run_in_a_line_and_room_lets_it_go_on(small_disk, parts, straight):
    folder = small_disk / "run"
    for at in (2, 6, 11):
        with pytest.raises(MendableError, match=r"(No space left on device|MiB free).*make room.*same command again"):
            life(folder, parts, at, lambda: fill(small_disk))
        (small_disk / "filler").unlink()
    fill(small_disk)
    with pytest.raises(RunError, match=r"cannot write in the run's folder .* make room"):
        life(folder, parts)
    (small_disk / "filler").unlink()
    life(folder, parts)
    assert contents(folder) == straight


def test_a_folder_that_cannot_be_written_is_refused(small_disk, parts):
    life(small_disk / "run", parts)
    before = contents(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in ("run", "new"):
        with pytest.raises(RunError, match=r"cannot write in the run's folder .*Read-only file system.*--workdir"):
            life(small_disk / folder, parts)
    assert contents(small_disk / "run") == before


def test_status_names_a_checkpoint_only_when_it_is_whole(tmp_path, parts):
    named = []

    def look() -> None:
        last = read_progress(tmp_path / "run").last_checkpoint
        named.append(last)
        assert last is None or (tmp_path / "run" / last / "_CHECKPOINT_METADATA").is_file()

    for at in (5, 6, 9, 10, 11):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        life(tmp_path / "run", parts, at, look)
    look()
    assert named[0] is None and named[-1] == "checkpoints/train/12"
