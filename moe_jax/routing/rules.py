"""Token-choice rules: score -> select -> weigh, each a pure function on `[T, E]` arrays.

With logits z, p = softmax(z) over the open experts and S the K chosen ones:

    softmax_top_k               g_e = p_e                      OLMoE (2409.02060), Qwen1.5-MoE
    softmax_top_k_renormalized  g_e = p_e / sum_{S} p          Shazeer (1701.06538) in effect; Qwen3-MoE
    top_k_softmax               g   = softmax(z_S)             Mixtral (2401.04088), gpt-oss
    switch_top_1                g_e = p_e, K = 1               Switch (2101.03961, eq. 2)

The second and third are equal in exact arithmetic; both orders are kept since checkpoints are trained with one of
them and differ in rounding. A bias, if given, moves the selection only, never the gates (2408.15664, eq. 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array

# Finite, so that a row with no open expert stays free of NaN; exp of it is exactly 0 in float32.
CLOSED = -1e30


class Choice(NamedTuple):
    """A rule's answer: `expert_ids [T, K]` int32 with sentinel E, `gates [T, K]`, `probabilities [T, E]`."""

    expert_ids: Array
    gates: Array
    probabilities: Array


def score_softmax(logits: Array, is_open: Array | None) -> Array:
    """Softmax over the open experts of `logits [T, E]`; closed experts, and rows with none open, get exactly 0."""
    if is_open is None:
        return jax.nn.softmax(logits, axis=-1)
    return jax.nn.softmax(jnp.where(is_open, logits, CLOSED), axis=-1) * is_open


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


def _biased(scores: Array, bias: Array | None) -> Array:
    return scores if bias is None else scores + jax.lax.stop_gradient(bias)[None, :]


def softmax_top_k(
    logits: Array, num_choices: int, is_open: Array | None, limit: Array | None, bias: Array | None
) -> Choice:
    """Softmax, then top-k, gates left as they are: they sum to less than 1.

    Args:
      logits: `[T, E]` float32.
      num_choices: K, static.
      is_open: `[T, E]` bool or None.
      limit: `[T]` int32 or None.
      bias: `[E]` float32 added to the probabilities for the selection only, or None.
    """
    probabilities = score_softmax(logits, is_open)
    ids = select_top_k(_biased(probabilities, bias), num_choices, is_open, limit)
    return Choice(ids, gather_chosen(probabilities, ids), probabilities)


def softmax_top_k_renormalized(
    logits: Array, num_choices: int, is_open: Array | None, limit: Array | None, bias: Array | None
) -> Choice:
    """Softmax, then top-k, then gates divided by their sum. Arguments as `softmax_top_k`."""
    ids, gates, probabilities = softmax_top_k(logits, num_choices, is_open, limit, bias)
    total = gates.sum(-1, keepdims=True)
    return Choice(ids, gates / jnp.where(total > 0, total, 1.0), probabilities)


def top_k_softmax(
    logits: Array, num_choices: int, is_open: Array | None, limit: Array | None, bias: Array | None
) -> Choice:
    """Top-k of the logits, then softmax over the chosen ones. Arguments as `softmax_top_k`.

    The bias is added to the probabilities here too, so that it means the same under every rule.
    """
    probabilities = score_softmax(logits, is_open)
    selection = logits if bias is None else _biased(probabilities, bias)
    ids = select_top_k(selection, num_choices, is_open, limit)
    is_chosen = ids < logits.shape[-1]
    chosen = jnp.where(is_chosen, gather_chosen(logits, ids), CLOSED)
    return Choice(ids, jax.nn.softmax(chosen, axis=-1) * is_chosen, probabilities)


def switch_top_1(
    logits: Array, num_choices: int, is_open: Array | None, limit: Array | None, bias: Array | None
) -> Choice:
    """The best expert alone, weighed by its probability, so that the gate still carries the router's gradient.

    Raises:
      ValueError: if `num_choices` is not 1.
    """
    if num_choices != 1:
        raise ValueError(f"switch_top_1 routes to exactly 1 expert, got num_choices={num_choices}; use softmax_top_k")
    return softmax_top_k(logits, 1, is_open, limit, bias)
