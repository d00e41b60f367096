"""Normalisation layers; the maths is in `ops.norms`."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.ops.norms import layer_norm, rms_norm
from moe_jax.types import Array


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned `scale [D]`, from 1."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        """Starts at scale 1; `epsilon` is added to the mean square."""
        self.scale, self.epsilon = nnx.Param(jnp.ones((width,))), epsilon

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        return rms_norm(x, self.scale[...], self.epsilon)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned `scale [D]`, from 1, and `bias [D]`, from 0."""

    def __init__(self, width: int, epsilon: float = 1e-5):
        """Starts as the plain norm; `epsilon` is added to the variance."""
        self.scale, self.bias = nnx.Param(jnp.ones((width,))), nnx.Param(jnp.zeros((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
