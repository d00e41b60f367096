"""Trains a model at many points of a space of settings, several seeds each, and chooses one on held-out text.

Every point with every seed is a run of `experiments.train` in a folder of its own. Killed anywhere, the same command
finishes what is missing; a trial that fails is recorded and does not stop the others (delete its folder to try again).

Engines: `here` one trial after the other in this process; `ray` on a Ray cluster; `slurm` as SLURM jobs; `vmap` trials
that differ in numbers only as one compiled program. All but `here` read `--config.launch.…`.

Examples:
  python -m experiments.sweep
  python -m experiments.sweep --config=configs/sweeps/experts.py
  python -m experiments.sweep --config.sweep.method=tpe --config.sweep.points=30 --config.sweep.prune=asha
  python -m experiments.sweep --engine=ray --config.launch.ray_address=auto --config.launch.workers=16
  python -m experiments.sweep --engine=slurm --config.launch.slurm_partition=gpu --config.launch.gpus=1
  python -m experiments.sweep --engine=vmap --config.launch.workers=8
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.sweep_trial import run_trial, train_trial
from experiments.train_population import PopulationEngine, check_population
from moe_jax.data import DataConfig
from moe_jax.models.config import DecoderConfig
from moe_jax.report.pictures import plot_sweep
from moe_jax.runs import Command, ConfigError, RunFolder, run_script, section, write_json
from moe_jax.runs.bars import bar, progress_display
from moe_jax.training.loop import TrainingConfig
from moe_jax.training.mesh import MeshConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.population import use_all_cores
from moe_jax.training.step import LossConfig
from moe_jax.training.sweeps import (
    Axis,
    Ended,
    Engine,
    HereEngine,
    LaunchConfig,
    RayEngine,
    Schedule,
    SlurmEngine,
    SweepConfig,
    apply,
    check_config,
    check_reference,
    example_points,
    interval_of,
    make_trials,
    open_points,
    read_axes,
    summarise,
    write_table,
)
from moe_jax.training.tracking import TrackingConfig

ENGINES = ("here", "ray", "slurm", "vmap")
# What each section of the swept configuration becomes, so that a wrong value is refused before anything is trained.
SECTIONS = {
    "data": DataConfig,
    "model": DecoderConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "mesh": MeshConfig,
    "tracking": TrackingConfig,
}


def make_engine(name: str, launch: LaunchConfig, folder: Path, display: Progress) -> Engine:
    """The engine of that name."""
    if name == "ray":
        return RayEngine(run_trial, launch)
    if name == "slurm":
        return SlurmEngine(run_trial, launch, folder / "jobs")
    if name == "vmap":
        return PopulationEngine(launch.workers, display)
    return HereEngine(lambda folder, config, watch: train_trial(folder, config, watch, display))


def check_sweep(config: ConfigDict, engine_name: str) -> tuple[SweepConfig, list[Axis], int]:
    """Reads a sweep, and refuses what is wrong with it before there is a folder.

    Returns:
      How the space is searched, the space, and the number of trials if none is stopped early.

    Raises:
      ConfigError: also for a point whose configuration does not fit together.
    """
    sweep = section(SweepConfig, config.sweep, "config.sweep")
    if engine_name == "vmap" and (sweep.method == "tpe" or sweep.prune != "none"):
        raise ConfigError(
            f"engine 'vmap' trains all points together, so method={sweep.method!r} with prune={sweep.prune!r} has "
            "nothing to learn from; take method 'grid' or 'random' with prune 'none', or another engine"
        )
    axes = read_axes(config.space, SECTIONS)
    check_reference(sweep.reference, axes)
    points = example_points(axes, sweep, config.seed)
    for point in points:
        settings = apply(config.train, point.settings)
        check_config(settings, SECTIONS, f"point {point.values}")
        if engine_name == "vmap":
            check_population(settings)
    return sweep, axes, (sweep.points or len(points)) * sweep.seeds


def run_sweep(
    run: RunFolder, sweep: SweepConfig, axes: list[Axis], num_trials: int, engine_name: str, launch: LaunchConfig
) -> dict[str, Any]:
    """Trains whatever is missing.

    Args:
      run: the sweep's folder.
      sweep: how the space is searched.
      axes: the space.
      num_trials: for the bar.
      engine_name: one of `ENGINES`.
      launch: settings of the engine.

    Returns:
      What `sweep.json` holds.
    """
    config = run.config
    every = config.train.training.checkpoint_every
    points = open_points(axes, sweep, config.seed, every, run.path / "study.db")
    ended: list[Ended] = []

    def record(is_complete: bool) -> dict[str, Any]:
        write_table(run.path / "trials.parquet", axes, ended)
        summary = {"title": "A sweep", "method": sweep.method} | summarise(axes, ended, sweep, is_complete=is_complete)
        write_json(run.path / "sweep.json", summary)
        return summary

    with progress_display() as display, bar(display, "trials", num_trials) as progress:

        def on_end(one: Ended) -> None:
            ended.append(one)
            record(is_complete=False)
            run.report_progress("trials", len(ended))
            progress.show(len(ended), f"{one.trial.name} {one.outcome.state}")

        engine = make_engine(engine_name, launch, run.path, display)
        try:
            Schedule(
                points,
                lambda point: make_trials(point, config.train, sweep.seeds, run.path / "trials"),
                engine,
                is_pruned=sweep.prune != "none",
                retries=launch.retries,
                on_end=on_end,
            ).run()
        finally:
            engine.close()
    return record(is_complete=True)


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """Every point, best first, and the chosen one."""
    table = Table(title="Selection split, bits per byte, mean over seeds [95 %]", title_justify="left", box=SIMPLE)
    for axis in summary["axes"]:
        table.add_column(axis["name"])
    against = {comparison["point"]: _show(comparison, "+") for comparison in summary["comparisons"]}
    for column in ("bits/byte", *(["against the reference"] if against else []), "seeds", "state"):
        table.add_column(column, justify="right")
    for row in sorted(summary["points"], key=lambda row: (row["mean"] is None, row["mean"])):
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row["values"].values()]
        difference = [against.get(row["number"], "")] if against else []
        table.add_row(*values, _show(row), *difference, str(len(row["seeds"])), row["state"])
    console.print(table)
    for error in [error for row in summary["points"] for error in row["errors"]]:
        console.print(error, soft_wrap=True, markup=False)
    if chosen := summary["chosen"]:
        console.print(f"chosen: {chosen['values']}, test split {_show(chosen['test'])}", soft_wrap=True, markup=False)


def _show(row: dict[str, Any], sign: str = "") -> str:
    """A mean with its interval."""
    mean, low, high = interval_of(row)
    if row["mean"] is None:
        return ""
    return f"{mean:{sign}.3f}" + ("" if row["interval"] is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def main(command: Command) -> None:
    """Runs, or continues, the sweep in its folder."""
    if command.choices["engine"] == "vmap":
        use_all_cores()
    console = Console()
    console.width = max(console.width, 120)  # the table is cut otherwise
    launch = section(LaunchConfig, command.config.get("launch", {}), "config.launch")
    checked = check_sweep(command.config, command.choices["engine"])
    config = ConfigDict({key: value for key, value in command.config.items() if key != "launch"})
    with RunFolder(command.workdir, config, must_exist=command.resume) as run:
        summary = run_sweep(run, *checked, command.choices["engine"], launch)
        chosen = summary["chosen"]
        run.write_results(
            {
                "title": "A sweep",
                "headline": {"test bits/byte": chosen["test"]["mean"]} if chosen else {"chosen": "none"},
            }
        )
        run.finish()
        print_table(console, summary)
        console.print(f"table: {run.path / 'trials.parquet'}", soft_wrap=True)
        if chosen:
            picture = run.subfolder("pictures") / "surface.png"
            plot_sweep(summary).savefig(picture, dpi=160, facecolor="white")
            console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/sweeps/learning_rate.py", choices={"engine": ENGINES}))
