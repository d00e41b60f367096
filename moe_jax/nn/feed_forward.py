"""The dense feed-forward layer: one SwiGLU network for all tokens."""

from flax import nnx

from moe_jax.nn.experts import SWIGLU, SwiGLUExperts
from moe_jax.types import Array


class FeedForward(nnx.Module):
    """SwiGLU as a single expert that everybody uses."""

    def __init__(self, width: int, hidden: int, *, output_scale: float = 1.0, key: Array):
        """Arguments as `SwiGLUExperts` with one expert of hidden width F."""
        self.experts = SwiGLUExperts(1, width, hidden, output_scale=output_scale, key=key)

    def __call__(self, x: Array) -> Array:
        """`[B, S, D]` to `[B, S, D]`."""
        params = {name: weight[0] for name, weight in self.experts.parameters(x.dtype).items()}
        return SWIGLU.outer(params, SWIGLU.inner(params, x))
