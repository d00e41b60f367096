"""Trials that take no training: a run folder with a loss that is a formula, for tests of what runs trials.

As a program it runs a sweep of them: `python -m tests.sweep_work FOLDER`.
"""

import json
import math
import os
import pathlib
import sys
import time

from ml_collections import ConfigDict

from moe_jax.runs import MetricsWriter, RunFolder, from_json, read_json, write_json
from moe_jax.training.loop import TrainingConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.sweeps import (
    HereEngine,
    Schedule,
    SweepConfig,
    TrialStopped,
    choice,
    is_to_stop,
    log_uniform,
    make_trials,
    open_points,
    read_axes,
    space,
    summarise,
    write_table,
)

SECTIONS = {"optimizer": OptimizerConfig, "training": TrainingConfig}
CONFIG = ConfigDict({"seed": 0, "pause": 0.0, "optimizer": {"learning_rate": 1e-3}, "training": {"steps": 4}})
GRID = read_axes(space({"optimizer.learning_rate": choice(1e-4, 1e-3, 1.0)}), SECTIONS)
RANGE = read_axes(space({"optimizer.learning_rate": log_uniform(1e-5, 1e-1)}), SECTIONS)


def loss_at(config, step):
    """Lowest at 1e-3; a later seed is worse by 0.01, an earlier step by 1 / step."""
    return math.log10(config.optimizer.learning_rate / 1e-3) ** 2 + 0.01 * config.seed + 1 / step


def work(folder, config, watch):
    """A trial: a checkpoint and an evaluation at every step; a learning rate of 1 fails at the second."""
    config = from_json(config)
    try:
        with RunFolder(folder, config) as run:
            if run.is_finished:
                return
            try:
                _steps(run, config, watch)
                bits = {"selection": {"all": loss_at(config, 4)}, "test": {"all": loss_at(config, 4) + 0.5}}
                run.write_results({"model_bits_per_byte": bits})
            except TrialStopped:
                run.write_results({})
            run.finish()
    except Exception:
        return


def _steps(run, config, watch):
    checkpoint = run.path / "checkpoint.json"
    start = read_json(checkpoint)["step"] if checkpoint.is_file() else 0
    with (run.path / "starts.jsonl").open("a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), "start": start}) + "\n")
    evaluation = MetricsWriter(run.path, "evaluate")
    evaluation.truncate_after(start)
    for step in range(start + 1, config.training.steps + 1):
        time.sleep(config.pause)
        if config.optimizer.learning_rate == 1.0 and step == 2:
            raise FloatingPointError("the loss is NaN")
        evaluation.append(step, {"bits_per_byte": loss_at(config, step)})
        evaluation.flush()
        watch()
        if is_to_stop(run.path):
            raise TrialStopped
        write_json(checkpoint, {"step": step})


def starts_of(folder):
    """Where each process began that worked on a trial."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def run_sweep(folder, engine, axes, sweep, config=CONFIG, retries=2):
    """A sweep of these trials: its summary."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    points = open_points(axes, sweep, 0, 1, folder / "study.db")
    ended = []
    try:
        Schedule(
            points,
            lambda point: make_trials(point, config, sweep.seeds, folder / "trials"),
            engine,
            is_pruned=sweep.prune != "none",
            retries=retries,
            on_end=ended.append,
        ).run()
    finally:
        engine.close()
    write_table(folder / "trials.parquet", axes, ended)
    summary = summarise(axes, ended, sweep, is_complete=True)
    write_json(folder / "sweep.json", summary)
    return summary


TPE = SweepConfig(method="tpe", points=14, seeds=1, prune="asha")

if __name__ == "__main__":
    CONFIG.pause = 0.02
    run_sweep(sys.argv[1], HereEngine(work), RANGE, TPE, CONFIG)
