"""The space of a sweep and its points: drawn values, checks up front, grids, and an Optuna study across restarts."""

import dataclasses
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.sweep import SECTIONS
from moe_jax.runs import ConfigError, from_json, section, to_json
from moe_jax.training.sweeps import (
    StudyPoints,
    SweepConfig,
    apply,
    check_reference,
    choice,
    integers,
    list_points,
    log_integers,
    log_uniform,
    random_point,
    read_axes,
    space,
    uniform,
    variants,
)


def axes_of(**axes):
    return read_axes(space({name.replace("__", "."): axis for name, axis in axes.items()}), SECTIONS)


TWO = axes_of(optimizer__learning_rate=log_uniform(1e-4, 1e-2), model__num_experts=choice(4, 8, 16))


def test_a_space_survives_its_record_as_json():
    entries = space(
        {
            "optimizer.learning_rate": log_uniform(1e-4, 1e-2),
            "network": variants({"experts": {}, "dense": {"model.layers": ("dense", "dense")}}),
        }
    )
    recorded = from_json(to_json(ConfigDict({"space": entries}))).space
    assert read_axes(recorded, SECTIONS) == read_axes(entries, SECTIONS)


def test_an_axis_at_a_fraction_of_its_way():
    rate, experts = TWO
    # 1e-4 * 100^0.5 = 1e-3; the middle of three choices.
    assert math.isclose(rate.at(0.5), 1e-3)
    assert [experts.at(f) for f in (0.0, 0.34, 0.99)] == [4, 8, 16]
    (steps,) = axes_of(training__steps=integers(3, 5))
    # Pieces of the line: [2.5, 3.5) is 3, and so on, a third each.
    assert [steps.at(f) for f in (0.0, 0.3, 0.34, 0.66, 0.67, 0.999)] == [3, 3, 4, 4, 5, 5]
    (wide,) = axes_of(training__steps=log_integers(1, 64))
    assert {wide.at(f) for f in np.linspace(0, 0.999, 4000)} == set(range(1, 65))


def test_random_points_follow_their_distribution_and_their_number_alone():
    points = [random_point(TWO, 7, number) for number in range(600)]
    assert points[5] == random_point(TWO, 7, 5) != random_point(TWO, 8, 5)
    logs = np.log10([point.values["optimizer.learning_rate"] for point in points])
    assert logs.min() >= -4 and logs.max() <= -2
    # The mean of 600 uniform numbers of width 2 has a deviation of 2 / sqrt(12 * 600) = 0.024.
    assert abs(logs.mean() + 3) < 4 * 0.024
    counts = np.unique([point.values["model.num_experts"] for point in points], return_counts=True)[1]
    assert abs(counts - 200).max() < 4 * math.sqrt(600 * 2 / 9)


def test_a_grid_has_every_combination_with_the_last_axis_fastest():
    axes = axes_of(
        model__num_experts=choice(4, 8),
        network=variants({"experts": {}, "dense": {"model.layers": ("dense",), "model.dense_hidden": 7}}),
    )
    points = list_points(axes, SweepConfig(), seed=0)
    assert [point.values for point in points] == [
        {"model.num_experts": 4, "network": "experts"},
        {"model.num_experts": 4, "network": "dense"},
        {"model.num_experts": 8, "network": "experts"},
        {"model.num_experts": 8, "network": "dense"},
    ]
    assert points[3].settings == {"model.num_experts": 8, "model.layers": ("dense",), "model.dense_hidden": 7}
    config = apply(ConfigDict({"model": {"num_experts": 2}}), points[3].settings)
    assert config.model.to_dict() == {"num_experts": 8, "layers": ("dense",), "dense_hidden": 7}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "config.space is empty"),
        ({"optimizer.learning_rat": choice(0.1)}, "did you mean 'optimizer.learning_rate'"),
        ({"optimiser.learning_rate": choice(0.1)}, "did you mean 'optimizer.learning_rate'"),
        ({"model.num_experts": choice(4, 8.5)}, "model.num_experts expects an integer, got 8.5"),
        ({"model.num_experts": choice("four")}, "expects an integer, got 'four'"),
        ({"model.num_experts": uniform(1, 3)}, "takes integers"),
        ({"optimizer.learning_rate": integers(1, 3)}, "takes numbers"),
        ({"optimizer.learning_rate": log_uniform(0.0, 1.0)}, "lower end above 0"),
        ({"optimizer.learning_rate": uniform(2.0, 1.0)}, "the lower one first"),
        ({"optimizer.learning_rate": choice()}, "has no values"),
        ({"optimizer.learning_rate": choice(0.1, 0.1)}, "names 0.1 twice"),
        ({"optimizer.learning_rate": ("chioce", 1)}, "did you mean 'choice'"),
        ({"seed": choice(1, 2)}, "unknown key 'seed'"),
        ({"optimizer.name.x": choice(1)}, "has no keys of its own"),
        ({"optimizer.name": choice("adamw", "adam")}, "did you mean 'adamw'"),
        ({"a": variants({"x": {"model.width": 8}}), "model.width": choice(8)}, "sets model.width in two axes"),
    ],
)
def test_what_is_wrong_with_a_space_is_said_before_anything_is_trained(axes, message):
    with pytest.raises(ConfigError, match=r".*") as error:
        read_axes(space(axes), SECTIONS)
    assert message in str(error.value)


def test_keys_inside_of_settings_may_vary():
    (axis,) = axes_of(model__rule_settings__scale=choice(1.0, 2.5))
    assert axis.settings(2.5) == {"model.rule_settings.scale": 2.5}


def test_what_is_wrong_with_a_search():
    with pytest.raises(ConfigError, match="no end of its own"):
        section(SweepConfig, {"method": "tpe"}, "config.sweep")
    with pytest.raises(ConfigError, match="is a range, of which a grid has no points"):
        list_points(TWO, SweepConfig(), 0)
    with pytest.raises(ConfigError, match="the grid has 3"):
        list_points(TWO[1:], SweepConfig(points=4), 0)
    with pytest.raises(ConfigError, match=r"has no value 5; it has: \(4, 8, 16\)"):
        check_reference(("model.num_experts", 5), TWO)
    with pytest.raises(ConfigError, match=r"did you mean 'model\.num_experts'"):
        check_reference(("model.num_expert", 4), TWO)


def surface(point):
    """Lowest at a learning rate of 1e-3 and 8 experts."""
    return math.log10(point.values["optimizer.learning_rate"] / 1e-3) ** 2 + (point.values["model.num_experts"] != 8)


TPE = SweepConfig(method="tpe", points=16, seeds=1)


def search(path, stops=()):
    """The points of a study that is opened anew at each of the numbers in `stops`, with the point there not told."""
    while True:
        study, given = StudyPoints(TWO, TPE, 3, 2, path), []
        while (point := study.ask()) is not None:
            given.append(point)
            if len(given) - 1 in stops:
                stops = [number for number in stops if number != len(given) - 1]
                break
            study.tell(point, surface(point), False)
        else:
            return given


def test_a_study_that_is_opened_again_gives_the_points_of_one_that_never_closed(tmp_path):
    whole = search(tmp_path / "whole.db")
    assert len(whole) == 16 and [point.number for point in whole] == list(range(16))
    assert search(tmp_path / "broken.db", stops=[2, 11, 12]) == whole
    # It learns: the last points are better than the first, random ones.
    losses = [surface(point) for point in whole]
    assert np.mean(losses[10:]) < np.mean(losses[:10])


def test_successive_halving_stops_what_is_worse_than_the_best_third(tmp_path):
    config = SweepConfig(method="random", points=4, seeds=1, prune="asha", prune_after=1, prune_factor=3)
    study = StudyPoints(TWO, config, 0, 10, tmp_path / "study.db")
    points = [study.ask() for _ in range(4)]
    assert points == [random_point(TWO, 0, number) for number in range(4)]
    # Rung 0 is the first evaluation. Of 1, 2, 3 values the best third is the best one.
    assert [study.report(p, 10, loss) for p, loss in zip(points, (3.0, 2.0, 2.5, 4.0), strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    study.tell(points[2], 2.5, True)
    again = StudyPoints(TWO, dataclasses.replace(config), 0, 10, tmp_path / "study.db")
    assert [again.ask() for _ in range(5)] == [*points, None]
    assert not again.report(points[2], 10, 2.5)  # it has its end already
