import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_jax.runs import MetricsWriter, list_stages, read_metrics

ROOT = pathlib.Path(__file__).parent.parent


def row(step: int) -> dict:
    """A row that is a pure function of its step, with every kind of value and a metric that comes and goes."""
    values = {"loss": np.float32(1.0) / (step + 1), "tokens": step * 64, "load": np.full((2, 3), step, np.float32)}
    return values | ({"entropy": np.arange(2) + step / 3} if step % 4 == 0 else {})


def write(folder: pathlib.Path, steps: range, every: int) -> None:
    """Appends rows and flushes at multiples of `every`, as a run does at its checkpoints."""
    writer = MetricsWriter(folder, "train")
    for step in steps:
        writer.append(step, row(step))
        if (step + 1) % every == 0:
            writer.flush()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, range(12), every=5)
    columns = read_metrics(tmp_path, "train")
    # Rows 10 and 11 were not flushed.
    assert columns["step"].tolist() == list(range(10)) and columns["step"].dtype == np.int64
    assert sorted(contents(tmp_path)) == [
        "metrics/train/000000000-000000004.parquet",
        "metrics/train/000000005-000000009.parquet",
    ]
    for step in range(10):
        assert columns["loss"][step] == np.float64(row(step)["loss"])
        assert columns["tokens"][step] == 64 * step
        np.testing.assert_array_equal(columns["load"][step], np.full((2, 3), step))
        expected = np.arange(2) + step / 3 if step % 4 == 0 else [np.nan, np.nan]
        np.testing.assert_array_equal(columns["entropy"][step], expected)
    assert columns["load"].dtype == np.float32 and columns["entropy"].dtype == np.float64


def test_nan_and_infinity_survive_and_a_late_metric_reads_as_nan_before(tmp_path):
    writer = MetricsWriter(tmp_path, "search/ga-seed0")
    writer.append(0, {"fitness": np.nan})
    writer.flush()
    writer.append(1, {"fitness": -np.inf, "late": np.ones(2, np.float32)})
    writer.flush()
    columns = read_metrics(tmp_path, "search/ga-seed0")
    np.testing.assert_array_equal(columns["fitness"], [np.nan, -np.inf])
    np.testing.assert_array_equal(columns["late"], [[np.nan, np.nan], [1, 1]])


def test_files_are_plain_parquet(tmp_path):
    write(tmp_path, range(5), every=5)
    table = pq.read_table(tmp_path / "metrics" / "train").to_pylist()
    assert table[2]["load"] == [[2.0] * 3] * 2 and table[2]["step"] == 2


@pytest.mark.parametrize("checkpoint", [-1, 4, 9, 14])
def test_a_restart_rewrites_the_same_bytes(tmp_path, checkpoint):
    write(tmp_path / "whole", range(20), every=5)
    write(tmp_path / "cut", range(17), every=5)
    MetricsWriter(tmp_path / "cut", "train").truncate_after(checkpoint)
    kept = range(checkpoint + 1)
    if kept:
        assert read_metrics(tmp_path / "cut", "train")["step"].tolist() == list(kept)
    write(tmp_path / "cut", range(checkpoint + 1, 20), every=5)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_truncating_inside_a_segment_and_in_the_buffer(tmp_path):
    writer = MetricsWriter(tmp_path, "train")
    for step in range(8):
        writer.append(step, row(step))
        if step == 4:
            writer.flush()
    writer.truncate_after(6)
    writer.append(7, row(7))
    writer.flush()
    assert read_metrics(tmp_path, "train")["step"].tolist() == list(range(8))
    writer.truncate_after(2)
    writer.truncate_after(2)
    assert list(contents(tmp_path)) == ["metrics/train/000000000-000000002.parquet"]
    np.testing.assert_array_equal(read_metrics(tmp_path, "train")["load"][:, 0, 0], [0, 1, 2])
    writer.append(3, row(3))


def test_what_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path, "train")
    writer.append(3, {"load": np.zeros(2)})
    with pytest.raises(ValueError, match="step 3 follows step 3"):
        writer.append(3, {"load": np.zeros(2)})
    with pytest.raises(ValueError, match=r"'load' has shape \(3,\) at step 4, and had \(2,\) before"):
        writer.append(4, {"load": np.zeros(3)})
    with pytest.raises(ValueError, match="'step' is taken"):
        writer.append(4, {"step": 4})
    with pytest.raises(ValueError, match="at most two axes"):
        writer.append(4, {"x": np.zeros((1, 1, 1))})
    writer.flush()
    with pytest.raises(ValueError, match="truncate_after"):
        MetricsWriter(tmp_path, "train").append(3, {"loss": 0.0})
    assert list_stages(tmp_path) == ["train"]
    with pytest.raises(FileNotFoundError, match="no metrics of stage 'trian'; it has: train"):
        read_metrics(tmp_path, "trian")


def test_kill_9_and_restart_gives_the_same_bytes(tmp_path):
    # One process imports once and forks the writers, which it kills; each writer goes on from the last segment but one,
    # as a run does from its last checkpoint when it dies between the metrics and the next checkpoint.
    program = """
import os, pathlib, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from test_runs_metrics import MetricsWriter, row
folder = pathlib.Path(sys.argv[1])

def write():
    lasts = sorted(int(path.stem.split("-")[1]) for path in folder.rglob("*.parquet"))
    done = lasts[-2] if len(lasts) > 1 else -1
    writer = MetricsWriter(folder, "train")
    writer.truncate_after(done)
    for step in range(done + 1, 1000):
        writer.append(step, row(step))
        if (step + 1) % 5 == 0:
            writer.flush()

delays = random.Random(0)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    if kills < 15:
        time.sleep(delays.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
    kills += (code := os.waitpid(child, 0)[1]) == signal.SIGKILL
    if code != signal.SIGKILL:
        break
print(kills, code)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "killed"), str(ROOT / "tests")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    kills, code = map(int, result.stdout.split())
    assert kills >= 3 and code == 0, result.stderr
    write(tmp_path / "whole", range(1000), every=5)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
