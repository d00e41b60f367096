"""Capacity buffers filled and emptied by index: one batched matmul over `[E, C, D]`, no scatter in either pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.dispatch.rows import combine_rows, take_token_rows
from moe_jax.ops.expert_order import rank_in_expert
from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_gather(tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
    """Gathers tokens into `C` rows per expert, runs the experts as a batch and gathers the results back.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan; its `capacity` is the buffer length `C`, or T when it is None.
      expert: the expert network.
      params: its parameters, leaves with leading `[E]`.

    Returns:
      `[T, D]` in the dtype of `tokens`.
    """
    num_tokens, num_experts = tokens.shape[0], plan.num_experts
    capacity = num_tokens if plan.capacity is None else plan.capacity
    num_rows = num_experts * capacity
    expert_ids = plan.expert_ids.reshape(-1)  # [T, K] -> [T*K]
    ranks, _ = rank_in_expert(expert_ids, num_experts)
    slots = jnp.where(expert_ids < num_experts, expert_ids * capacity + ranks, num_rows)
    numbers = jnp.arange(slots.shape[0], dtype=jnp.int32)
    assignments = jnp.full(num_rows, slots.shape[0], jnp.int32).at[slots].set(numbers, mode="drop")
    slots = slots.reshape(plan.expert_ids.shape)

    rows = take_token_rows(tokens, assignments, slots).reshape(num_experts, capacity, -1)  # [E*C, D] -> [E, C, D]
    outputs = jax.vmap(lambda p, x: expert.outer(p, expert.inner(p, x)))(params, rows)
    outputs = outputs.reshape(num_rows, -1)  # [E, C, D] -> [E*C, D]
    return combine_rows(outputs, plan.gates, assignments, slots).astype(tokens.dtype)
