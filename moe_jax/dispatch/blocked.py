"""Dropless dispatch that computes filled rows only: the fast path on CPU.

Assignments are put in expert order. For each expert that has any, its weights are read once and its rows go through
the network block by block: gather the rows, `inner`, `outer`, weigh by the gate, add to the tokens' output. Block
lengths form a ladder, say (512, 128): an expert with 700 rows takes one long and two short blocks, so little is
padding, and the number of iterations is dynamic, so an empty expert or slot costs nothing. The last block of an expert
may reach into the rows of the next one; what it computes there is discarded.

The VJP is by hand. Autodiff of such a loop stores every block's weights and scatters a full weight matrix per block;
here the weight gradient of an expert grows in the loop's carry and is written once. Of the activations only the
output of `inner` is kept, in expert order; `outer`'s output is computed again for the gate's gradient, which costs a
matmul and saves a `[T*K, D]` buffer (on CPU, page-faulting such buffers in costs more than that matmul).

Under `vmap` the population runs one member after the other: a dynamic loop bound that differs between members would
make XLA run, and select over, the union of all members' iterations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_order import ExpertOrder, expert_order
from moe_jax.ops.grouped_matmul.blocked import block_ladder, loop_over_blocks
from moe_jax.types import Array, ArrayTree, Expert, RoutingPlan


def dispatch_blocked(
    tokens: Array,
    plan: RoutingPlan,
    expert: Expert,
    params: ArrayTree,
    *,
    block_lengths: tuple[int, ...] | None = None,
) -> Array:
    """Runs each expert on exactly its rows, in blocks.

    Args:
      tokens: `[T, D]`.
      plan: the routing plan; the capacity plays no role.
      expert: the expert network; its functions must not close over traced arrays.
      params: its parameters, floating-point leaves with leading `[E]`.
      block_lengths: falling block lengths in rows, each dividing the one before; None means `block_ladder`.

    Returns:
      `[T, D]` in the dtype of `tokens`.
    """
    lengths = block_lengths or block_ladder(plan.expert_ids.size, plan.num_experts)
    return _dispatch(expert, lengths, tokens, plan.gates, params, plan.expert_ids)


def _slice_of(tree: ArrayTree, index: Array) -> ArrayTree:
    """One expert's slice of stacked parameters."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _order(expert_ids: Array, num_experts: int, longest: int) -> ExpertOrder:
    """The expert order, with room for the last block to reach past the end."""
    order = expert_order(expert_ids.reshape(-1), num_experts)
    return order._replace(assignments=jnp.pad(order.assignments, (0, longest)))


def _block_of(order: ExpertOrder, begin: Array, end: Array, length: int) -> tuple[Array, Array]:
    """Assignments `[length]` of a block and which of them belong to it."""
    assignments = jax.lax.dynamic_slice_in_dim(order.assignments, begin, length)
    return assignments, begin + jnp.arange(length, dtype=jnp.int32) < end


def _take(values: Array, indices: Array, is_valid: Array) -> Array:
    """Rows of `values`, zero where not valid."""
    return jnp.where(is_valid[:, None], values.at[indices].get(mode="promise_in_bounds"), 0)


def _run(
    expert: Expert,
    lengths: tuple[int, ...],
    keep_hidden: bool,
    tokens: Array,
    gates: Array,
    params: ArrayTree,
    expert_ids: Array,
) -> tuple[Array, ArrayTree | None, ExpertOrder]:
    """The forward loop: the output, `inner`'s outputs in expert order if kept, and the order."""
    num_tokens, num_choices = expert_ids.shape
    num_experts = jax.tree.leaves(params)[0].shape[0]
    order = _order(expert_ids, num_experts, lengths[0])
    flat_gates = gates.reshape(-1)

    def block(begin: Array, end: Array, length: int, carry: tuple, local: ArrayTree) -> tuple:
        output, hidden = carry
        assignments, is_valid = _block_of(order, begin, end, length)
        token = assignments // num_choices
        block_hidden = expert.inner(local, _take(tokens, token, is_valid))
        rows = expert.outer(local, block_hidden).astype(jnp.float32)
        # A token names an expert once, so a block adds at most one row to a token: the order of addition is fixed.
        weighted = flat_gates[assignments][:, None] * rows
        output = output.at[jnp.where(is_valid, token, num_tokens)].add(weighted, mode="drop")
        if keep_hidden:
            hidden = jax.tree.map(
                lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), begin, 0),
                hidden,
                block_hidden,
            )
        return (output, hidden), local

    one_expert = jax.eval_shape(_slice_of, params, jnp.int32(0))
    one_row = jax.eval_shape(expert.inner, one_expert, tokens[:1])
    width = jax.eval_shape(expert.outer, one_expert, one_row).shape[1]
    hidden = None
    if keep_hidden:
        num_rows = order.assignments.shape[0]
        hidden = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), _wide(leaf.dtype)), one_row)
    output, hidden = loop_over_blocks(
        order.starts,
        lengths,
        load=lambda index: _slice_of(params, index),
        block=block,
        store=lambda index, carry, local: carry,
        carry=(jnp.zeros((num_tokens, width), jnp.float32), hidden),
    )
    return output.astype(tokens.dtype), hidden, order


def _run_transposed(
    expert: Expert,
    lengths: tuple[int, ...],
    tokens: Array,
    gates: Array,
    params: ArrayTree,
    hidden: ArrayTree,
    order: ExpertOrder,
    output_grad: Array,
) -> tuple[Array, Array, ArrayTree]:
    """The backward loop: cotangents of tokens, gates and parameters."""
    (num_tokens, num_choices), num_assignments = gates.shape, gates.size
    flat_gates = gates.reshape(-1)
    one_row = jax.eval_shape(expert.inner, _slice_of(params, jnp.int32(0)), tokens[:1])

    def load(index: Array) -> tuple[ArrayTree, ArrayTree]:
        local = _slice_of(params, index)
        return local, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), local)

    def block(begin: Array, end: Array, length: int, carry: tuple, state: tuple) -> tuple:
        tokens_grad, gates_grad, params_grad = carry
        local, local_grad = state
        assignments, is_valid = _block_of(order, begin, end, length)
        token = assignments // num_choices
        block_hidden = jax.tree.map(
            lambda leaf, like: jax.lax.dynamic_slice_in_dim(leaf, begin, length).astype(like.dtype), hidden, one_row
        )
        rows, outer_vjp = jax.vjp(expert.outer, local, block_hidden)
        out_grad = _take(output_grad, token, is_valid).astype(jnp.float32)
        gates_grad = gates_grad.at[jnp.where(is_valid, assignments, num_assignments)].set(
            jnp.sum(out_grad * rows.astype(jnp.float32), axis=1), mode="drop"
        )
        outer_grad, hidden_grad = outer_vjp((flat_gates[assignments][:, None] * out_grad).astype(rows.dtype))
        _, inner_vjp = jax.vjp(expert.inner, local, _take(tokens, token, is_valid))
        inner_grad, rows_grad = inner_vjp(hidden_grad)
        local_grad = jax.tree.map(lambda total, a, b: total + (a + b), local_grad, outer_grad, inner_grad)
        tokens_grad = tokens_grad.at[jnp.where(is_valid, token, num_tokens)].add(
            rows_grad.astype(jnp.float32), mode="drop"
        )
        return (tokens_grad, gates_grad, params_grad), (local, local_grad)

    def store(index: Array, carry: tuple, state: tuple) -> tuple:
        tokens_grad, gates_grad, params_grad = carry
        params_grad = jax.tree.map(
            lambda total, part: jax.lax.dynamic_update_index_in_dim(total, part, index, 0),
            params_grad,
            state[1],
        )
        return tokens_grad, gates_grad, params_grad

    carry = (
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(num_assignments, jnp.float32),
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params),
    )
    tokens_grad, gates_grad, params_grad = loop_over_blocks(order.starts, lengths, load, block, store, carry)
    params_grad = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), params_grad, params)
    return tokens_grad.astype(tokens.dtype), gates_grad.reshape(gates.shape).astype(gates.dtype), params_grad


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """At least float32: XLA's CPU backend updates a slice of a bfloat16 array by converting all of it, every time."""
    return jnp.promote_types(dtype, jnp.float32)


def _one_by_one(function: Callable, *arguments: Any) -> Any:
    """Calls a function so that `vmap` maps it sequentially."""
    return jax.custom_batching.sequential_vmap(function)(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(
    expert: Expert, lengths: tuple[int, ...], tokens: Array, gates: Array, params: ArrayTree, expert_ids: Array
) -> Array:
    """Dispatch and combine with a hand-written VJP."""
    run = functools.partial(_run, expert, lengths, False)
    return _one_by_one(lambda *arguments: run(*arguments)[0], tokens, gates, params, expert_ids)


def _dispatch_forward(
    expert: Expert, lengths: tuple[int, ...], tokens: Array, gates: Array, params: ArrayTree, expert_ids: Array
) -> tuple[Array, tuple]:
    """Keeps the inputs, `inner`'s outputs and the order."""
    run = functools.partial(_run, expert, lengths, True)
    output, hidden, order = _one_by_one(run, tokens, gates, params, expert_ids)
    return output, (tokens, gates, params, hidden, order)


def _dispatch_backward(
    expert: Expert, lengths: tuple[int, ...], residuals: tuple, output_grad: Array
) -> tuple[Array, Array, ArrayTree, None]:
    """Runs the transposed loop; the ids have no gradient."""
    run = functools.partial(_run_transposed, expert, lengths)
    return *_one_by_one(run, *residuals, output_grad), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
