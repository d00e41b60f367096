"""Running a Soft MoE plan (2308.00951): mix tokens into slots, run each expert on its slots, mix slots into tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array, ArrayTree, Expert, SoftPlan


def dispatch_soft(tokens: Array, plan: SoftPlan, expert: Expert, params: ArrayTree) -> Array:
    """Three matmuls: `E * C` mixtures of each sequence, the experts on `B * C` rows each, and back.

    Args:
      tokens: `[T, D]`.
      plan: the soft plan of the `T` tokens.
      expert: the expert network.
      params: its parameters, leaves with leading `[E]`.

    Returns:
      `[T, D]` in the dtype of `tokens`; both mixtures are summed in float32.
    """
    num_experts, num_slots = plan.dispatch.shape[1:]
    is_mixed = jnp.any(plan.combine > 0, axis=(1, 2))
    tokens = jnp.where(is_mixed[:, None], tokens, 0)  # 0 * NaN is NaN: a padding token may hold anything

    def by_sequence(array: Array) -> Array:  # (T, ...) -> (B, S, ...)
        return array.reshape(plan.num_sequences, -1, *array.shape[1:]).astype(jnp.float32)

    rows = jnp.einsum("BSEC,BSD->EBCD", by_sequence(plan.dispatch), by_sequence(tokens)).astype(tokens.dtype)
    rows = rows.reshape(num_experts, plan.num_sequences * num_slots, -1)
    outputs = jax.vmap(lambda p, x: expert.outer(p, expert.inner(p, x)))(params, rows)
    outputs = outputs.reshape(num_experts, plan.num_sequences, num_slots, -1).astype(jnp.float32)
    mixed = jnp.einsum("BSEC,EBCD->BSD", by_sequence(plan.combine), outputs)
    return mixed.reshape(tokens.shape).astype(tokens.dtype)
