"""Soft MoE (Puigcerver et al. 2308.00951, section 2.1): no token is assigned, all are mixed.

With logits z of a sequence's tokens t and the C slots of each expert, the slots s = (e, c),

    dispatch[t, s] = exp(z[t, s]) / sum_t' exp(z[t', s])    slot s is the mixture sum_t dispatch[t, s] x_t
    combine[t, s]  = exp(z[t, s]) / sum_s' exp(z[t, s'])    token t gets sum_s combine[t, s] expert(slot s)

Every expert does C rows for each sequence, whatever the logits: balance is perfect and nothing is dropped. Every slot
reads the whole sequence, so a token's output depends on later ones: no language model can generate with it.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED
from moe_jax.routing.topology import open_experts
from moe_jax.types import Array, RouterOutput, RouterStats, SoftPlan, Topology


def route_soft(
    logits: Array,
    *,
    topology: Topology | None = None,
    token_groups: Array | None = None,
    token_mask: Array | None = None,
    num_sequences: int = 1,
    stats_groups: int | None = None,
) -> RouterOutput:
    """Mixes tokens into slots and slots into tokens; what `routing.route` is to the rules.

    The statistics are those of the rules as far as they have a meaning. `chosen`, `kept` and `load_sums` count the rows
    that an expert computes, C for every sequence with a token that it is open to; a token's part of a row is its
    dispatch weight. `prob_sums` and `gate_sums` are the combine weights, summed over an expert's slots, and the entropy
    is that of these. z is the logsumexp over all slots. Nothing is dropped, and the load-balancing loss is always 1.

    Args:
      logits: `[T, E, C]` of tokens and slots; computed in float32 whatever comes in.
      topology: one layer's topology; a closed expert's slots neither read the token nor are read by it. Its number of
        choices has no meaning here and no effect.
      token_groups: `[T]` int32 group of each token; needed when the topology has several groups.
      token_mask: `[T]` bool; masked tokens are in no mixture and get zeros.
      num_sequences: B, static; the tokens are B sequences of equal length, each with its own slots. 1 mixes the whole
        batch.
      stats_groups: as in `routing.route`.

    Returns:
      The plan, float32 logits `[T, E]` and the statistics. An expert's logit is the logsumexp over its slots, so that
      the softmax of the logits is the experts' share in the combine weights.

    Raises:
      ValueError: a mask of another shape, tokens that do not divide into the sequences or groups, or a topology whose
        groups are not told apart.
    """
    num_tokens, num_experts, _ = logits.shape
    for name, array in {"token_mask": token_mask, "token_groups": token_groups}.items():
        if array is not None and array.shape != (num_tokens,):
            raise ValueError(f"{name} must be [{num_tokens}] for logits {logits.shape}, got {array.shape}")
    for name, parts in {"num_sequences": num_sequences, "stats_groups": stats_groups or 1}.items():
        if num_tokens % parts:
            raise ValueError(f"{name}={parts} does not divide the {num_tokens} tokens into equal parts")
    logits = logits.astype(jnp.float32)
    is_open = jnp.ones((num_tokens, num_experts), bool)
    if topology is not None:
        is_open, _ = open_experts(topology, token_groups, num_tokens)
    is_token = jnp.ones(num_tokens, bool) if token_mask is None else token_mask
    is_open &= is_token[:, None]

    plan = soft_plan(logits, is_open, num_sequences)
    stats = _soft_stats(logits, plan, is_open, is_token, stats_groups)
    return RouterOutput(plan, jax.nn.logsumexp(logits, axis=2), stats)


def soft_plan(logits: Array, is_open: Array, num_sequences: int) -> SoftPlan:
    """Dispatch and combine weights of `logits [T, E, C]`, over what `is_open [T, E]` leaves open."""
    masked = jnp.where(is_open[:, :, None], logits, CLOSED)
    by_sequence = masked.reshape(num_sequences, -1, *logits.shape[1:])  # (T, E, C) -> (B, S, E, C)
    dispatch = jax.nn.softmax(by_sequence, axis=1).reshape(logits.shape)
    combine = jax.nn.softmax(masked, axis=(1, 2))
    return SoftPlan(dispatch * is_open[:, :, None], combine * is_open[:, :, None], num_sequences)


def _soft_stats(logits: Array, plan: SoftPlan, is_open: Array, is_token: Array, num_groups: int | None) -> RouterStats:
    """Each token's share of every statistic, summed over all tokens or within equal runs of them."""
    mass = plan.combine.sum(2)  # [T, E]
    rows = jax.lax.stop_gradient(plan.dispatch.sum(2))
    masked = jnp.where(is_open[:, :, None], logits, CLOSED)
    log_normalizer = jnp.where(is_open.any(1), jax.nn.logsumexp(masked, axis=(1, 2)), 0.0)
    nothing = jnp.zeros(logits.shape[0])
    of_tokens = RouterStats(
        chosen=rows,
        kept=rows,
        prob_sums=mass,
        entropy_sum=-jnp.sum(mass * jnp.log(jnp.where(mass > 0, mass, 1.0)), axis=1),
        z_sum=jnp.square(log_normalizer),
        dropped_capacity=nothing,
        dropped_topology=nothing,
        num_tokens=is_token.astype(jnp.float32),
        num_masked=1.0 - is_token,
        gate_sums=mass,
        load_sums=rows,
    )
    if num_groups is None:
        return jax.tree.map(lambda values: values.sum(0), of_tokens)
    return jax.tree.map(lambda values: values.reshape(num_groups, -1, *values.shape[1:]).sum(1), of_tokens)
