"""Normalisation."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def rms_norm(x: Array, scale: Array, epsilon: float = 1e-6) -> Array:
    """`x / rms(x) * scale` over the last axis (Zhang & Sennrich 1910.07467), computed in float32.

    Args:
      x: `[..., D]`.
      scale: `[D]`.
      epsilon: added to the mean square.

    Returns:
      `[..., D]` in x's dtype.
    """
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (wide * inverse_rms * scale.astype(jnp.float32).reshape(shape)).astype(x.dtype)


def l2_normalize(x: Array, axis: int = -1) -> Array:
    """`x / |x|` along an axis, float32 whatever comes in.

    Vectors shorter than 1e-12 are returned as they are: they have no direction, and so their gradient stays finite.
    """
    wide = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(wide), axis=axis, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1.0))


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    """`(x - mean) / deviation * scale + bias` over the last axis (Ba et al. 1607.06450), computed in float32.

    Args:
      x: `[..., D]`.
      scale: `[D]`.
      bias: `[D]`.
      epsilon: added to the variance.

    Returns:
      `[..., D]` in x's dtype.
    """
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + scale.shape
    scale, bias = (vector.astype(jnp.float32).reshape(shape) for vector in (scale, bias))
    return (centred * inverse * scale + bias).astype(x.dtype)
