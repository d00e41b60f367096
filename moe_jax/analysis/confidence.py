"""How sure the router is: entropy, top probability, and the margin that decides whether a choice flips.

The boundary margin, logit(k) - logit(k+1) of the sorted logits, is what a perturbation must overcome to change the
set of chosen experts; for K > 1 it says more than the margin of the first choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from numpy.typing import ArrayLike


def router_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the softmax over logits `[..., E]`, `[...]`; closed experts may be -inf."""
    return entr(jax.nn.softmax(jnp.asarray(logits, jnp.float32), -1)).sum(-1)


def top_probability(logits: jax.Array) -> jax.Array:
    """Largest softmax probability of logits `[..., E]`, `[...]`."""
    return jax.nn.softmax(jnp.asarray(logits, jnp.float32), -1).max(-1)


def boundary_margin(logits: jax.Array, num_choices: int) -> jax.Array:
    """Logit of the last chosen expert minus that of the first one left out.

    Args:
      logits: `[..., E]`.
      num_choices: K in `[1, E]`.

    Returns:
      `[...]` float32, never negative; +inf if K = E, where no expert is left to flip to.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if num_choices == logits.shape[-1]:
        return jnp.full(logits.shape[:-1], jnp.inf)
    top = jax.lax.top_k(logits, num_choices + 1)[0]
    return top[..., -2] - top[..., -1]


def token_mean(values: ArrayLike, token_mask: ArrayLike | None = None) -> np.ndarray:
    """Mean over counted tokens, `[L, T]` to `[L]` float64; NaN without tokens."""
    values = _counted(values, token_mask)
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def token_quantiles(values: ArrayLike, levels: Sequence[float], token_mask: ArrayLike | None = None) -> np.ndarray:
    """Quantiles over counted tokens, `[L, T]` to `[L, Q]` float64; NaN without tokens."""
    values = _counted(values, token_mask)
    if not values.shape[-1]:
        return np.full((*values.shape[:-1], len(levels)), np.nan)
    # "inverted_cdf" returns observed values, so an infinite margin is not interpolated into NaN.
    return np.moveaxis(np.quantile(values, levels, axis=-1, method="inverted_cdf"), 0, -1)


def fraction_within_margin(margins: ArrayLike, flip_margin: float, token_mask: ArrayLike | None = None) -> np.ndarray:
    """Share of counted tokens whose boundary margin `[L, T]` is below `flip_margin` (logit units), `[L]`."""
    return token_mean(np.asarray(margins) < flip_margin, token_mask)


def _counted(values: ArrayLike, token_mask: ArrayLike | None) -> np.ndarray:
    """Values `[..., T]` of the tokens that count, float64."""
    values = np.asarray(values, np.float64)
    return values if token_mask is None else values[..., np.asarray(token_mask, bool)]
