"""What a sweep found: one row a trial, one a point with an interval over seeds, and the chosen point.

Points are compared by their loss on the selection split. The test split is read for the chosen point alone, once, so
its loss is not the best of many.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.analysis import Interval, t_interval
from moe_jax.runs import ConfigError, write_atomic
from moe_jax.runs.sections import nearest_known
from moe_jax.training.sweeps.points import SweepConfig
from moe_jax.training.sweeps.schedule import Ended
from moe_jax.training.sweeps.space import Axis
from moe_jax.training.sweeps.trials import read_loss


def check_reference(reference: Sequence[Any], axes: Sequence[Axis]) -> None:
    """Refuses a reference that is not an axis and one of its values.

    Raises:
      ConfigError: naming what there is.
    """
    if not reference:
        return
    name, value = reference
    by_name = {axis.name: axis for axis in axes}
    if name not in by_name:
        raise ConfigError(f"config.sweep.reference names axis {name!r}{nearest_known(str(name), by_name)}")
    values = by_name[name].values
    if values is None or value not in values:
        raise ConfigError(f"config.sweep.reference: {name} has no value {value!r}; it has: {values or 'a range'}")


def summarise(
    axes: Sequence[Axis], ended: Sequence[Ended], config: SweepConfig, *, is_complete: bool
) -> dict[str, Any]:
    """Puts a sweep's trials together.

    Args:
      axes: the space.
      ended: every trial that has come to its end so far.
      config: `seeds` and `reference` are read.
      is_complete: whether nothing is left to train, so that a point may be chosen.

    Returns:
      JSON-able: `axes`, `points` in order, `chosen` (None before the end, or if no point has all its seeds) with its
      `test` loss, and `comparisons` with the reference. Losses are bits per byte, intervals 95 % by Student's t over
      seeds.
    """
    points: dict[int, dict[str, Any]] = {}
    for one in sorted(ended, key=lambda one: (one.trial.point.number, one.trial.seed)):
        point = one.trial.point
        row = points.setdefault(
            point.number,
            {
                "number": point.number,
                "values": point.values,
                "state": "finished",
                "seeds": [],
                "loss": [],
                "errors": [],
            },
        )
        if one.outcome.state == "finished":
            row["seeds"].append(one.trial.seed)
            row["loss"].append(one.outcome.loss)
        else:
            row["state"] = one.outcome.state
            if one.outcome.state == "stopped":
                row["stopped_at"] = one.outcome.step
            if one.outcome.error:
                row["errors"].append(f"{one.trial.name}: {one.outcome.error}")
    rows = [points[number] for number in sorted(points)]
    for row in rows:
        row |= _interval(row["loss"])
        if row["state"] == "finished" and len(row["seeds"]) < config.seeds:
            row["state"] = "unfinished"
    return {
        "axes": [{"name": axis.name, "is_numeric": axis.is_numeric, "is_log": axis.is_log} for axis in axes],
        "points": rows,
        "chosen": _choose(rows, ended) if is_complete else None,
        "comparisons": _compare(rows, *config.reference) if config.reference else [],
    }


def write_table(path: Path, axes: Sequence[Axis], ended: Sequence[Ended]) -> None:
    """Writes one row a trial as Parquet: point, seed, a column for each axis, state, loss, step, error, folder."""
    ordered = sorted(ended, key=lambda one: (one.trial.point.number, one.trial.seed))
    columns: dict[str, list[Any]] = {
        "point": [one.trial.point.number for one in ordered],
        "seed": [one.trial.seed for one in ordered],
    }
    for axis in axes:
        values = [one.trial.point.values[axis.name] for one in ordered]
        is_plain = len({type(value) for value in values}) == 1 and isinstance(values[0], int | float | str)
        columns[axis.name] = values if is_plain else [json.dumps(value) for value in values]
    columns |= {
        "state": [one.outcome.state for one in ordered],
        "selection_bits_per_byte": [one.outcome.loss for one in ordered],
        "last_evaluated_step": [one.outcome.step for one in ordered],
        "error": [one.outcome.error for one in ordered],
        "folder": [one.trial.name for one in ordered],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    write_atomic(path, sink.getvalue())


def _interval(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Mean and ends, None where there is none: JSON has no NaN."""
    estimate, *ends = t_interval(values)
    return {
        "mean": None if math.isnan(estimate) else estimate,
        "interval": None if math.isnan(ends[0]) else [float(end) for end in ends],
    }


def _choose(rows: Sequence[dict[str, Any]], ended: Sequence[Ended]) -> dict[str, Any] | None:
    """The point with the lowest mean loss of those that have all their seeds, and its loss on the test split."""
    complete = [row for row in rows if row["state"] == "finished"]
    if not complete:
        return None
    best = min(complete, key=lambda row: row["mean"])
    trials = [one.trial for one in ended if one.trial.point.number == best["number"]]
    test = [read_loss(trial.folder, "test") for trial in sorted(trials, key=lambda trial: trial.seed)]
    return {key: best[key] for key in ("number", "values", "mean", "interval")} | {
        "test": {"loss": test} | _interval(test)
    }


def _compare(rows: Sequence[dict[str, Any]], name: str, value: Any) -> list[dict[str, Any]]:
    """Each point less the one that differs from it in that axis only and has that value, seed by seed."""
    comparisons = []
    for row in rows:
        others = {axis: v for axis, v in row["values"].items() if axis != name}
        twin = next((r for r in rows if r["values"] == others | {name: value} and r["values"] != row["values"]), None)
        if twin is None:
            continue
        shared = sorted(set(row["seeds"]) & set(twin["seeds"]))
        losses = [dict(zip(r["seeds"], r["loss"], strict=True)) for r in (row, twin)]
        difference = np.array([losses[0][seed] - losses[1][seed] for seed in shared])
        comparisons.append({"point": row["number"], "reference": twin["number"]} | _interval(difference.tolist()))
    return comparisons


def interval_of(row: dict[str, Any]) -> Interval:
    """Mean and interval of a point, or of a comparison, as numbers; NaN where there is none."""
    low, high = row["interval"] or (math.nan, math.nan)
    return Interval(math.nan if row["mean"] is None else row["mean"], low, high)
