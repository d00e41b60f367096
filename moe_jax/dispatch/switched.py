"""Dispatch of a few tokens: one slot of the plan at a time, through the branch of the program that is its expert's.

The time of a decoded token is the time to read weights. To index a stack of experts by a traced number makes XLA's CPU
backend write a copy of the expert and read that again; a branch reads weights where they are, if each expert has arrays
of its own (`run_slots`). Slots run in expert order, so that the weights of an expert with several tokens come from the
processor's cache after the first. There are E branches to compile, and every token costs its own pass: for many experts
or tokens take `blocked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_switched(tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
    """Runs the slots by experts cut out of a stack, which copies those that are used.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan; the capacity plays no role.
      expert: the expert network.
      params: its parameters, leaves with leading `[E]`.

    Returns:
      `[T, D]` in the dtype of `tokens`.
    """

    def run(index: int, row: Array) -> Array:
        one = jax.tree.map(lambda leaf: leaf[index], params)
        return expert.outer(one, expert.inner(one, row))

    return run_slots(tokens, plan, [partial(run, index) for index in range(plan.num_experts)])


def run_slots(tokens: Array, plan: RoutingPlan, experts: Sequence[Callable[[Array], Array]]) -> Array:
    """Runs each filled slot of a plan, and sums the slots of a token by its gates.

    Args:
      tokens: `[T, D]`.
      plan: of the T tokens.
      experts: E functions of a row `[1, D]`.

    Returns:
      `[T, D']` in the dtype of `tokens`.
    """
    num_tokens, num_choices = plan.expert_ids.shape
    ids = plan.expert_ids.reshape(-1)
    slots = jnp.arange(num_choices) if num_tokens == 1 else jnp.argsort(ids)
    row = jax.eval_shape(experts[0], tokens[:1])
    branches = [*experts, lambda _: jnp.zeros(row.shape, row.dtype)]

    def run_slot(rows: Array, slot: Array) -> tuple[Array, None]:
        token = jax.lax.dynamic_slice_in_dim(tokens, slot // num_choices, 1)
        made = jax.lax.switch(ids[slot], branches, token).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(rows, made, slot, 0), None

    rows, _ = jax.lax.scan(run_slot, jnp.zeros((len(ids), row.shape[1]), jnp.float32), slots)
    weighed = plan.gates[:, :, None] * rows.reshape(num_tokens, num_choices, -1)
    return weighed.sum(1).astype(tokens.dtype)
