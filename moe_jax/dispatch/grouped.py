"""Dropless dispatch through grouped matmuls: the path for GPU and TPU.

Assignments are put in expert order, their tokens gathered into `[T*K, D]` rows, all experts run at once by
`Expert.grouped`, and the results gathered back and weighed. Both gathers have gathers for transposes (`rows.py`), and
the matmuls bring their own VJP (`ops.grouped_matmul`), so nothing is scattered in either direction.

A grouped matmul needs to know which of an expert's operations are matmuls, so this backend runs only experts that say
so: those with a third function, `grouped`, beside `inner` and `outer`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from moe_jax.dispatch.rows import combine_rows, take_token_rows
from moe_jax.ops.expert_order import expert_order
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.grouped_matmul.passes import PerPass, expert_of_rows
from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_grouped(
    tokens: Array,
    plan: RoutingPlan,
    expert: Expert,
    params: ArrayTree,
    *,
    impl: str | PerPass | None = None,
) -> Array:
    """Runs all experts at once over rows in expert order.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan; the capacity plays no role.
      expert: the expert network, with `grouped`.
      params: its parameters, leaves with leading `[E]`.
      impl: the grouped matmul's implementation, see `ops.grouped_matmul`.

    Returns:
      `[T, D]` in the dtype of `tokens`.

    Raises:
      ValueError: if the expert has no `grouped`.
    """
    if expert.grouped is None:
        raise ValueError(
            "the dispatch backend 'grouped' needs an expert that computes all experts at once: give its Expert the "
            "third function, grouped (see types.Expert), or take the backend 'blocked', which runs any expert"
        )
    num_assignments = plan.expert_ids.size
    order = expert_order(plan.expert_ids.reshape(-1), plan.num_experts)
    is_filled = jnp.arange(num_assignments) < order.starts[-1]
    assignments = jnp.where(is_filled, order.assignments, num_assignments)
    positions = order.positions.reshape(plan.expert_ids.shape)  # [T*K] -> [T, K]
    slots = jnp.where(plan.expert_ids < plan.num_experts, positions, num_assignments)

    group_sizes = jnp.diff(order.starts)
    row_experts = expert_of_rows(group_sizes, num_assignments)
    outputs = expert.grouped(
        params,
        take_token_rows(tokens, assignments, slots),
        functools.partial(grouped_matmul, group_sizes=group_sizes, impl=impl),
        lambda values: values.at[row_experts].get(mode="fill", fill_value=0),
    )
    return combine_rows(outputs, plan.gates, assignments, slots).astype(tokens.dtype)
