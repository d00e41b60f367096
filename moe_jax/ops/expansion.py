"""Dense-expansion guard: does the compiled program multiply much more than the mathematics needs?

`jax.lax.ragged_dot` is the reason: XLA may turn it into a masked product over all experts, E times the FLOPs. Values
and gradients are right, so nothing but the bill shows it. Seen with JAX 0.10.2 and 0.11.2: on CPU in every pass;
compiled ahead of time for an H100, in every pass too; for a TPU v5e, in the weight gradient of 0.10.2 alone.

The guard compares the FLOPs that XLA counts in the compiled program with the ideal. Two things escape that count: the
body of a loop counts once, however often it runs (even if that number is known), and a library call (a kernel of cuDNN,
Pallas or Triton) may count as nothing. The count is then a lower bound. Above the tolerance it still proves an
expansion; below, it proves nothing, and the verdict is "unknown" rather than a pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

_LOOP = " while("  # as HLO text writes it
_ROUNDING = 0.99  # XLA counts a bare matmul as 2 N D F, give or take a per mille


class ExpansionWarning(UserWarning):
    """A compiled program needs many times the FLOPs of the mathematics it stands for."""


class ExpansionReport(NamedTuple):
    """What the guard found.

    Attributes:
      compiled_flops: FLOPs that XLA counts in the compiled program; NaN if it gives no count.
      ideal_flops: FLOPs the mathematics needs.
      ratio: the first over the second.
      verdict: "within" the tolerance, "expanded" beyond it, or "unknown": the count is a lower bound that proves
        nothing, because the program loops, or because it is below the ideal.
    """

    compiled_flops: float
    ideal_flops: float
    ratio: float
    verdict: Literal["within", "expanded", "unknown"]


def compiled_flops(function: Callable, *args: Any) -> float:
    """Counts the FLOPs of a compiled program, by XLA's own cost analysis.

    Args:
      function: a traceable function, jitted or not.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do, nothing is run.

    Returns:
      The count, elementwise operations included; loop bodies count once. NaN where the backend gives no count.
    """
    return _count_flops(_compile(function, *args))


def check_expansion(function: Callable, *args: Any, ideal_flops: float, tolerance: float = 2.0) -> ExpansionReport:
    """Compiles a function for the default device and warns if it multiplies much more than it should.

    Args:
      function: a traceable function, jitted or not.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do, nothing is run.
      ideal_flops: what the mathematics needs, for instance `2 * N * D * F` for a grouped matmul.
      tolerance: the largest ratio that passes.

    Returns:
      The report. Only the verdict "within" is a pass.

    Raises:
      ValueError: for an ideal that is not positive, or a tolerance below 1.
    """
    if not ideal_flops > 0 or not tolerance >= 1:
        raise ValueError(
            f"ideal_flops must be positive and tolerance at least 1, got ideal_flops={ideal_flops} and "
            f"tolerance={tolerance}"
        )
    compiled = _compile(function, *args)
    flops = _count_flops(compiled)
    ratio = flops / ideal_flops
    if ratio > tolerance:
        warnings.warn(
            f"dense expansion: the compiled program needs {flops:.3g} FLOPs, {ratio:.1f} times the ideal "
            f"{ideal_flops:.3g}. If it holds a ragged_dot, use another grouped matmul: "
            'grouped_matmul(..., impl="blocked") on CPU, impl="einsum" elsewhere.',
            ExpansionWarning,
            stacklevel=2,
        )
        return ExpansionReport(flops, ideal_flops, ratio, "expanded")
    is_whole = ratio >= _ROUNDING and _LOOP not in (
        compiled.as_text() or _LOOP
    )  # no count is NaN, which compares as False
    return ExpansionReport(flops, ideal_flops, ratio, "within" if is_whole else "unknown")


def _compile(function: Callable, *args: Any) -> jax.stages.Compiled:
    """Compiles for the default device."""
    return jax.jit(function).lower(*args).compile()


def _count_flops(compiled: jax.stages.Compiled) -> float:
    """XLA's count, NaN where it has none (some backends give no analysis, or a negative number)."""
    flops = (compiled.cost_analysis() or {}).get("flops", -1.0)
    return flops if flops >= 0 else math.nan
