"""Sum-form statistics of one routing decision; see `types.RouterStats` for the fields."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.required_bias import count_bins, required_bias_bins
from moe_jax.routing.scores import CLOSED
from moe_jax.types import Array, Choice, RouterStats, RoutingInputs


def count_assignments(expert_ids: Array, num_experts: int) -> Array:
    """`[E]` float32 number of slots of `expert_ids [T, K]` that name each expert."""
    is_expert = expert_ids.reshape(-1)[:, None] == jnp.arange(num_experts)[None, :]
    return is_expert.sum(0, dtype=jnp.float32)


def router_stats(
    inputs: RoutingInputs,
    choice: Choice,
    kept_ids: Array,
    *,
    asked: Array | None,
    token_mask: Array | None,
    num_groups: int | None = None,
    bias_bins: int = 0,
) -> RouterStats:
    """Sums over the unmasked tokens.

    Args:
      inputs: what the rule saw.
      choice: what it chose, before capacity.
      kept_ids: `[T, K]` the choice that is dispatched.
      asked: `[T]` choices that each token should have got, for rules of fixed K; None if nothing was promised.
      token_mask: `[T]` bool, false for masked tokens; None means none is masked.
      num_groups: None sums over all tokens; n gives sums over each of n equal runs of tokens, with a leading `[n]`.
      bias_bins: bins of the histogram of required biases, for rules of fixed K that report their scores; 0 for none.
    """
    is_token = jnp.ones(inputs.logits.shape[:1], bool) if token_mask is None else token_mask
    open_logits = inputs.logits if inputs.is_open is None else jnp.where(inputs.is_open, inputs.logits, CLOSED)
    has_choice = is_token if inputs.is_open is None else is_token & inputs.is_open.any(-1)
    log_normalizer = jnp.where(has_choice, jax.nn.logsumexp(open_logits, axis=-1), 0.0)
    p = choice.probabilities
    bins = None
    if bias_bins:
        assert choice.scores is not None and asked is not None  # `route` refuses other rules
        bins = required_bias_bins(choice.scores, inputs, asked, bias_bins)
    per_token = _PerToken(
        is_token=is_token,
        chosen_ids=choice.expert_ids,
        kept_ids=kept_ids,
        gates=choice.gates,
        probabilities=p,
        entropy=-jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=-1),
        log_normalizer=log_normalizer,
        asked=None if asked is None else asked * is_token,
        load=choice.load,
        bins=bins,
    )
    sum_tokens = partial(_sum_tokens, num_null=choice.num_null, bias_bins=bias_bins)
    if num_groups is None:
        return sum_tokens(per_token)
    groups = jax.tree.map(lambda x: x.reshape(num_groups, -1, *x.shape[1:]), per_token)
    return jax.vmap(sum_tokens)(groups)


class _PerToken(NamedTuple):
    """What is summed, each array with a leading `[T]`."""

    is_token: Array
    chosen_ids: Array
    kept_ids: Array
    gates: Array
    probabilities: Array
    entropy: Array
    log_normalizer: Array
    asked: Array | None
    load: Array | None
    bins: Array | None


def _sum_tokens(tokens: _PerToken, num_null: int, bias_bins: int) -> RouterStats:
    num_experts = tokens.probabilities.shape[-1]
    is_chosen = tokens.chosen_ids[:, :, None] == jnp.arange(num_experts)[None, None, :]
    chosen = is_chosen.sum((0, 1), dtype=jnp.float32)
    kept = count_assignments(tokens.kept_ids, num_experts)
    num_true = num_experts - num_null
    dropped = (chosen - kept)[:num_true].sum()
    if num_null:
        chosen = chosen.at[num_true:].set(chosen[num_true:].mean())
    num_tokens = tokens.is_token.sum(dtype=jnp.float32)
    return RouterStats(
        chosen=chosen,
        kept=kept,
        prob_sums=tokens.probabilities.sum(0),
        entropy_sum=tokens.entropy.sum(),
        z_sum=jnp.square(tokens.log_normalizer).sum(),
        dropped_capacity=dropped,
        dropped_topology=jnp.float32(0) if tokens.asked is None else tokens.asked.sum(dtype=jnp.float32) - chosen.sum(),
        num_tokens=num_tokens,
        num_masked=tokens.is_token.shape[0] - num_tokens,
        gate_sums=jnp.where(is_chosen, tokens.gates[:, :, None], 0.0).sum((0, 1)),
        load_sums=chosen if tokens.load is None else tokens.load.sum(0),
        bias_histogram=None if tokens.bins is None else count_bins(tokens.bins, bias_bins),
    )
