"""The feed-forward network that every token passes: a dense layer, or the shared experts of a mixture."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.expert_stack import ExpertStack, Setting
from moe_jax.types import Array


class FeedForward(nnx.Module):
    """One expert that everybody uses, with an optional gate: `sigmoid(x w) * expert(x)`.

    N shared experts of two matrices (DeepSeekMoE 2401.06066), whose outputs are added, are one with N times the hidden
    width. The gate is that of Qwen2-MoE (2407.10671).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: str = "swiglu",
        settings: Mapping[str, Setting] | None = None,
        is_gated: bool = False,
        output_scale: float = 1.0,
        key: Array,
    ):
        """Arguments as `ExpertStack` with one expert; the gate's vector `[D, 1]` starts at zero, a gate of 1/2."""
        self.experts = ExpertStack(1, width, hidden, kind=kind, settings=settings, output_scale=output_scale, key=key)
        self.gate = nnx.Param(jnp.zeros((width, 1))) if is_gated else None

    def __call__(self, x: Array) -> Array:
        """`[B, S, D]` to `[B, S, D]`."""
        params = {name: weight[0] for name, weight in self.experts.parameters(x.dtype).items()}
        expert, rows = self.experts.expert, x.reshape(-1, x.shape[-1])
        y = expert.outer(params, expert.inner(params, rows)).reshape(x.shape)
        if self.gate is None:
            return y
        return jax.nn.sigmoid(x @ self.gate[...].astype(x.dtype)) * y
