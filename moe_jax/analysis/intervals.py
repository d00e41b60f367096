"""Intervals and paired comparisons, small and exact where exactness is cheap.

Two sources of chance are kept apart. Over *text*: tokens of a document are correlated, so documents are resampled,
and the mean is the ratio of resampled sums (documents differ in length). Over *seeds*: few independent numbers, so
Student's t for the mean, and exact sign and sign-flip tests for pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

Comparison = Literal["better", "worse", "tie", "unknown"]
# 2^16 sign patterns of a pair test still take milliseconds; beyond, they are sampled.
_MAX_EXACT_PAIRS = 16


class Interval(NamedTuple):
    """An estimate and the ends of its interval; the ends are NaN where nothing supports one."""

    estimate: float
    low: float
    high: float


def document_mean(
    values: ArrayLike, document: ArrayLike, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Mean over tokens with a percentile interval that resamples documents.

    A paired difference is `document_mean(a - b, document)`.

    Args:
      values: `[T]` one number per token.
      document: `[T]` integers, the document of each token.
      level: level in (0, 1).
      num_resamples: bootstrap draws.
      seed: seed of the draws.

    Returns:
      The mean and its interval; all NaN without tokens, ends NaN with fewer than two documents.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return Interval(np.nan, np.nan, np.nan)
    _, index = np.unique(np.asarray(document), return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index).astype(np.float64)
    if len(sums) < 2:
        return Interval(float(values.mean()), np.nan, np.nan)
    weights = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), num_resamples)
    means = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean of independent values `[N]` (one per seed) with Student's t interval; ends NaN for N < 2."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else np.nan, np.nan, np.nan)
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def win_rate(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Share of pairs `[N]` in which ours is smaller (lower is better); a tie counts half; NaN without pairs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(((ours < theirs) + 0.5 * (ours == theirs)).mean()) if len(ours) else np.nan


def sign_test(differences: ArrayLike) -> float:
    """Exact two-sided p-value that positive and negative differences `[N]` are equally likely; zeros are left out."""
    signs = np.sign(np.asarray(differences, np.float64))
    num_pairs, num_positive = int((signs != 0).sum()), int((signs > 0).sum())
    fewer = min(num_positive, num_pairs - num_positive)
    return float(min(1.0, 2 * special.bdtr(fewer, num_pairs, 0.5))) if num_pairs else 1.0


def paired_permutation_test(differences: ArrayLike, *, num_draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference `[N]`, flipping the sign of each pair.

    Args:
      differences: `[N]` paired differences, symmetric around 0 under the null hypothesis.
      num_draws: sign patterns to draw when N > 16; all 2^N are enumerated up to there.
      seed: seed of the draws.

    Returns:
      Share of sign patterns with an absolute mean at least as large; never below 2^-(N-1), so five pairs cannot pass
      5 %.
    """
    differences = np.asarray(differences, np.float64)
    num_pairs = len(differences)
    if num_pairs <= _MAX_EXACT_PAIRS:
        patterns = (np.arange(2**num_pairs)[:, None] >> np.arange(num_pairs)) & 1
        sampled = 0
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, (num_draws, num_pairs))
        sampled = 1
    observed = abs(differences.sum())
    # Rounding must not separate patterns that tie with the observed one.
    reached = np.abs((2 * patterns - 1) @ differences) >= observed - 1e-12 * np.abs(differences).sum()
    return float((reached.sum() + sampled) / (len(patterns) + sampled))


def verdict(interval: Interval) -> Comparison:
    """Reads the interval of "ours minus theirs" where lower is better: a tie if it contains 0, unknown without one."""
    if not (np.isfinite(interval.low) and np.isfinite(interval.high)):
        return "unknown"
    if interval.high < 0:
        return "better"
    return "worse" if interval.low > 0 else "tie"
