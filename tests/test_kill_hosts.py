"""A run of several hosts, killed and asked to stop: it ends in the same bits as one that was left alone.

The slow test sends 20 SIGKILLs and 5 SIGTERMs at random moments; the quick one two of the first and one of the second.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest

from moe_jax.runs import list_runs, read_json, read_metrics, read_progress
from tests.hosts_program import DEADLINE, finish, log_of, started

CONFIG = "configs/tiny_train.py"
WRITE = "checkpoints/train/*.orbax-checkpoint-tmp*"  # the folder that Orbax fills and renames


def command(workdir: pathlib.Path, **changes: object) -> list[str]:
    """The training script on a run's folder; `model__width=8` sets `config.model.width`."""
    sizes = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return ["-m", "experiments.train", f"--config={CONFIG}", *sizes, "--workdir", str(workdir)]


def contents(workdir: pathlib.Path) -> dict[str, object]:
    """Everything that a run leaves and that depends on no clock, path -> content."""
    files: dict[str, object] = {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.glob("metrics/**/*.parquet")
        if path.parent.name != "timing"
    }
    files["results.json"] = read_json(workdir / "results.json")
    newest = max(checkpoints(workdir))
    # The digests of every leaf, which the store compares when it restores.
    facts = workdir / "checkpoints" / "train" / str(newest) / "facts" / "metadata"
    files["checkpoint"] = (newest, json.loads(facts.read_text()))
    return files


def checkpoints(workdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/train/*") if path.name.isdigit())


def position(workdir: pathlib.Path) -> int:
    """The step that the run has reported."""
    return read_progress(workdir).step if (workdir / "status.json").is_file() else 0


def starts(workdir: pathlib.Path) -> int:
    """How often the run was started, its hosts having met."""
    path = workdir / "environment.json"
    return 1 + len(read_json(path).get("restarts", [])) if path.is_file() else 0


def wait_for(event: Callable[[], object], processes: list[subprocess.Popen]) -> bool:
    """Waits until something has happened; False if the program came to its end before."""
    deadline = time.monotonic() + DEADLINE
    while not event():
        if all(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < deadline, "the program is stuck"
        time.sleep(0.01)
    return True


def exit_codes(processes: list[subprocess.Popen]) -> list[int]:
    """Waits for the ends of all processes, for which none may hang on another's death."""
    return [process.wait(DEADLINE) for process in processes]


@pytest.fixture
def cache(tmp_path) -> dict[str, str]:
    """A cache of compiled programs for a test's processes; one of their own, since a kill may leave half an entry."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": folder}


def send(
    number: signal.Signals,
    victim: int,
    event: Callable[[], object],
    workdir: pathlib.Path,
    cache: dict[str, str],
    delay: float = 0.0,
    **changes: object,
) -> bool:
    """Starts the program on two hosts and signals one of them after an event; False if it came to its end before."""
    logs = workdir.with_name(f"{workdir.name}-")
    before = checkpoints(workdir)
    with started(command(workdir, **changes), 2, logs, **cache) as processes:
        if not wait_for(event, processes):
            assert exit_codes(processes) == [0, 0], log_of(logs, 0).read_text() + log_of(logs, 1).read_text()
            return False
        time.sleep(delay)
        if any(process.poll() is not None for process in processes):
            assert exit_codes(processes) == [0, 0]
            return False
        processes[victim].send_signal(number)
        codes = exit_codes(processes)
    told = "".join(log_of(logs, index).read_text() for index in (0, 1))
    assert max(checkpoints(workdir), default=0) >= max(before, default=0), "a checkpoint that was whole is lost"
    if number == signal.SIGKILL:
        assert codes[victim] == -signal.SIGKILL, (codes, told)
        assert codes[1 - victim] != 0 or read_progress(workdir).status == "finished", (codes, told)
    else:
        assert codes == [0, 0], (codes, told)
        progress = read_progress(workdir)
        if progress.status != "finished":  # the signal may come when all is done but the report
            assert progress.status == "interrupted" and "to continue: python -m experiments.train" in told
    return True


def test_two_hosts_compute_what_one_does_and_survive_signals(tmp_path, cache):
    changes = {"mesh__data": 2, "training__steps": 15}
    alone, straight, broken = (tmp_path / name for name in ("alone", "straight", "broken"))
    finish(command(alone, **changes), 1, tmp_path / "alone-", devices=2, **cache)
    _, told = finish(command(straight, **changes), 2, tmp_path / "straight-", **cache)
    assert "bits/byte" not in told, "only the first host draws"
    for stage, rows in (("train", 15), ("evaluate", 3)):
        one, two = read_metrics(alone, stage), read_metrics(straight, stage)
        assert one.keys() == two.keys() and len(one["step"]) == rows
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert send(signal.SIGKILL, 1, lambda: position(broken) >= 5, broken, cache, **changes)
    before = max(checkpoints(broken))
    assert send(signal.SIGTERM, 1, lambda: starts(broken) == 2, broken, cache, **changes)
    (newest,) = {position(broken), max(checkpoints(broken))}  # nothing of the steps before it is lost
    assert newest == before + 1, "a signal before the training stops it after its first step"
    assert list_runs(broken)[0].progress.last_checkpoint == f"checkpoints/train/{newest}"
    send(signal.SIGKILL, 0, lambda: position(broken) > newest, broken, cache, **changes)
    finish(command(broken, **changes), 2, tmp_path / "broken-", **cache)
    assert contents(broken) == contents(straight)


@pytest.mark.slow
def test_twenty_kills_and_five_wishes_to_stop(tmp_path, cache):
    """A run that comes to its end before all signals are sent is followed by another."""
    changes = {"mesh__data": 2, "training__steps": 60}
    chance = random.Random(0)
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 5
    chance.shuffle(signals)
    straight = tmp_path / "straight"
    finish(command(straight, **changes), 2, tmp_path / "straight-", **cache)
    runs = [tmp_path / "broken0"]
    while signals:
        workdir = runs[-1]
        begun, start, known = starts(workdir), position(workdir), set(workdir.glob(WRITE))
        events = {
            "a start": lambda workdir=workdir, begun=begun: starts(workdir) > begun,
            "a step": lambda workdir=workdir, start=start: position(workdir) > start,
            "a write": lambda workdir=workdir, known=known: set(workdir.glob(WRITE)) - known,
        }
        name, victim, delay = chance.choice(sorted(events)), chance.randrange(2), chance.uniform(0, 2)
        was_sent = send(signals[0], victim, events[name], workdir, cache, delay, **changes)
        print(
            f"{signals[0].name} to host {victim} at {name}: {was_sent}, {start} -> {checkpoints(workdir)}", flush=True
        )
        if was_sent:
            signals.pop(0)
        else:
            runs.append(tmp_path / f"broken{len(runs)}")
    for workdir in runs:
        finish(command(workdir, **changes), 2, workdir.with_name(f"{workdir.name}-"), **cache)
        assert contents(workdir) == contents(straight)
