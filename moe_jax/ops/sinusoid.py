"""Sinusoidal positions in the layout of tensor2tensor: all sines, then all cosines.

    p(n) = [sin(n w_0), ..., sin(n w_{D/2-1}), cos(n w_0), ..., cos(n w_{D/2-1})],   w_i = 10000^(-i / (D/2 - 1))

Section 3.5 of Vaswani et al. (1706.03762) interleaves the two and divides by D/2; fairseq's models do as here.
"""

import math

import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array


def sinusoidal_positions(positions: Array, width: int) -> Array:
    """Embeds positions.

    Args:
      positions: `[...]` int.
      width: D, even and at least 4.

    Returns:
      `[..., D]` float32.
    """
    half = width // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000) / (half - 1))
    rounded_once = np.exp(exponents.astype(np.float64)).astype(np.float32)  # one step more is 6e-5 at position 1000
    frequencies = jnp.asarray(rounded_once).reshape((1,) * positions.ndim + (half,))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
