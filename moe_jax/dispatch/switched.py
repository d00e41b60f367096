"""Dispatch of a few tokens: one slot of the plan at a time, through the branch of the program that is its expert's.

The time of a decoded token is the time to read weights. To index a stack of experts by a traced number makes XLA's CPU
backend write a copy of the expert and read that again; a branch reads weights where they are, if each expert has arrays
of its own (`run_slots`). Slots run in expert order, so that the weights of an expert with several tokens come from the
processor's cache after the first. There are E branches to compile, and every token costs its own pass: for many experts
or tokens take `blocked`, which also gives the gradients here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_switched(tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
    """Runs the slots by experts cut out of a stack, which copies those that are used.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan; the capacity plays no role.
      expert: the expert network; its functions must not close over traced arrays.
      params: its parameters, leaves with leading `[E]`.

    Returns:
      `[T, D]` in the dtype of `tokens`.
    """
    return _dispatch(expert, tokens, plan.gates, params, plan.expert_ids)


def run_slots(tokens: Array, plan: RoutingPlan, experts: Sequence[Callable[[Array], Array]]) -> Array:
    """Runs each filled slot of a plan, and sums the slots of a token by its gates; without gradients.

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

    def run_slot(i: Array, rows: Array) -> Array:
        slot = slots[i]
        token = jax.lax.dynamic_slice_in_dim(tokens, slot // num_choices, 1)
        made = jax.lax.switch(ids[slot], branches, token).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(rows, made, slot, 0)

    rows = jax.lax.fori_loop(0, len(ids), run_slot, jnp.zeros((len(ids), row.shape[1]), jnp.float32))
    weighed = plan.gates[:, :, None] * rows.reshape(num_tokens, num_choices, -1)
    return weighed.sum(1).astype(tokens.dtype)


def _plan(expert_ids: Array, gates: Array, params: ArrayTree) -> RoutingPlan:
    return RoutingPlan(expert_ids, gates, len(jax.tree.leaves(params)[0]), None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(expert: Expert, tokens: Array, gates: Array, params: ArrayTree, expert_ids: Array) -> Array:
    """Dispatch with the gradients of `blocked`."""

    def run(index: int, row: Array) -> Array:
        one = jax.tree.map(lambda leaf: leaf[index], params)
        return expert.outer(one, expert.inner(one, row))

    plan = _plan(expert_ids, gates, params)
    return run_slots(tokens, plan, [partial(run, index) for index in range(plan.num_experts)])


def _forward(
    expert: Expert, tokens: Array, gates: Array, params: ArrayTree, expert_ids: Array
) -> tuple[Array, tuple[Array, Array, ArrayTree, Array]]:
    """Keeps the inputs."""
    return _dispatch(expert, tokens, gates, params, expert_ids), (tokens, gates, params, expert_ids)


def _backward(expert: Expert, inputs: tuple, output_grad: Array) -> tuple[Array, Array, ArrayTree, None]:
    """Runs `blocked` forwards and back; the ids have no gradient."""
    *differentiable, expert_ids = inputs

    def run(tokens: Array, gates: Array, params: ArrayTree) -> Array:
        return dispatch_blocked(tokens, _plan(expert_ids, gates, params), expert, params)

    _, pull_back = jax.vjp(run, *differentiable)
    return *pull_back(output_grad), None


_dispatch.defvjp(_forward, _backward)
