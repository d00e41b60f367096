"""Timing on machines that are never quite idle: interleaved repeats, medians, and ratios of neighbours in time.

What disturbs one function then disturbs its baseline a few milliseconds later too, so the ratio of the two is steadier
than either. A ratio is the median over repeats of (this function / baseline of the same repeat).
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

Call = Callable[[], Any]


def measure_interleaved(calls: dict[str, Call], repeats: int) -> dict[str, np.ndarray]:
    """Times several calls in turn, over and over, after one untimed call of each.

    Args:
      calls: functions without arguments that return when their work is done.
      repeats: timed rounds.

    Returns:
      Milliseconds `[repeats]` of each call.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in samples.items()}


def summarize(samples: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Reduces paired samples to the figures of a benchmark row.

    Args:
      samples: milliseconds `[repeats]`.
      baseline: milliseconds `[repeats]` of the baseline in the same rounds.

    Returns:
      `ms` and `baseline_ms` (medians), `ratio` (median of paired ratios), and the interquartile ranges `ms_iqr` and
      `ratio_iqr`.
    """
    ratios = samples / baseline
    return {
        "ms": float(np.median(samples)),
        "ms_iqr": _interquartile_range(samples),
        "baseline_ms": float(np.median(baseline)),
        "ratio": float(np.median(ratios)),
        "ratio_iqr": _interquartile_range(ratios),
    }


def _interquartile_range(values: np.ndarray) -> float:
    """Distance between the quartiles."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def compile_cold_and_warm(function: Callable, *arguments: Any) -> tuple[Call, dict[str, float]]:
    """Compiles with an empty persistent cache and once more with what that left there, as a second start would.

    Args:
      function: a traceable function.
      *arguments: its arguments, which the returned call uses too.

    Returns:
      A call that runs the program to its end, and `compile_cold_s`, `compile_warm_s` (tracing included), `first_run_ms`
      and `temp_mib` (peak memory for intermediate results, from the compiler).
    """
    seconds = []
    with empty_compilation_cache() as forget_programs:
        for _ in range(2):
            forget_programs()
            start = time.perf_counter()
            compiled = jax.jit(function).lower(*arguments).compile()
            seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    figures = {
        "compile_cold_s": seconds[0],
        "compile_warm_s": seconds[1],
        "first_run_ms": 1e3 * (time.perf_counter() - start),
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    return lambda: jax.block_until_ready(compiled(*arguments)), figures


@contextlib.contextmanager
def empty_compilation_cache() -> Iterator[Callable[[], None]]:
    """A persistent cache of its own, empty at first; gives a function that forgets what the process has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            yield _forget_programs
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _forget_programs() -> None:
    """What a new process would not know either."""
    jax.clear_caches()
    compilation_cache.reset_cache()


def peak_mib(call: Callable[[], Any]) -> float:
    """How far a call lifts the process above the memory that it holds before; on Linux with glibc, elsewhere NaN."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, or the call would find it at hand
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    except OSError:
        return float("nan")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    call()
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024
