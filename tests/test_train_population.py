"""A population in one program against each of its members alone: the same batches, losses, routing and results."""

import jax
import numpy as np
import pytest

from configs.sweeps import tiny
from experiments.sweep import SECTIONS
from experiments.sweep_trial import train_trial
from experiments.train_population import PopulationEngine
from moe_jax.runs import read_json, read_metrics, to_json
from moe_jax.runs.bars import progress_display
from moe_jax.training.sweeps import choice, list_points, make_trials, read_axes, read_outcome, space, variants
from moe_jax.training.sweeps.points import SweepConfig

AXES = read_axes(
    space(
        {
            "optimizer.learning_rate": choice(1e-3, 4e-3, 1e38),
            "rest": variants(
                {
                    "strong": {"optimizer.weight_decay": 0.5, "optimizer.b1": 0.8, "loss.balance": 0.3},
                    "weak": {"optimizer.clip_norm": 0.1, "optimizer.final_fraction": 0.5, "loss.z": 0.0},
                }
            ),
        }
    ),
    SECTIONS,
)


def trials_in(folder, names):
    """Six points with a seed each, so that on four devices two rows are added."""
    trials = []
    for point in list_points(AXES, SweepConfig(), 0):
        trials += make_trials(point, tiny.get_config().train, 2, folder)[point.number % 2 :][:1]
    return [trial for trial in trials if names is None or trial.name in names]


ALONE = ("0000-seed0", "0003-seed1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of the population's trials, and of two that were trained alone."""
    together, alone = tmp_path_factory.mktemp("together") / "trials", tmp_path_factory.mktemp("alone") / "trials"
    with progress_display() as display:
        engine = PopulationEngine(8, display)
        engine.start(trials_in(together, None), lambda trial: None)
        assert len(engine.wait()) == 6
        for trial in trials_in(alone, ALONE):
            train_trial(trial.folder, to_json(trial.config), lambda: None, display)
    return together, alone


def test_the_population_runs_on_every_device():
    assert len(jax.devices()) == 4


@pytest.mark.parametrize("name", ALONE)
def test_each_member_is_the_run_that_it_would_be_alone(folders, name):
    together, alone = (folder / name for folder in folders)
    for stage in ("train", "evaluate"):
        ours, theirs = read_metrics(together, stage), read_metrics(alone, stage)
        assert ours.keys() == theirs.keys()
        for metric, values in theirs.items():
            np.testing.assert_allclose(ours[metric], values, rtol=2e-4, atol=1e-6, err_msg=metric)
    ours, theirs = (read_json(folder / "results.json") for folder in (together, alone))
    assert ours["model"] == theirs["model"] and ours["data"] == theirs["data"]
    for split, bits in theirs["model_bits_per_byte"].items():
        for domain, value in bits.items():
            np.testing.assert_allclose(ours["model_bits_per_byte"][split][domain], value, rtol=2e-4)
    assert (together / "config.json").read_bytes() == (alone / "config.json").read_bytes()


def test_members_differ(folders):
    losses = [read_metrics(folders[0] / trial.name, "train")["loss"][-1] for trial in trials_in(folders[0], None)[:4]]
    assert len(set(losses)) == 4


def test_a_member_that_diverges_fails_alone(folders):
    outcomes = {trial.name: read_outcome(trial.folder) for trial in trials_in(folders[0], None)}
    assert [outcome.state for outcome in outcomes.values()] == ["finished"] * 4 + ["failed"] * 2
    assert (
        "nan at step" in outcomes["0004-seed0"].error
        and "lower optimizer.learning_rate" in outcomes["0004-seed0"].error
    )
