"""Sweeps on every engine: what runs, what is retried, what is left out after a kill, and what is said about it."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_jax.report.pictures import plot_sweep
from moe_jax.runs import ConfigError, read_json
from moe_jax.training.sweeps import HereEngine, LaunchConfig, RayEngine, SlurmEngine, SweepConfig
from moe_jax.training.sweeps.engines.engine import require_package
from tests.sweep_work import CONFIG, GRID, RANGE, TPE, run_sweep, starts_of, work

ROOT = pathlib.Path(__file__).parent.parent
TWO_SEEDS = SweepConfig(seeds=2, reference=("optimizer.learning_rate", 1e-3))


def check_grid(folder, summary):
    """The outcome of three learning rates, two seeds each, of which the last fails."""
    low, best, failed = summary["points"]
    # log10(1e-4 / 1e-3)^2 = 1, and 1 / 4 for the last step; the second seed is 0.01 worse.
    np.testing.assert_allclose(low["loss"], [1.25, 1.26])
    np.testing.assert_allclose(best["loss"], [0.25, 0.26])
    # Of two numbers d apart, t_{0.975, 1} = 12.706 times d / 2 to either side of the mean.
    np.testing.assert_allclose(best["interval"], [0.255 - 12.7062 * 0.005, 0.255 + 12.7062 * 0.005], rtol=1e-5)
    assert (failed["state"], failed["mean"], failed["interval"]) == ("failed", None, None)
    assert failed["errors"] == [f"0002-seed{seed}: FloatingPointError: the loss is NaN" for seed in (0, 1)]
    # The test split of the chosen point alone.
    assert summary["chosen"]["number"] == 1
    np.testing.assert_allclose(summary["chosen"]["test"]["loss"], [0.75, 0.76])
    against = {row["point"]: row for row in summary["comparisons"]}
    np.testing.assert_allclose(against[0]["mean"], 1.0)
    assert against[0]["reference"] == 1 and against[2]["mean"] is None and 1 not in against
    table = pq.read_table(folder / "trials.parquet").to_pydict()
    assert table["optimizer.learning_rate"] == [1e-4, 1e-4, 1e-3, 1e-3, 1.0, 1.0]
    assert table["state"] == ["finished"] * 4 + ["failed"] * 2
    np.testing.assert_allclose(table["selection_bits_per_byte"], [1.25, 1.26, 0.25, 0.26, np.nan, np.nan])
    assert read_json(folder / "sweep.json") == summary


def test_a_grid_in_this_process_of_which_one_point_fails(tmp_path):
    check_grid(tmp_path, run_sweep(tmp_path, HereEngine(work), GRID, TWO_SEEDS))
    before = {path: starts_of(path) for path in (tmp_path / "trials").iterdir()}
    check_grid(tmp_path, run_sweep(tmp_path, HereEngine(work), GRID, TWO_SEEDS))
    assert {path: starts_of(path) for path in (tmp_path / "trials").iterdir()} == before  # nothing was trained again


def test_a_sweep_that_is_broken_off_trains_only_what_is_missing(tmp_path):
    def fragile(folder, config, watch):
        if folder.name == "0001-seed0":
            raise KeyboardInterrupt
        work(folder, config, watch)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, HereEngine(fragile), GRID, TWO_SEEDS)
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == ["0000-seed0", "0000-seed1"]
    check_grid(tmp_path, run_sweep(tmp_path, HereEngine(work), GRID, TWO_SEEDS))
    assert all(len(starts_of(path)) == 1 for path in (tmp_path / "trials").iterdir())


def test_successive_halving_stops_trials_early_and_spares_their_other_seeds(tmp_path):
    sweep = SweepConfig(method="random", points=9, seeds=2, prune="asha")
    summary = run_sweep(tmp_path, HereEngine(work), RANGE, sweep)
    stopped = [row for row in summary["points"] if row["state"] == "stopped"]
    finished = [row for row in summary["points"] if row["state"] == "finished"]
    assert len(stopped) + len(finished) == 9 and len(stopped) >= 4
    assert all(row["seeds"] == [0, 1] for row in finished)
    assert {row["stopped_at"] for row in stopped} <= {1, 3}  # the rungs
    names = {path.name for path in (tmp_path / "trials").iterdir()}
    assert not any(f"{row['number']:04d}-seed1" in names for row in stopped)

    def distance(row):
        return abs(np.log10(row["values"]["optimizer.learning_rate"] / 1e-3))

    assert min(map(distance, finished)) == min(map(distance, summary["points"]))  # the best one came through


def test_a_study_that_is_killed_goes_on_to_the_same_end(tmp_path):
    whole = run_sweep(tmp_path / "whole", HereEngine(work), RANGE, TPE)
    broken, environment = tmp_path / "broken", os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.sweep_work", str(broken)]
    for trials in (2, 7):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while len(list(broken.glob("trials/*"))) < trials:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.03)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (broken / "sweep.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert read_json(broken / "sweep.json") == whole
    starts = [starts_of(path) for path in broken.glob("trials/*")]
    assert sum(len(each) > 1 for each in starts) <= 2  # only what was on its way was taken up again


def kill_a_worker(root, trial):
    """Kills the process that works on a trial once it has a checkpoint, in the background."""

    def kill():
        while not (root / "trials" / trial / "checkpoint.json").is_file():
            time.sleep(0.02)
        os.kill(starts_of(root / "trials" / trial)[0]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def slowly(pause):
    config = CONFIG.copy_and_resolve_references()
    config.pause = pause
    return config


def test_processes_through_submitit_of_which_one_is_killed(tmp_path):
    """The local executor: the code path of SLURM, of which there is none here."""
    pytest.importorskip("submitit")
    launch = LaunchConfig(workers=2, slurm_cluster="local", slurm_minutes=5)
    killer = kill_a_worker(tmp_path, "0001-seed0")
    summary = run_sweep(tmp_path, SlurmEngine(work, launch, tmp_path / "jobs"), GRID, TWO_SEEDS, slowly(0.3))
    killer.join()
    check_grid(tmp_path, summary)
    first, second = starts_of(tmp_path / "trials" / "0001-seed0")
    assert first["start"] == 0 and second["start"] >= 1 and first["pid"] != second["pid"]


def test_a_worker_that_is_lost_too_often_is_said_to_be(tmp_path):
    pytest.importorskip("submitit")
    launch = LaunchConfig(workers=1, slurm_cluster="local", slurm_minutes=5)
    killer = kill_a_worker(tmp_path, "0000-seed0")
    sweep = SweepConfig(seeds=1, points=1)
    engine = SlurmEngine(work, launch, tmp_path / "jobs")
    summary = run_sweep(tmp_path, engine, GRID, sweep, slowly(0.3), retries=0)
    killer.join()
    (row,) = summary["points"]
    assert row["state"] == "unfinished" and "its log:" in row["errors"][0]
    assert summary["chosen"] is None
    again = run_sweep(tmp_path, HereEngine(work), GRID, sweep, slowly(0.3))
    assert again["chosen"]["number"] == 0


@pytest.fixture(scope="module")
def cluster():
    """Two Ray nodes of one CPU each on this machine."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.filterwarnings("ignore::ResourceWarning:ray", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ray_cluster_of_two_nodes_of_which_a_worker_is_killed(tmp_path, cluster):
    killer = kill_a_worker(tmp_path, "0001-seed0")
    engine = RayEngine(work, LaunchConfig(workers=2, ray_address=cluster.address))
    summary = run_sweep(tmp_path, engine, GRID, TWO_SEEDS, slowly(0.3))
    killer.join()
    check_grid(tmp_path, summary)
    first, second = starts_of(tmp_path / "trials" / "0001-seed0")
    assert first["start"] == 0 and second["start"] >= 1 and first["pid"] != second["pid"]


def test_an_engine_whose_package_is_missing_is_refused_with_what_to_install():
    with pytest.raises(ConfigError, match=r"needs the package 'raay'; install it: pip install 'moe_jax\[scale\]'"):
        require_package("raay", "ray")


def axis(name, is_numeric=True):
    return {"name": name, "is_numeric": is_numeric, "is_log": False}


@pytest.mark.parametrize(
    ("axes", "panels"),
    [
        ([axis("a")], 1),
        ([axis("a", False)], 1),
        ([axis("a"), axis("b")], 2),  # the map and its scale
        ([axis("a"), axis("b", False)], 1),
        ([axis("a", False), axis("b", False)], 1),
        ([axis("a"), axis("b"), axis("c", False)], 3),
    ],
)
def test_the_picture_has_every_point(axes, panels):
    values = [(x, y, z) for x in (1, 2) for y in (3, 4) for z in (5, 6)][:: 2 if len(axes) < 3 else 1]
    points = [
        {
            "number": number,
            "values": {one["name"]: value for one, value in zip(axes, row, strict=False)},
            "mean": float(number),
            "interval": [number - 0.5, number + 0.5],
        }
        for number, row in enumerate(values)
    ]
    points.append(points[0] | {"number": 99, "mean": None, "interval": None})  # a failed one has no place
    figure = plot_sweep({"axes": axes, "points": points, "chosen": {"number": 0}})
    assert len(figure.axes) == panels
    shown = np.concatenate([part.get_offsets() for part in figure.axes[0].collections if len(part.get_offsets()) > 1])
    assert len(shown) == len(values)
