"""Sweeps: many trainings over a space of settings, with seeds, on any engine.

space.py     which keys vary, and over which values
points.py    a grid or random points; study.py: points and early stops by Optuna
trials.py    a point with a seed is a run folder
engines/     here, on Ray, under SLURM
schedule.py  what runs next
summary.py   intervals over seeds, and the chosen point
"""

from moe_jax.training.sweeps.engines import Engine, HereEngine, LaunchConfig, RayEngine, SlurmEngine
from moe_jax.training.sweeps.points import ListedPoints, Point, Points, SweepConfig, list_points, random_point
from moe_jax.training.sweeps.schedule import Ended, Schedule
from moe_jax.training.sweeps.space import (
    Axis,
    apply,
    check_config,
    choice,
    integers,
    log_integers,
    log_uniform,
    read_axes,
    space,
    uniform,
    variants,
)
from moe_jax.training.sweeps.study import StudyPoints, example_points, open_points
from moe_jax.training.sweeps.summary import check_reference, interval_of, summarise, write_table
from moe_jax.training.sweeps.trials import Outcome, Trial, TrialStopped, is_to_stop, make_trials, read_outcome

__all__ = [
    "Axis",
    "Ended",
    "Engine",
    "HereEngine",
    "LaunchConfig",
    "ListedPoints",
    "Outcome",
    "Point",
    "Points",
    "RayEngine",
    "Schedule",
    "SlurmEngine",
    "StudyPoints",
    "SweepConfig",
    "Trial",
    "TrialStopped",
    "apply",
    "check_config",
    "check_reference",
    "choice",
    "example_points",
    "integers",
    "interval_of",
    "is_to_stop",
    "list_points",
    "log_integers",
    "log_uniform",
    "make_trials",
    "open_points",
    "random_point",
    "read_axes",
    "read_outcome",
    "space",
    "summarise",
    "uniform",
    "variants",
    "write_table",
]
