"""Zero-compute experts (MoE++ 2410.07348): choices that cost next to nothing, so that easy tokens use fewer experts.

    zero       f(x) = 0
    copy       f(x) = x
    constant   f(x) = a_1 x + a_2 v,  (a_1, a_2) = softmax(x W)       with learned v [D] and W [D, 2]

The router scores them like the others: with E experts that compute and Z that do not, logits, plan and statistics have
E + Z columns, the last Z being these. They need no dispatch; the others are dispatched by what is left of the plan.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array, RoutingPlan

ZeroComputeKind = Literal["zero", "copy", "constant"]


def without_zero_compute(plan: RoutingPlan, num_experts: int) -> RoutingPlan:
    """The part of a plan over E + Z experts that the first E have to compute; other slots become empty."""
    is_computed = plan.expert_ids < num_experts
    return dataclasses.replace(
        plan,
        expert_ids=jnp.where(is_computed, plan.expert_ids, num_experts),
        gates=jnp.where(is_computed, plan.gates, 0),
        num_experts=num_experts,
    )


def mix_zero_compute(
    tokens: Array,
    plan: RoutingPlan,
    kinds: Sequence[ZeroComputeKind],
    vectors: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """Sums what the zero-compute experts give, each weighed by its gate.

    Args:
      tokens: `[T, D]`.
      plan: over E + Z experts, the last Z of them of `kinds`.
      kinds: of the Z experts.
      vectors: `[N, D]`, v of the N constant experts, in their order; None without any.
      weights: `[N, D, 2]`, their W; None without any.

    Returns:
      `[T, D]` in the dtype of `tokens`; computed in float32.
    """
    x = tokens.astype(jnp.float32)

    def gates_of(kind: ZeroComputeKind) -> Array:  # [T, N]
        ids = [plan.num_experts - len(kinds) + z for z, other in enumerate(kinds) if other == kind]
        is_chosen = plan.expert_ids[:, :, None] == jnp.array(ids, jnp.int32)[None, None, :]  # [T, K, N]
        return jnp.sum(plan.gates[:, :, None] * is_chosen, axis=1)

    y = gates_of("copy").sum(1, keepdims=True) * x
    if vectors is not None and weights is not None:
        shares = jax.nn.softmax(jnp.einsum("TD,NDA->TNA", x, weights.astype(jnp.float32)), axis=-1)
        weighed = gates_of("constant")[:, :, None] * shares  # [T, N, 2]
        y += weighed[:, :, 0].sum(1, keepdims=True) * x + weighed[:, :, 1] @ vectors.astype(jnp.float32)
    return y.astype(tokens.dtype)


class ZeroComputeExperts(nnx.Module):
    """Z zero-compute experts and the parameters of the N constant ones among them."""

    def __init__(self, kinds: Sequence[ZeroComputeKind], width: int, *, key: Array):
        """Draws v, `bias [N, D]`, from N(0, 1) and W, `weights [N, D, 2]`, from N(0, 1/D); None both if N is 0.

        Args:
          kinds: of the Z experts, at least one.
          width: D.
          key: consumed.

        Raises:
          ValueError: no kinds, or an unknown one.
        """
        known = get_args(ZeroComputeKind)
        if not kinds or set(kinds) - set(known):
            raise ValueError(f"zero_compute={tuple(kinds)} must name at least one of: {', '.join(known)}")
        self.kinds = tuple(kinds)
        num_constants = self.kinds.count("constant")
        vector_key, weight_key = jax.random.split(key)
        vectors = jax.random.normal(vector_key, (num_constants, width))
        weights = jax.random.normal(weight_key, (num_constants, width, 2)) * width**-0.5
        self.bias = nnx.Param(vectors) if num_constants else None
        self.weights = nnx.Param(weights) if num_constants else None

    @property
    def num_experts(self) -> int:
        """Z."""
        return len(self.kinds)

    def __call__(self, x: Array, plan: RoutingPlan) -> Array:
        """`[B, S, D]`, and the plan over E + Z experts of its tokens, to `[B, S, D]`."""
        tokens = x.reshape(-1, x.shape[-1])
        constants = () if self.bias is None or self.weights is None else (self.bias[...], self.weights[...])
        return mix_zero_compute(tokens, plan, self.kinds, *constants).reshape(x.shape)
