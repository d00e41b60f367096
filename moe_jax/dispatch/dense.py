"""Every expert on every token: E / K times the needed work, and nothing that can go wrong.

`out[t] = sum_e w[t, e] * expert_e(tokens[t])` with `w[t, e]` the token's gate for expert `e`, 0 where it has none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_dense(tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
    """Runs all experts on all tokens and weighs: the oracle of the other backends, and fast for tiny E.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan of the `T` tokens.
      expert: the expert network.
      params: its parameters, leaves with leading `[E]`.

    Returns:
      `[T, D]` in the dtype of `tokens`.
    """
    is_routed = jnp.any(plan.expert_ids < plan.num_experts, axis=1)
    tokens = jnp.where(is_routed[:, None], tokens, 0)  # 0 * NaN is NaN: a padding token may hold anything
    outputs = jax.vmap(lambda expert_params: expert.outer(expert_params, expert.inner(expert_params, tokens)))(params)
    choices = jax.nn.one_hot(plan.expert_ids, plan.num_experts)  # [T, K, E]; the sentinel's row is zero
    weights = jnp.einsum("TK,TKE->TE", plan.gates, choices)
    return jnp.einsum("TE,ETD->TD", weights, outputs.astype(jnp.float32)).astype(tokens.dtype)
