"""The sweep's command, in processes of its own: what it leaves, what it says, the notebook, and SIGKILL."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from configs.sweeps import experts, experts_quick, learning_rate
from experiments.sweep import SECTIONS
from experiments.train_population import check_population
from moe_jax.models.config import DecoderConfig
from moe_jax.models.twin import receipt
from moe_jax.runs import ConfigError, list_runs, read_json, read_metrics, section
from moe_jax.training.sweeps import SweepConfig, apply, check_config, check_reference, list_points, read_axes

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "02_training.ipynb"
TINY = "--config=configs/sweeps/tiny.py"


def environment(**changes):
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "COLUMNS": "200"} | cache | changes


def command(*arguments):
    return [sys.executable, "-m", "experiments.sweep", *map(str, arguments)]


def sweep(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT, env=environment())


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder and output of a tiny sweep, as two compiled populations."""
    path = tmp_path_factory.mktemp("runs") / "sweep" / "tiny"
    done = sweep(TINY, "--engine=vmap", "--workdir", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_the_folder_has_every_promised_file(job):
    folder, printed = job
    assert read_json(folder / "status.json")["status"] == "finished"
    summary = read_json(folder / "sweep.json")
    assert [point["state"] for point in summary["points"]] == ["finished"] * 4
    assert all(point["seeds"] == [0, 1] and point["interval"] for point in summary["points"])
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert len(table) == 8
    for row in table:
        evaluated = read_metrics(folder / "trials" / row["folder"], "evaluate")
        np.testing.assert_allclose(evaluated["bits_per_byte"][-1], row["selection_bits_per_byte"], rtol=1e-6)
    best = min(summary["points"], key=lambda point: point["mean"])
    assert summary["chosen"]["number"] == best["number"]
    assert (folder / "pictures" / "surface.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "chosen:" in printed and "trials.parquet" in printed
    (listed,) = list_runs(folder.parent.parent)
    assert listed.path == folder and "test bits/byte" in listed.headline


def test_what_is_wrong_is_one_line_and_exit_code_2_before_anything_is_made(tmp_path):
    done = sweep(TINY, "--engine=vmap", "--config.sweep.prune=asha", "--workdir", tmp_path / "run")
    assert done.returncode == 2 and "trains all points together" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_population_refuses_what_its_members_would_not_have():
    config = learning_rate.get_config().train
    check_population(config)
    config.data.packing = "pack"
    config.mesh = ConfigDict({"data": 2})
    with pytest.raises(ConfigError, match=r"does not train with data.packing='pack', mesh.data=2; take another engine"):
        check_population(config)


def test_a_point_whose_settings_disagree_is_refused_up_front():
    config = learning_rate.get_config()
    axes = read_axes((("model.num_heads", "choice", 2, 3),), SECTIONS)
    point = list_points(axes, SweepConfig(), 0)[1]
    with pytest.raises(ValueError, match=r"point \{'model.num_heads': 3\}: config.model: .*num_heads=3"):
        check_config(apply(config.train, point.settings), SECTIONS, f"point {point.values}")


@pytest.mark.parametrize("module", [experts, experts_quick, learning_rate])
def test_every_configuration_is_valid(module):
    config = module.get_config()
    axes = read_axes(config.space, SECTIONS)
    chosen = section(SweepConfig, config.sweep, "config.sweep")
    check_reference(chosen.reference, axes)
    for point in list_points(axes, chosen, 0):
        check_config(apply(config.train, point.settings), SECTIONS, str(point.values))


def test_experts_and_their_twins_cost_the_same():
    config = experts.get_config()
    axes = read_axes(config.space, SECTIONS)
    models = {}
    for point in list_points(axes, SweepConfig(), 0):
        trained = apply(config.train, point.settings)
        models[tuple(point.values.values())] = section(DecoderConfig, trained.model, "config.model")
    assert len(models) == 8
    for size in ("4", "8", "16", "32"):
        moe, twin = models[size, "experts"], models[size, "dense twin"]
        assert set(moe.layers) == {"moe"} and set(twin.layers) == {"dense"} and moe.num_experts == int(size)
        flops = receipt(moe, twin, config.train.data.sequence_length).flops
        assert abs(flops.ratio - 1) < 0.003


def execute(**changes):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(
        env=environment(**changes)
    )
    return notebook


def test_the_notebook_runs_top_to_bottom(job):
    notebook = execute(MOE_JAX_SWEEP=str(job[0]))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    shown = " ".join(output["data"].get("text/markdown", "") for output in outputs if "data" in output)
    assert f"**{read_json(job[0] / 'sweep.json')['chosen']['test']['mean']:.3f} (" in shown
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_the_notebook_says_what_to_do_without_a_sweep(tmp_path):
    with pytest.raises(CellExecutionError, match=r"make one with `python -m experiments[.]sweep`"):
        execute(MOE_JAX_SWEEP=str(tmp_path))


def test_the_committed_notebook_holds_no_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


ASHA = ("--config.sweep.method=tpe", "--config.sweep.points=5", "--config.sweep.prune=asha", "--config.sweep.seeds=1")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [ASHA, ("--engine=vmap",)], ids=["tpe with asha, here", "vmap"])
def test_killed_three_times_a_sweep_ends_as_one_that_was_not(tmp_path, arguments):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert sweep(TINY, *arguments, "--workdir", whole).returncode == 0
    chance = random.Random(0)
    for _ in range(3):
        before = len(list(broken.glob("trials/*/metrics/evaluate/*")))
        process = subprocess.Popen(command(TINY, *arguments, "--workdir", broken), cwd=ROOT, env=environment())
        while len(list(broken.glob("trials/*/metrics/evaluate/*"))) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sweep(TINY, *arguments, "--workdir", broken).returncode == 0
    assert read_json(broken / "sweep.json") == read_json(whole / "sweep.json")
    for trial in (path.name for path in (whole / "trials").iterdir()):
        ours, theirs = (read_metrics(folder / "trials" / trial, "train") for folder in (broken, whole))
        for name, column in theirs.items():
            np.testing.assert_array_equal(ours[name], column, err_msg=f"{trial} {name}")
