"""Expert stacks: E experts' parameters in arrays with a leading `[E]`, and the function of one expert."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array, Expert


def _swiglu_inner(params: dict[str, Array], rows: Array) -> Array:
    return rows @ params["w_in"]


def _swiglu_outer(params: dict[str, Array], hidden: Array) -> Array:
    return _swiglu(hidden) @ params["w_out"]


def _swiglu_grouped(params: dict[str, Array], rows: Array, matmul: Callable, spread: Callable) -> Array:
    return matmul(_swiglu(matmul(rows, params["w_in"])), params["w_out"])


def _swiglu(hidden: Array) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


# SwiGLU (Shazeer 2002.05202): (silu(x W_gate) * (x W_up)) W_out, with w_in = [W_gate, W_up] fused.
SWIGLU = Expert(_swiglu_inner, _swiglu_outer, _swiglu_grouped)


class SwiGLUExperts(nnx.Module):
    """Parameters of E SwiGLU experts: `w_in [E, D, 2F]`, `w_out [E, F, D]`."""

    expert = SWIGLU

    def __init__(self, num_experts: int, width: int, hidden: int, *, output_scale: float = 1.0, key: Array):
        """Draws normal weights scaled by the inverse root of their fan-in.

        Args:
          num_experts: E.
          width: D.
          hidden: F of one expert.
          output_scale: factor on `w_out`, for depth-scaled initialisation.
          key: consumed.
        """
        in_key, out_key = jax.random.split(key)
        self.w_in = nnx.Param(jax.random.normal(in_key, (num_experts, width, 2 * hidden)) * width**-0.5)
        self.w_out = nnx.Param(jax.random.normal(out_key, (num_experts, hidden, width)) * output_scale * hidden**-0.5)

    def parameters(self, dtype: jnp.dtype) -> dict[str, Array]:
        """The stacked parameters cast for computing; what a dispatch backend takes."""
        return {"w_in": self.w_in[...].astype(dtype), "w_out": self.w_out[...].astype(dtype)}
