"""Dispatch and combine as one-hot matmuls, after GShard (arXiv 2006.16668, algorithm 1) and Switch (2101.03961).

No gathers at all, at the price of `[T, E, C]` tensors: the layout that shards well and needs no sort.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_order import rank_in_expert
from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_einsum(tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
    """Places tokens in expert buffers with a one-hot tensor and combines with its weighted copy.

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
    ranks, _ = rank_in_expert(plan.expert_ids.reshape(-1), num_experts)
    experts = jax.nn.one_hot(plan.expert_ids, num_experts)  # [T, K, E]; the sentinel's row is zero
    places = jax.nn.one_hot(ranks.reshape(plan.expert_ids.shape), capacity)  # [T, K, C]
    dispatch = jnp.einsum("TKE,TKC->TEC", experts, places)
    combine = jnp.einsum("TK,TKE,TKC->TEC", plan.gates, experts, places)

    is_routed = jnp.any(plan.expert_ids < num_experts, axis=1)
    tokens = jnp.where(is_routed[:, None], tokens, 0)  # 0 * NaN is NaN: a padding token may hold anything
    rows = jnp.einsum("TEC,TD->ECD", dispatch.astype(tokens.dtype), tokens)
    outputs = jax.vmap(lambda p, x: expert.outer(p, expert.inner(p, x)))(params, rows)
    return jnp.einsum("TEC,ECD->TD", combine, outputs.astype(jnp.float32)).astype(tokens.dtype)
