"""Sum-form statistics of one routing decision; see `types.RouterStats` for the fields."""

import jax
import jax.numpy as jnp

from moe_jax.routing.rules import CLOSED
from moe_jax.types import Array, RouterStats


def count_assignments(expert_ids: Array, num_experts: int) -> Array:
    """`[E]` float32 number of slots of `expert_ids [T, K]` that name each expert."""
    is_expert = expert_ids.reshape(-1)[:, None] == jnp.arange(num_experts)[None, :]
    return is_expert.sum(0, dtype=jnp.float32)


def router_stats(
    logits: Array,
    probabilities: Array,
    chosen_ids: Array,
    kept_ids: Array,
    *,
    is_open: Array | None,
    limit: Array | None,
    token_mask: Array | None,
) -> RouterStats:
    """Sums over the unmasked tokens.

    Args:
      logits: `[T, E]` float32.
      probabilities: `[T, E]` softmax over the open experts, 0 for masked tokens.
      chosen_ids: `[T, K]` the rule's choice, before capacity.
      kept_ids: `[T, K]` the choice that is dispatched.
      is_open: `[T, E]` bool, false on masked tokens' rows; None means all open.
      limit: `[T]` int32 choices asked of the topology; None means K.
      token_mask: `[T]` bool, false for masked tokens; None means none is masked.
    """
    num_tokens, num_experts = logits.shape
    num_choices = chosen_ids.shape[1]
    is_token = jnp.ones((num_tokens,), bool) if token_mask is None else token_mask
    open_logits = logits if is_open is None else jnp.where(is_open, logits, CLOSED)
    has_choice = is_token if is_open is None else is_token & is_open.any(-1)
    log_normalizer = jnp.where(has_choice, jax.nn.logsumexp(open_logits, axis=-1), 0.0)
    entropy = log_normalizer - jnp.sum(probabilities * open_logits, axis=-1)
    chosen = count_assignments(chosen_ids, num_experts)
    kept = count_assignments(kept_ids, num_experts)
    asked = num_choices if limit is None else jnp.minimum(limit, num_choices)
    tokens = is_token.sum(dtype=jnp.float32)
    return RouterStats(
        chosen=chosen,
        kept=kept,
        prob_sums=probabilities.sum(0),
        entropy_sum=entropy.sum(),
        z_sum=jnp.square(log_normalizer).sum(),
        dropped_capacity=(chosen - kept).sum(),
        dropped_topology=jnp.sum(is_token * asked, dtype=jnp.float32) - chosen.sum(),
        num_tokens=tokens,
        num_masked=num_tokens - tokens,
    )
