"""Rotary position embedding (Su et al. 2104.09864), half-split layout as in Llama."""

import jax.numpy as jnp

from moe_jax.types import Array


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotates pairs (i, i + Dh/2) of every head by `position * base**(-2i/Dh)`.

    Args:
      x: `[B, S, H, Dh]` queries or keys, Dh even.
      positions: `[S]` int positions.
      base: the wavelengths' geometric base.

    Returns:
      `[B, S, H, Dh]` in x's dtype; angles and rotation in float32.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
