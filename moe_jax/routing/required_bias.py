"""Histograms of the bias that each expert would have needed: what quantile balancing reads, as sums.

With scores s, selection bias b and a_t the (K+1)-th largest of s_t + b (Kimi K3 technical report, section 2.3.3, eq.
13-14; first https://kexue.fm/archives/11619):

    r_te = a_t - s_te          the bias from which on expert e is among the choices of token t
    b_e <- the K/E quantile of r_te over tokens, then centred

With that bias, and everybody else's choices as they were, exactly T K / E tokens would take expert e. A quantile does
not add over micro-batches or devices and a mean of quantiles is not a quantile; counts in equal bins do add. For scores
in [0, 1], r lies between min(b) - 1 and max(b) + 1 (the report's appendix D), which is the range of the bins.
"""

import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED
from moe_jax.routing.select import biased
from moe_jax.types import Array, RoutingInputs


def required_bias(scores: Array, inputs: RoutingInputs, num_choices: Array) -> Array:
    """The bias r that each expert would have needed.

    Args:
      scores: `[T, E]` what the bias is added to.
      inputs: what the rule saw: its bias (None is zero) and open experts.
      num_choices: `[T]` int32 choices of each token.

    Returns:
      `[T, E]` float32; very negative on the open experts of a token that has no more of them than choices.
    """
    total = biased(scores, inputs)
    if inputs.is_open is not None:
        total = jnp.where(inputs.is_open, total, CLOSED)
    ordered = jnp.sort(jnp.pad(total, ((0, 0), (0, 1)), constant_values=CLOSED), axis=1, descending=True)
    return jnp.take_along_axis(ordered, num_choices[:, None], axis=1) - scores


def histogram_range(bias: Array) -> tuple[Array, Array]:
    """Lowest and highest edge of the bins, each `[...]`, for a bias `[..., E]`."""
    return bias.min(-1) - 1, bias.max(-1) + 1


def required_bias_bins(scores: Array, inputs: RoutingInputs, num_choices: Array, num_bins: int) -> Array:
    """Which bin each required bias falls into; what lies outside of the range counts in the outermost bins.

    Args:
      scores: `[T, E]`, as in `required_bias`.
      inputs: as in `required_bias`.
      num_choices: `[T]`, as in `required_bias`.
      num_bins: N, static.

    Returns:
      `[T, E]` int32 in `[0, N]`; N where the expert is closed, which no histogram counts.
    """
    low, high = histogram_range(jnp.zeros(scores.shape[1]) if inputs.bias is None else inputs.bias)
    place = (required_bias(scores, inputs, num_choices) - low) / (high - low) * num_bins
    bins = jnp.clip(jnp.floor(place), 0, num_bins - 1).astype(jnp.int32)
    return bins if inputs.is_open is None else jnp.where(inputs.is_open, bins, num_bins)


def count_bins(bins: Array, num_bins: int) -> Array:
    """`[E, N]` float32 histogram of each column of `bins [T, E]`."""
    num_experts = bins.shape[1]
    experts = jnp.broadcast_to(jnp.arange(num_experts)[None, :], bins.shape)
    return jnp.zeros((num_experts, num_bins)).at[experts, bins].add(1.0, mode="drop")


def histogram_quantile(histogram: Array, rank: Array, low: Array, high: Array) -> Array:
    """The value below which `rank` of the counted values lie, interpolated within its bin.

    Args:
      histogram: `[..., E, N]` counts.
      rank: `[...]`; a histogram of fewer values gives its highest one.
      low: `[...]` lowest edge.
      high: `[...]` highest edge.

    Returns:
      `[..., E]`, off by a bin's width at most; meaningless for an empty histogram.
    """
    num_bins = histogram.shape[-1]
    below = jnp.cumsum(histogram, axis=-1)
    rank = jnp.minimum(rank[..., None], below[..., -1])[..., None]
    index = jnp.argmax(below >= rank, axis=-1, keepdims=True)
    inside = jnp.take_along_axis(histogram, index, axis=-1)
    missing = rank - jnp.take_along_axis(below, index, axis=-1) + inside
    place = (index + missing / jnp.maximum(inside, 1.0))[..., 0] / num_bins
    return low[..., None] + (high - low)[..., None] * place
