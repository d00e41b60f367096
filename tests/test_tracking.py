"""What TensorBoard, MLflow and W&B stored, read back with their own means; restarts; the cap on keys."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.runs import ConfigError, section
from moe_jax.training.sinks.wandb import read_records
from moe_jax.training.tracking import KeyCapWarning, Tracker, TrackingConfig, with_percentiles

ROOT = pathlib.Path(__file__).parent.parent
# MLflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

# A run that logs steps 1 to 7, has a checkpoint at 4, and is killed; then one that goes on from there to 9.
PROGRAM = """
import os, pathlib, signal, sys, time
import numpy as np
from moe_jax.training.sinks.wandb import stored_steps
from moe_jax.training.tracking import Tracker, TrackingConfig

start, stop = map(int, sys.argv[2:])
config = TrackingConfig(tensorboard=True, mlflow=True, wandb=True, project="tests", every=1)
with Tracker(config, pathlib.Path(sys.argv[1]), {"model.width": 16, "data.folders": ()}) as tracker:
    tracker.start(start)
    for step in range(start + 1, stop + 1):
        load = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]) + 0 * step
        tracker.record(step, {"loss": 10.0 / step, "z_loss": np.array([step, 2.0 * step]), "load": load})
    if stop == 7:
        (file,) = pathlib.Path(sys.argv[1]).glob("tracking/wandb/wandb/offline*/*.wandb")
        while max(stored_steps(file), default=0) < 7:  # its client writes in the background
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
"""
SCALARS = {
    "loss": lambda step: 10.0 / step,
    "z_loss/layer_0": lambda step: step,
    "z_loss/layer_1": lambda step: 2 * step,
    # Multiples of the mean load 0.25: 0.4, 0.8, 1.2, 1.6, of which the 5th percentile is 0.4 + 0.15 * 0.4.
    "load_p5/layer_0": lambda step: 0.46,
    "load_p50/layer_0": lambda step: 1.0,
    "load_p95/layer_0": lambda step: 1.54,
    "load_p5/layer_1": lambda step: 1.0,
    "load_p50/layer_1": lambda step: 1.0,
    "load_p95/layer_1": lambda step: 1.0,
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run that was killed once."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    for start, stop in ((0, 7), (4, 9)):
        command = [sys.executable, "-c", PROGRAM, str(folder), str(start), str(stop)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == (-signal.SIGKILL if stop == 7 else 0), done.stderr
    return folder / "tracking"


def assert_every_step_once(history):
    """`history`: name -> list of (step, value)."""
    for name, value in SCALARS.items():
        steps, values = zip(*sorted(history[name]), strict=True)
        assert steps == tuple(range(1, 10)), (name, steps)
        np.testing.assert_allclose(values, [value(step) for step in steps], rtol=1e-6)


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS.keys() and set(events.Tags()["histograms"]) == {"z_loss", "load"}
    assert_every_step_once({name: [(e.step, e.value) for e in events.Scalars(name)] for name in SCALARS})
    histogram = events.Histograms("load")[-1].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (8, 0.1, 0.4)
    np.testing.assert_allclose([histogram.sum, sum(histogram.bucket), histogram.sum_squares], [2, 8, 0.3 + 0.25])


def test_mlflow(tracked):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "demo" and run.info.status == "FINISHED"
    assert run.data.params == {"model.width": "16", "data.folders": "()"}
    assert set(run.data.metrics) == SCALARS.keys()
    history = {name: client.get_metric_history(run.info.run_id, name) for name in SCALARS}
    assert_every_step_once({name: [(m.step, m.value) for m in rows] for name, rows in history.items()})


def test_wandb(tracked):
    import json

    history: dict[str, list] = {name: [] for name in SCALARS}
    folders = sorted((tracked / "wandb" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "one id"
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for record in read_records(file):
            if record.WhichOneof("record_type") == "history":
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = record.history.step.num
                for name in SCALARS:
                    history[name].append((step, row[name]))
                assert row["load/_type"] == "histogram" and sum(row["load/values"]) == 8
            elif record.WhichOneof("record_type") == "run":
                assert record.run.display_name == "demo" and record.run.host == "-", "nothing of the machine"
    assert_every_step_once(history)


def wide(num_layers, num_experts=4):
    return {"loss": 1.0, "z_loss": np.arange(num_layers) * 1.0, "load": np.ones((num_layers, num_experts))}


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard"))
    events.Reload()
    return events.Tags()["scalars"]


def test_many_experts_make_no_keys_and_many_layers_are_summarised(tmp_path):
    config = TrackingConfig(tensorboard=True, every=5, max_keys=20)
    with Tracker(config, tmp_path / "narrow", {}) as tracker:
        tracker.start(0)
        tracker.record(4, wide(1))  # not its turn
        tracker.record(5, wide(4, num_experts=500))
    assert len(tensorboard_tags(tmp_path / "narrow")) == 1 + 4 * 4
    with Tracker(config, tmp_path / "deep", {}) as tracker:
        tracker.start(0)
        with pytest.warns(KeyCapWarning, match="21 keys, more than config.tracking.max_keys=20.*9 keys"):
            tracker.record(5, wide(5))
        tracker.record(10, wide(5))  # says it once
    names = ["z_loss", "load_p5", "load_p50", "load_p95"]
    expected = {"loss", *(f"{name}/{kind}" for name in names for kind in ("mean", "max"))}
    assert set(tensorboard_tags(tmp_path / "deep")) == expected


def test_too_few_keys_are_refused_with_their_number(tmp_path):
    with Tracker(TrackingConfig(tensorboard=True, every=1, max_keys=3), tmp_path, {}) as tracker:
        tracker.start(0)
        with pytest.raises(ConfigError, match=r"max_keys=3 is too few: a step has 9 keys.*give at least 9"):
            tracker.record(1, wide(2))


def test_without_sinks_nothing_is_written(tmp_path):
    with Tracker(TrackingConfig(every=1), tmp_path, {}) as tracker:
        tracker.start(0)
        tracker.record(1, wide(2))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ConfigError, match=r"config.tracking.wandb=True needs the package wandb: pip install 'moe_jax\[track\]'"
    ):
        Tracker(TrackingConfig(wandb=True), tmp_path, {})


def test_percentiles_of_a_layer_without_tokens_are_nan():
    rows = with_percentiles({"load": np.array([[0.0, 0.0], [1.0, 3.0]])})
    np.testing.assert_allclose(rows["load_p50"], [np.nan, 1.0])


def test_configuration():
    with pytest.raises(ConfigError, match=r"tracking.every must be at least 1, got 0"):
        section(TrackingConfig, {"every": 0}, "config.tracking")
