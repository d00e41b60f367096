import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from moe_jax.runs import RunError, RunFolder, from_json, list_runs, read_progress, write_atomic, write_json
from moe_jax.runs.files import remove_partial_files

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def config():
    return ConfigDict({"seed": 4, "training": {"steps": 10, "shape": (1, 2)}})


def start(program: str, *arguments: str) -> subprocess.Popen:
    """Starts a Python program that imports the checkout's moe_jax."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_run_from_start_to_end(tmp_path, config):
    path = tmp_path / "runs" / "evolve" / "small-seed4"
    with RunFolder(path, config) as run:
        assert not run.is_continued and not run.is_finished
        assert run.progress.status == "running"
        checkpoint = run.subfolder("checkpoints", "train") / "3"
        run.report_progress("train", 3, checkpoint)
        run.report_progress("train", 4)
        assert (run.progress.stage, run.progress.step, run.progress.last_checkpoint) == (
            "train",
            4,
            "checkpoints/train/3",
        )
        run.write_results({"headline": {"loss": 1.5}})
        run.finish()
        assert run.is_finished
    assert from_json((path / "config.json").read_text()).to_dict() == config.to_dict()
    environment = json.loads((path / "environment.json").read_text())
    assert environment["seed"] == 4 and environment["packages"]["jax"] and environment["cpu_count"] >= 1
    assert environment["devices"] == ["cpu"] * 4 and "pytest" in environment["command"]
    assert "restarts" not in environment
    assert os.uname().nodename not in (path / "environment.json").read_text()


def test_the_same_config_continues_and_another_is_refused(tmp_path, config):
    with RunFolder(tmp_path / "run", config):
        pass
    assert read_progress(tmp_path / "run").status == "interrupted"
    with RunFolder(tmp_path / "run", config, must_exist=True) as run:
        assert run.is_continued and run.progress.status == "running"
        run.finish()
    with RunFolder(tmp_path / "run", config) as run:
        assert run.is_finished
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["restarts"]) == 2
    other = config.copy_and_resolve_references()
    other.training.steps = 20
    with pytest.raises(
        RunError, match=r"training\.steps: 10 recorded, 20 now\); give this one its own folder with --workdir"
    ):
        RunFolder(tmp_path / "run", other)
    with RunFolder(tmp_path / "run", config) as run:
        assert run.is_finished, "the refusal must have changed nothing and must have given back the lock"


def test_resume_wants_a_run(tmp_path, config):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder(tmp_path / "run", config, must_exist=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_is_refused(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is no run: it holds thesis\.tex"):
        RunFolder(tmp_path, config)
    with pytest.raises(RunError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex", config)


def test_an_exception_is_recorded(tmp_path, config):
    with pytest.raises(FloatingPointError), RunFolder(tmp_path / "run", config) as run:
        run.report_progress("train", 7)
        raise FloatingPointError("loss is NaN at step 8\nsecond line")
    progress = read_progress(tmp_path / "run")
    assert (progress.status, progress.stage, progress.step) == ("failed", "train", 7)
    assert progress.error == "FloatingPointError: loss is NaN at step 8"
    with RunFolder(tmp_path / "run", config) as run:
        assert run.progress.status == "running" and run.progress.error is None
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "run", config):
        raise KeyboardInterrupt
    assert read_progress(tmp_path / "run").status == "interrupted"


def test_one_process_at_a_time(tmp_path, config):
    program = """
import sys, time
from ml_collections import ConfigDict
from moe_jax.runs import RunFolder
with RunFolder(sys.argv[1], ConfigDict({"seed": 4, "training": {"steps": 10, "shape": (1, 2)}})):
    print("mine", flush=True)
    time.sleep(60)
"""
    process = start(program, str(tmp_path / "run"))
    try:
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(RunError, match="another process is working on"):
            RunFolder(tmp_path / "run", config)
        assert [summary.progress.status for summary in list_runs(tmp_path)] == ["running"]
    finally:
        process.kill()
        process.communicate()
    # The kernel freed the lock; the file still says "running", which is no longer true.
    assert read_progress(tmp_path / "run").status == "running"
    assert [summary.progress.status for summary in list_runs(tmp_path)] == ["interrupted"]
    with RunFolder(tmp_path / "run", config) as run:
        assert run.is_continued


def test_list_runs_newest_first(tmp_path, config):
    for name in ("a", "b"):
        with RunFolder(tmp_path / "evolve" / name, config) as run:
            run.write_results({"headline": {"loss": 1.0}, "rest": 2})
            run.finish()
    with RunFolder(tmp_path / "evolve" / "a", config) as run:
        run.report_progress("again", 1)
    summaries = list_runs(tmp_path)
    assert [summary.path.name for summary in summaries] == ["a", "b"]
    assert summaries[0].headline == "loss 1" and summaries[0].progress.stage == "again"
    assert [summary.path.name for summary in list_runs(tmp_path / "evolve" / "b")] == ["b"]
    assert list_runs(tmp_path / "nothing") == []
    (tmp_path / "evolve" / "b" / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json is damaged"):
        list_runs(tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        read_progress(tmp_path)


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "deep" / "a.txt", "one")
    write_atomic(tmp_path / "deep" / "a.txt", b"two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("a.txt", "two")]
    write_json(tmp_path / "b.json", {"b": (1, 2), "a": 0.5})
    assert (tmp_path / "b.json").read_text() == '{\n  "b": [\n    1,\n    2\n  ],\n  "a": 0.5\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert json.loads((tmp_path / "b.json").read_text()) == {"a": 0.5, "b": [1, 2]}


def test_kill_9_never_leaves_half_a_file(tmp_path):
    # Loads only the file under test, so that a process writes within milliseconds of its start.
    program = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("files", {str(ROOT / "moe_jax" / "runs" / "files.py")!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
print("ready", flush=True)
n = 0
while True:
    n += 1
    files.write_json(pathlib.Path(sys.argv[1]) / "status.json", {{"n": n, "payload": [n] * 20000}})
"""
    delays = random.Random(0)
    seen = []
    for _ in range(20):
        process = start(program, str(tmp_path))
        assert process.stdout.readline() == "ready\n"
        time.sleep(delays.uniform(0.01, 0.12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (tmp_path / "status.json").exists():
            value = json.loads((tmp_path / "status.json").read_text())
            assert value["payload"] == [value["n"]] * 20000
            seen.append(value["n"])
    assert len(seen) > 10, "the kills came before the first write; the test has shown nothing"
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_run_inside_a_run_keeps_what_it_is_writing(tmp_path, config):
    inner = tmp_path / "sweep" / "trials" / "0000-seed0"
    with RunFolder(inner, config):
        half = inner / "metrics" / ".part.partial"
        half.parent.mkdir()
        half.write_text("a process is writing this")
        mine = tmp_path / "sweep" / ".status.json.1.partial"
        mine.write_text("left by a killed process")
        remove_partial_files(tmp_path / "sweep")
        assert half.exists() and not mine.exists()
    with RunFolder(inner, config):
        assert not half.exists()


def test_a_relative_workdir_records_its_checkpoints(tmp_path, monkeypatch):
    """The default workdir is relative, and checkpoint stores give absolute paths."""
    monkeypatch.chdir(tmp_path)
    with RunFolder(pathlib.Path("runs/mine"), ConfigDict({"seed": 0})) as run:
        run.report_progress("train", 3, tmp_path / "runs/mine/checkpoints/train/3")
        assert run.progress.last_checkpoint == "checkpoints/train/3"
