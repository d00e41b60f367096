"""The training script over a mesh, from the config to the report, and a stage that goes on where it stopped."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.progress import Progress

from experiments.train import main
from moe_jax.runs import RunFolder, run_script
from moe_jax.training.stage import train_stage
from tests.test_mesh_training import batch, setup

SMALL = {
    "data.domains": "",
    "data.domain_weights": "",
    "data.sequence_length": 32,
    "model.width": 32,
    "model.layers": "moe",
    "model.num_experts": 4,
    "model.expert_hidden": 16,
    "training.steps": 4,
    "training.checkpoint_every": 4,
}


def run(folder, **changes):
    """The exit code of the script on 20 documents of numbers, and its results."""
    texts = folder.parent / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(20):
        (texts / f"{number}.txt").write_text(" ".join(map(str, range(number, number + 150))))
    values = SMALL | {"data.folders": f"numbers={texts}"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    arguments = [f"--workdir={folder}", *(f"--config.{key}={value}" for key, value in values.items())]
    code = run_script(main, "configs/train_mesh.py", arguments)
    return code, json.loads((folder / "results.json").read_text()) if code == 0 else None


def test_the_script_over_a_mesh_measures_what_one_device_does(tmp_path):
    _, one = run(tmp_path / "one", mesh__data=1, mesh__expert=1)
    code, mesh = run(tmp_path / "mesh")
    assert code == 0 and one.keys() == mesh.keys()
    ours, theirs = (np.hstack(list(result["model_bits_per_byte"]["test"].values())) for result in (mesh, one))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_script_refuses_what_does_not_divide(tmp_path, capsys):
    code, _ = run(tmp_path, mesh__data=3, mesh__expert=1)
    assert code == 2
    assert "data.batch_size=8 does not divide over mesh.data=3" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(1, 2, 2)], ids=str)
def test_a_stage_over_a_mesh_goes_on_bit_for_bit(tmp_path, sizes):
    def train_until(folder, steps):
        mesh, initial, step = setup(sizes)
        with RunFolder(folder, ConfigDict({"seed": 0})) as run:
            return train_stage(
                run,
                Progress(disable=True),
                "train",
                initial,
                step,
                lambda start: map(batch, range(start, steps)),
                steps=steps,
                checkpoint_every=2,
                note=lambda values: "",
                mesh=mesh,
            )

    train_until(tmp_path / "interrupted", 2)
    resumed, whole = train_until(tmp_path / "interrupted", 4), train_until(tmp_path / "whole", 4)
    assert int(whole.step) == 4
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, resumed) == jax.tree.map(lambda leaf: leaf.sharding, whole)
