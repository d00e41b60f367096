"""Rotary position embedding (Su et al. 2104.09864), half-split layout as in Llama, and its stretchings to longer text.

A head's pair (i, i + R/2) turns by the angle `position * frequency_i`. The frequencies are

    plain      base^(-2i / R)
    linear     plain / factor                                        position interpolation, 2306.15595
    llama3     long wavelengths / factor, short ones plain, a ramp between         Llama 3.1, 2407.21783
    yarn       the same with a ramp over the pair's index, and a larger softmax temperature     2309.00071
    longrope   plain / a factor of its own for every pair                          LongRoPE, 2402.13753
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array


class Rotary(NamedTuple):
    """How a head turns: `frequencies [R/2]` of its first R coordinates, and a `magnitude` that both get besides."""

    frequencies: Array | np.ndarray
    magnitude: float = 1.0


def rotate(x: Array, positions: Array, rotary: Rotary | None = None) -> Array:
    """Rotates pairs (i, i + R/2) of the first R coordinates of every head; the others pass.

    Args:
      x: `[B, S, H, Dh]` queries or keys.
      positions: `[S]` or `[B, S]` int positions.
      rotary: the angles, R even and at most Dh; None turns the whole head by `plain(Dh)`.

    Returns:
      `[B, S, H, Dh]` in x's dtype; angles and rotation in float32.
    """
    frequencies, magnitude = plain(x.shape[-1]) if rotary is None else rotary
    if positions.ndim == 1:
        positions = positions[None]
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    if magnitude != 1:
        cos, sin = magnitude * cos, magnitude * sin
    width = 2 * frequencies.shape[0]
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def get_rotary(name: str, width: int, length: int, **settings: Any) -> Rotary:
    """The frequencies of that name.

    Args:
      name: a key of `ROTARIES`.
      width: R, even.
      length: tokens that the program handles at most, on which "longrope" depends.
      settings: of the function in `ROTARIES`, and `share`, the part of the head that turns, from its start.
    """
    turned = int(width * settings.pop("share", 1.0))
    return ROTARIES[name](turned, length, **settings)


def plain(width: int, length: int = 0, *, base: float = 10_000.0) -> Rotary:
    """The original; `base` spans the wavelengths' geometric series."""
    del length
    half = width // 2
    return Rotary(base ** (-jnp.arange(half, dtype=jnp.float32) / half))


def linear(width: int, length: int = 0, *, base: float = 10_000.0, factor: float = 1.0) -> Rotary:
    """Every position counts 1/factor."""
    del length
    return Rotary(_geometric(width, base) / np.float32(factor))


def llama3(
    width: int,
    length: int = 0,
    *,
    base: float = 500_000.0,
    factor: float = 8.0,
    low_factor: float = 1.0,
    high_factor: float = 4.0,
    original_length: int = 8192,
) -> Rotary:
    """Pairs that turn fewer than `low_factor` times within the original length slow down, fast ones stay."""
    del length
    frequencies = _geometric(width, base)
    turns = original_length * frequencies / (2 * np.pi)
    kept = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
    return Rotary((frequencies * (kept + (1 - kept) / factor)).astype(np.float32))


def yarn(
    width: int,
    length: int = 0,
    *,
    base: float = 10_000.0,
    factor: float = 1.0,
    original_length: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    magnitude: float = 0.0,
) -> Rotary:
    """YaRN, with the attention's temperature as a magnitude of queries and keys.

    Args:
      width: R.
      length: without effect.
      base: of the geometric series.
      factor: how much longer texts get.
      original_length: tokens of the original training.
      beta_fast: pairs that turn more often within the original length stay as they are.
      beta_slow: pairs that turn less often are slowed by `factor`.
      truncate: whether the ramp's ends are rounded to whole pairs.
      magnitude: of queries and keys; 0 for YaRN's `0.1 ln(factor) + 1`.
    """
    del length
    frequencies = _geometric(width, base)

    def pair_of(turns: float) -> float:  # the pair that turns so often within the original length
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slowed = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    frequencies = frequencies * (1 - slowed + slowed / factor)
    return Rotary(frequencies.astype(np.float32), magnitude or yarn_magnitude(factor))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's `0.1 weight ln(factor) + 1`, 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def longrope(
    width: int,
    length: int = 0,
    *,
    base: float = 10_000.0,
    short_factors: tuple[float, ...] = (),
    long_factors: tuple[float, ...] = (),
    original_length: int = 4096,
    short_magnitude: float = 1.0,
    long_magnitude: float = 1.0,
) -> Rotary:
    """A factor for every pair: one set for programs within the original length, one for longer ones."""
    is_long = length > original_length
    factors = np.array(long_factors if is_long else short_factors, np.float32)
    if len(factors) != width // 2:
        raise ValueError(f"longrope needs {width // 2} factors for {width} rotated coordinates, got {len(factors)}")
    return Rotary(_geometric(width, base) / factors, long_magnitude if is_long else short_magnitude)


def _geometric(width: int, base: float) -> np.ndarray:
    """`[R/2]` float32 plain frequencies, as a constant."""
    return (1 / np.float64(base) ** (np.arange(0, width, 2) / width)).astype(np.float32)


ROTARIES: dict[str, Callable[..., Rotary]] = {
    "plain": plain,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
