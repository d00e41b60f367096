"""Selecting experts from scores, with ties and closed experts treated alike by every rule."""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED
from moe_jax.types import Array, RoutingInputs


def select_top_k(scores: Array, num_choices: int, is_open: Array | None, limit: Array | None) -> Array:
    """The K best open experts of every token, best first; ties go to the lower expert id.

    Args:
      scores: `[T, E]` selection scores.
      num_choices: K, static; the number of slots.
      is_open: `[T, E]` bool, or None for all open.
      limit: `[T]` int32 choices the token may make, or None for K.

    Returns:
      `[T, K]` int32 expert ids; slots past the limit, or past the number of open experts, hold E.
    """
    num_experts = scores.shape[-1]
    if is_open is not None:
        scores = jnp.where(is_open, scores, CLOSED)
    _, ids = jax.lax.top_k(scores, num_choices)
    slot = jnp.arange(num_choices)[None, :]
    if is_open is not None:
        ids = jnp.where(slot < is_open.sum(-1, keepdims=True), ids, num_experts)
    if limit is not None:
        ids = jnp.where(slot < limit[:, None], ids, num_experts)
    return ids.astype(jnp.int32)


def gather_chosen(values: Array, expert_ids: Array) -> Array:
    """`values [T, E]` at `expert_ids [T, K]`; 0 in empty slots."""
    num_experts = values.shape[-1]
    chosen = jnp.take_along_axis(values, jnp.minimum(expert_ids, num_experts - 1), axis=-1)
    return jnp.where(expert_ids < num_experts, chosen, 0.0)


def softmax_of_chosen(logits: Array, expert_ids: Array) -> Array:
    """Softmax over the chosen logits alone: `[T, E]` at `expert_ids [T, K]`; 0 in empty slots."""
    is_chosen = expert_ids < logits.shape[-1]
    chosen = jnp.where(is_chosen, gather_chosen(logits, expert_ids), CLOSED)
    return jax.nn.softmax(chosen, axis=-1) * is_chosen


def biased(scores: Array, inputs: RoutingInputs) -> Array:
    """`scores [T, E]` plus the selection bias, which has no gradient."""
    if inputs.bias is None:
        return scores
    return scores + jax.lax.stop_gradient(inputs.bias if inputs.bias.ndim == 2 else inputs.bias[None, :])
