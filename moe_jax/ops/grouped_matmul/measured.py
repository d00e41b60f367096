"""Which implementation a pass takes when the caller names none: the fastest one measured on this device.

`measured.json` lies beside this file. `python -m experiments.bench_grouped_matmul --table` measures a device and
replaces its rows; a row is a problem (device, dtype, N, E, D, F) and the name of the fastest implementation of each
pass. A problem that is not in the table takes the row nearest to it in shape. A device that is not in the table takes
its platform's default, with a warning.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.expansion import check_expansion
from moe_jax.ops.grouped_matmul import ragged
from moe_jax.ops.grouped_matmul.passes import PerPass

Row = dict[str, Any]
TABLE = Path(__file__).with_name("measured.json")
DEFAULTS = {"cpu": "blocked", "tpu": "ragged_dot"}
FALLBACK = "einsum"  # exact everywhere, no kernel of anybody's: the default of other platforms


class UnmeasuredWarning(UserWarning):
    """No measurement of this device and dtype is in the table."""


class Problem(NamedTuple):
    """What the choice depends on; the group sizes are not known when a program is compiled."""

    device: str
    dtype: str
    N: int
    E: int
    D: int
    F: int


def choose(problem: Problem, platform: str, table: Sequence[Row]) -> PerPass:
    """Chooses an implementation for each pass.

    `ragged_dot` is chosen only where the expansion guard, having compiled that pass alone, finds no dense product.

    Args:
      problem: device kind, dtype and sizes.
      platform: "cpu", "gpu" or "tpu".
      table: measured rows.

    Returns:
      A name for each pass.
    """
    passes = nearest(table, problem)
    if passes is None:
        default = DEFAULTS.get(platform, FALLBACK)
        _warn_unmeasured(problem.device, problem.dtype, default)
        passes = PerPass(default, default, default)
    return PerPass(
        *(
            FALLBACK if name == "ragged_dot" and not _is_native(index, problem) else name
            for index, name in enumerate(passes)
        )
    )


def nearest(table: Sequence[Row], problem: Problem) -> PerPass | None:
    """The measured row of the same device and dtype whose sizes differ by the smallest factors, or None.

    Args:
      table: measured rows.
      problem: what to look up.

    Returns:
      The row's name for each pass.
    """
    rows = [row for row in table if (row["device"], row["dtype"]) == (problem.device, problem.dtype)]
    if not rows:
        return None

    def distance(row: Row) -> float:
        return sum(abs(math.log2(row[axis] / getattr(problem, axis))) for axis in "NEDF")

    best = min(rows, key=distance)
    return PerPass(*(best[name] for name in PerPass._fields))


@functools.cache
def read_table() -> tuple[Row, ...]:
    """The rows of `measured.json`."""
    return tuple(json.loads(TABLE.read_text())["rows"])


@functools.cache
def _warn_unmeasured(device: str, dtype: str, default: str) -> None:
    """Warns once a process."""
    warnings.warn(
        f"grouped_matmul was never measured on {device!r} with {dtype}, so every pass takes the default {default!r}. "
        "Name another with impl=, or measure: python -m experiments.bench_grouped_matmul --table",
        UnmeasuredWarning,
        stacklevel=2,
    )


@functools.cache
def _is_native(index: int, problem: Problem) -> bool:
    """Whether `ragged_dot` compiles to about the ideal FLOPs in the pass of this index; warns of an expansion."""
    _, dtype, num_rows, num_experts, width, hidden = problem
    rows, output_grad = (jax.ShapeDtypeStruct((num_rows, size), dtype) for size in (width, hidden))
    weights = jax.ShapeDtypeStruct((num_experts, width, hidden), dtype)
    function, operands = (
        (ragged.forward, (rows, weights)),
        (ragged.rows_gradient, (output_grad, weights)),
        (ragged.weights_gradient, (rows, output_grad)),
    )[index]
    sizes = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    ideal = 2 * num_rows * width * hidden
    report = check_expansion(functools.partial(function, dtype=jnp.dtype(dtype)), *operands, sizes, ideal_flops=ideal)
    return report.verdict == "within"
