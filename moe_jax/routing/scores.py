"""Score functions: from logits to what a rule compares. Each row is computed over the open experts only.

    softmax        s_e = exp(z_e) / sum exp(z)        Shazeer (1701.06538), Switch (2101.03961)
    sigmoid        s_e = 1 / (1 + exp(-z_e))          DeepSeek-V3 (2412.19437, eq. 15)
    sqrt_softplus  s_e = sqrt(log(1 + exp(z_e)))      DeepSeek-V4

Softmax makes experts compete; the other two score each by itself, and their probabilities are the scores over their
sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.types import Array

# Finite, so that a row with no open expert stays free of NaN; exp of it is exactly 0 in float32.
CLOSED = -1e30


def score(name: str, logits: Array, is_open: Array | None) -> Array:
    """Scores of the open experts.

    Args:
      name: a key of `SCORES`.
      logits: `[T, E]` float32.
      is_open: `[T, E]` bool, or None for all open.

    Returns:
      `[T, E]` float32, never negative; closed experts, and rows with none open, get exactly 0.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in SCORES:
        raise ValueError(f"unknown score function {name!r}; known: {', '.join(SCORES)}")
    if is_open is None:
        return SCORES[name](logits)
    return SCORES[name](jnp.where(is_open, logits, CLOSED)) * is_open


def normalize(scores: Array, least: float = 0.0) -> Array:
    """Scores `[..., N]`, never negative, over their sum along the last axis, or over `least`; a row of zeros stays."""
    total = scores.sum(-1, keepdims=True)
    if least:
        return scores / jnp.maximum(total, least)
    return scores / jnp.where(total > 0, total, 1.0)


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits, axis=-1)


def _sqrt_softplus(logits: Array) -> Array:
    """The root's slope at 0 is infinite, so an underflowed softplus (z below -100) is 0 without gradient."""
    positive = jax.nn.softplus(logits)
    return jnp.where(positive > 0, jnp.sqrt(jnp.where(positive > 0, positive, 1.0)), 0.0)


SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": _softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}
