"""Killed and started again: a run ends in the same bits as one that was never interrupted.

The slow test kills the main job itself with SIGKILL, 20 times; the quick one breaks off the training loop in process.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointStore
from moe_jax.data import DataConfig, Document, train_batches
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs import MetricsWriter, load_config, read_json, read_progress, section
from moe_jax.training.loop import train
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step
from tests.tiny_model import TINY

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/tiny.py"
# Many checkpoints to be killed at, and one seed of every search.
SIZES = {"training.steps": 60, "training.checkpoint_every": 5, "evolution.seeds": 1, "evolution.generations": 6}
DEADLINE = 1200  # seconds until a process counts as stuck


class Aim(NamedTuple):
    """A moment to kill at: once the folder shows the event, after a random part of `delay` seconds."""

    stage: str
    event: str
    delay: float


WRITE = "*.orbax-checkpoint-tmp*"  # the folder that Orbax fills and renames
AIMS = (
    Aim("start", "running", 10.0),
    Aim("train", f"checkpoints/train/{WRITE}", 0.0),
    Aim("train", "progress", 0.2),
    Aim("train", f"checkpoints/train/{WRITE}", 0.02),
    Aim("train", "progress", 0.2),
    Aim("train", f"checkpoints/train/{WRITE}", 0.05),
    Aim("train", "progress", 0.2),
    Aim("search", f"checkpoints/search/*/{WRITE}", 0.0),
    Aim("search", "progress", 1.0),
    Aim("search", "progress", 1.0),
    Aim("search", f"checkpoints/search/*/{WRITE}", 0.02),
    Aim("search", "progress", 1.0),
    Aim("search", "progress", 1.0),
    Aim("search", "progress", 1.0),
    Aim("heal", f"checkpoints/heal/*/{WRITE}", 0.0),
    Aim("heal", f"checkpoints/heal/*/{WRITE}", 0.02),
    Aim("heal", "progress", 0.1),
    Aim("heal", "progress", 0.1),
    Aim("report", "results.json", 0.0),
    Aim("report", "pictures/*", 0.2),
)


@contextmanager
def started(workdir: pathlib.Path, cache: pathlib.Path) -> Iterator[subprocess.Popen]:
    """The main job in a process of its own, killed at the end if it still runs."""
    sizes = [f"--config.{key}={value}" for key, value in SIZES.items()]
    command = [sys.executable, "-m", "experiments.evolve_topology", f"--config={CONFIG}", *sizes]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": ""}
    with workdir.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(
            [*command, "--workdir", str(workdir)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finish(workdir: pathlib.Path, cache: pathlib.Path) -> None:
    """Runs the job to its end."""
    with started(workdir, cache) as process:
        assert process.wait(DEADLINE) == 0, workdir.with_suffix(".log").read_text()


def kill_at(aim: Aim, workdir: pathlib.Path, cache: pathlib.Path, chance: random.Random) -> bool:
    """Starts the job and kills it at the aim; False if it came to its end before."""
    event = event_of(aim, workdir)
    with started(workdir, cache) as process:
        deadline = time.monotonic() + DEADLINE
        while not event():
            if process.poll() is not None:
                assert process.returncode == 0, workdir.with_suffix(".log").read_text()
                return False
            assert time.monotonic() < deadline, f"{aim} was not reached"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, aim.delay))
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def event_of(aim: Aim, workdir: pathlib.Path) -> Callable[[], bool]:
    """Tells whether something has happened since now that the aim waits for."""
    if aim.event == "running":
        return lambda: True
    if aim.event == "progress":
        before = position(workdir)
        return lambda: (now := position(workdir)) != before and now[0].split("/")[0] == aim.stage
    known = set(workdir.glob(aim.event))
    return lambda: bool(set(workdir.glob(aim.event)) - known)


def position(workdir: pathlib.Path) -> tuple[str, int]:
    """Stage and step that the run has reported."""
    if not (workdir / "status.json").is_file():
        return "", 0
    progress = read_progress(workdir)
    return progress.stage, progress.step


def last_checkpoints(workdir: pathlib.Path) -> dict[str, int]:
    """Newest complete checkpoint by stage."""
    root, last = workdir / "checkpoints", {}
    for path in (metadata.parent for metadata in root.glob("**/_CHECKPOINT_METADATA")):
        if path.name.isdigit() and path.parent.name != "deleted":
            stage = str(path.parent.relative_to(root))
            last[stage] = max(last.get(stage, 0), int(path.name))
    return last


def settled_metrics(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    """Metrics up to the newest checkpoint of their stage, with the time when they were written."""
    last = last_checkpoints(workdir)
    return {
        path: path.stat().st_mtime_ns
        for stage, step in last.items()
        for path in (workdir / "metrics" / stage).glob("*.parquet")
        if int(path.stem.split("-")[1]) <= step
    }


def contents(workdir: pathlib.Path) -> dict[str, object]:
    """Everything that a run leaves and that depends on no clock, path -> content."""
    files: dict[str, object] = {}
    for path in workdir.glob("metrics/**/*.parquet"):
        files[str(path.relative_to(workdir))] = path.read_bytes()
    for path in (*workdir.glob("stages/**/*.npz"), *workdir.glob("traces/*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            for name in set(arrays.files) - {"seconds"}:
                array = arrays[name]
                files[f"{path.relative_to(workdir)}/{name}"] = (array.dtype, array.shape, array.tobytes())
    files["stages/routing.json"] = read_json(workdir / "stages" / "routing.json")
    files["results.json"] = without_times(read_json(workdir / "results.json"))
    # The store keeps a digest of every leaf, and compares the leaf with it when it restores.
    for stage, step in last_checkpoints(workdir).items():
        path = workdir / "checkpoints" / stage / str(step) / "facts" / "metadata"
        files[f"checkpoints/{stage}"] = (step, json.loads(path.read_text()))
    return files


def without_times(value: object) -> object:
    """Results without the wall-clock times in them."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "timing")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def trained_state(workdir: pathlib.Path, stage: str) -> TrainState:
    """The state at the end of a training stage."""
    config = load_config(ROOT / CONFIG)
    optimizer = make_optimizer(section(OptimizerConfig, config.optimizer, "optimizer"), SIZES["training.steps"])
    model = section(DecoderConfig, config.model, "model")
    _, like = init_state(lambda key: Decoder(model, key=key), jax.random.key(1), optimizer)
    with CheckpointStore(workdir / "checkpoints" / stage) as store:
        return store.restore(store.latest_step(), like)


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_twenty_kills_leave_the_bits_of_an_uninterrupted_run(tmp_path):
    """An aim that a run has already passed is taken up again by the next run, so that exactly 20 kills happen."""
    reference, chance = tmp_path / "reference", random.Random(0)
    # A folder of its own unless one is named: a killed process may leave half an entry in it.
    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", tmp_path / "compiled"))
    finish(reference, cache)
    aims, finished = list(AIMS), []
    while aims or not finished:
        workdir = tmp_path / f"killed{len(finished)}"
        missed = []
        for number, aim in enumerate(aims):
            settled, before = settled_metrics(workdir), last_checkpoints(workdir)
            was_killed = kill_at(aim, workdir, cache, chance)
            after = last_checkpoints(workdir)
            # Nothing that a complete checkpoint stood for is done again or lost.
            assert all(after.get(stage, 0) >= step for stage, step in before.items()), (aim, before, after)
            assert all(path.stat().st_mtime_ns == written for path, written in settled.items()), aim
            named = read_progress(workdir).last_checkpoint if (workdir / "status.json").is_file() else None
            assert named is None or (workdir / named).is_dir(), f"{aim}: status.json names {named}, which is not there"
            print(f"{aim}: {'killed' if was_killed else 'missed'} at {position(workdir)}, {after}")
            if not was_killed:
                missed = aims[number:]
                break
        finish(workdir, cache)
        aims = missed
        finished.append(workdir)
    expected = contents(reference)
    assert {path.split("/")[0] for path in expected} == {"metrics", "stages", "traces", "checkpoints", "results.json"}
    for workdir in finished:
        actual = contents(workdir)
        assert actual.keys() == expected.keys()
        assert [path for path in expected if actual[path] != expected[path]] == []
        for stage in ("train", "heal/untouched", "heal/evolved", "heal/baseline"):
            assert_same_bits(trained_state(workdir, stage), trained_state(reference, stage))


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_restored_state_runs_the_program_that_the_first_start_compiled(tmp_path, is_abstract):
    tree = {"w": np.float32([1, 2]) + jax.numpy.zeros(2), "key": jax.random.key(0)}
    like = jax.eval_shape(lambda: tree) if is_abstract else tree
    with CheckpointStore(tmp_path) as store:
        store.save(1, tree)
        store.wait()
        restored = store.restore(1, like)

    def draw(tree):
        return tree["w"] * jax.random.normal(tree["key"])

    assert jax.jit(draw).lower(restored).as_text() == jax.jit(draw).lower(tree).as_text()


class Killed(Exception):
    """Stands for the end of the process: nothing of the loop survives but its files."""


def test_training_broken_off_anywhere_continues_to_the_same_bits(tmp_path):
    """Checkpoints after 5, 10 and 12 steps; broken off before the first, at one not yet saved, and at the last."""
    model = dataclasses.replace(TINY, vocab_size=256)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=3), 12)
    graphdef, initial = init_state(lambda key: Decoder(model, key=key), jax.random.key(0), optimizer)
    step = make_train_step(graphdef, optimizer, LossConfig(balancer="sign", balancer_settings={"rate": 0.01}))
    random_bytes = np.random.default_rng(0).integers(0, 256, (2, 3, 400), dtype=np.uint8)
    documents = [
        Document(text.tobytes(), domain, f"{domain} {i}")
        for domain, texts in zip(("novel", "speeches"), random_bytes, strict=True)
        for i, text in enumerate(texts)
    ]
    data = DataConfig(sequence_length=12, batch_size=4, domain_weights=())

    def run(folder: pathlib.Path, break_off_at: int | None) -> TrainState:
        """One life of a process."""
        writer = MetricsWriter(folder, "train")
        with CheckpointStore(folder / "checkpoints") as store:
            last = store.latest_step()
            state = jax.tree.map(np.array, initial) if last is None else store.restore(last, initial)
            writer.truncate_after(last or 0)

            def record(number, metrics):
                writer.append(number, metrics)
                if number == break_off_at:
                    raise Killed

            def save(number, state):
                writer.flush()
                store.save(number, state)

            batches = train_batches(documents, data, jax.random.key(1), last or 0, 12)
            return train(state, step, batches, checkpoint_every=5, save=save, record=record, last_saved=last)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expected = run(straight, None)
    for number in (4, 10, 12):
        with pytest.raises(Killed):
            run(broken, number)
    assert_same_bits(run(broken, None), expected)
    segments = {path.name: path.read_bytes() for path in straight.glob("metrics/train/*.parquet")}
    assert len(segments) == 3
    assert {path.name: path.read_bytes() for path in broken.glob("metrics/train/*.parquet")} == segments
