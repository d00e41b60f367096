"""How evenly the experts are loaded, and how uneven a perfectly uniform router would look.

With counts `c_e`, mean `m = mean_e c_e` and shares `f_e = c_e / sum(c)`:

    coefficient of variation  std(c) / m                       Jain fairness      (sum c)^2 / (E sum c^2)
    Gini                      sum_i (2i - E - 1) c_(i) / (E sum c)   MaxVio       max(c) / m - 1     (2408.15664)
    load entropy              -sum f ln f / ln E               effective experts  exp(-sum f ln f)

All are 0/0 without assignments and return NaN there: no data is not balance. They take `[..., E]`, return `[...]`,
and run on JAX or NumPy arrays, under jit and vmap.

A router that picks K distinct experts uniformly for each of T independent tokens gives every expert a count that is
Binomial(T, K/E), so even a perfect router shows imbalance. `uniform_load_band` is the exact band of that noise and
`expected_imbalance` its size in the measures above. Tokens of one document resemble each other, so the real noise is
larger: `document_load_interval` resamples whole documents.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from numpy.typing import ArrayLike
from scipy import special

Verdict = Literal["alive", "dead", "unknown"]


class Imbalance(NamedTuple):
    """Measures of imbalance, each 0 for a perfectly even load."""

    coefficient_of_variation: float
    gini: float
    max_violation: float


def load_fractions(counts: jax.typing.ArrayLike) -> jax.Array:
    """Turns counts `[..., E]` into shares of all assignments `[..., E]` that sum to 1."""
    counts = jnp.asarray(counts, jnp.float32)
    return counts / counts.sum(-1, keepdims=True)


def coefficient_of_variation(counts: jax.typing.ArrayLike) -> jax.Array:
    """Standard deviation of the counts `[..., E]` over their mean, `[...]`."""
    counts = jnp.asarray(counts, jnp.float32)
    return counts.std(-1) / counts.mean(-1)


def gini(counts: jax.typing.ArrayLike) -> jax.Array:
    """Gini coefficient of the counts `[..., E]`: 0 if even, (E - 1) / E if one expert has all, `[...]`."""
    counts = jnp.sort(jnp.asarray(counts, jnp.float32), -1)
    num_experts = counts.shape[-1]
    ranks = (2 * jnp.arange(1, num_experts + 1) - num_experts - 1).astype(jnp.float32)
    return jnp.einsum("...e,e->...", counts, ranks) / (num_experts * counts.sum(-1))


def max_over_mean_load(counts: jax.typing.ArrayLike) -> jax.Array:
    """Load of the busiest expert in units of the mean load, `[..., E]` to `[...]`, in `[1, E]`."""
    counts = jnp.asarray(counts, jnp.float32)
    return counts.max(-1) / counts.mean(-1)


def max_violation(counts: jax.typing.ArrayLike) -> jax.Array:
    """MaxVio of the counts `[..., E]`: how far the busiest expert exceeds the mean load, `[...]` (2408.15664)."""
    return max_over_mean_load(counts) - 1


def effective_experts(counts: jax.typing.ArrayLike) -> jax.Array:
    """Number of evenly loaded experts with the same load entropy, `[..., E]` to `[...]`, in `[1, E]`."""
    return jnp.exp(entr(load_fractions(counts)).sum(-1))


def normalised_load_entropy(counts: jax.typing.ArrayLike) -> jax.Array:
    """Entropy of the load over its maximum ln E, `[..., E]` to `[...]`; 1 if even. A single expert is even."""
    num_experts = jnp.shape(counts)[-1]
    if num_experts == 1:
        return jnp.ones_like(load_fractions(counts)[..., 0])
    return entr(load_fractions(counts)).sum(-1) / jnp.log(jnp.float32(num_experts))


def jain_fairness(counts: jax.typing.ArrayLike) -> jax.Array:
    """Jain's fairness index of the counts `[..., E]`, 1 / (1 + CV^2): 1 if even, 1 / E at worst, `[...]`."""
    counts = jnp.asarray(counts, jnp.float32)
    return counts.sum(-1) ** 2 / (counts.shape[-1] * (counts**2).sum(-1))


def uniform_load_band(
    num_tokens: int, num_experts: int, num_choices: int, *, level: float = 0.95, num_layers: int = 1
) -> tuple[int, int]:
    """Counts that a uniform router gives all experts of all layers at once with probability at least `level`.

    Exact quantiles of Binomial(T, K/E), with the error `1 - level` shared by the `2 * E * L` tails (Bonferroni).

    Args:
      num_tokens: T, taken as independent.
      num_experts: E.
      num_choices: K distinct experts per token.
      level: family-wise level in (0, 1).
      num_layers: L, layers judged together.

    Returns:
      Lowest and highest count inside the band.
    """
    tail = (1 - level) / (2 * num_experts * num_layers)
    low, high = (_binomial_quantile(p, num_tokens, num_choices / num_experts) for p in (tail, 1 - tail))
    return low, high


def _binomial_quantile(probability: float, num_trials: int, success: float) -> int:
    """Smallest count whose cumulative probability reaches `probability`."""
    if num_trials == 0 or success >= 1:
        return num_trials
    guess = max(int(np.ceil(special.bdtrik(probability, num_trials, success))), 0)
    while guess > 0 and special.bdtr(guess - 1, num_trials, success) >= probability:
        guess -= 1
    return guess


def expected_imbalance(num_tokens: int, num_experts: int, num_choices: int) -> Imbalance:
    """Imbalance to expect of a uniform router by chance alone, in the normal limit of many tokens per expert.

    With `s = sqrt((E - K) / (T K))`, the relative spread of Binomial(T, K/E): CV is s; counts that sum to a constant
    have correlation -1 / (E - 1), hence Gini `s sqrt((E - 1) / E) / sqrt(pi)` and MaxVio `s sqrt(E / (E - 1))` times
    the expected maximum of E standard normals (Blom's approximation).

    Args:
      num_tokens: T, at least 1.
      num_experts: E.
      num_choices: K distinct experts per token.

    Returns:
      The expected value of each measure.
    """
    if num_choices >= num_experts:
        return Imbalance(0.0, 0.0, 0.0)
    spread = np.sqrt((num_experts - num_choices) / (num_tokens * num_choices))
    expected_maximum = special.ndtri((num_experts - 0.375) / (num_experts + 0.25))
    return Imbalance(
        float(spread),
        float(spread * np.sqrt((num_experts - 1) / (num_experts * np.pi))),
        float(spread * np.sqrt(num_experts / (num_experts - 1)) * expected_maximum),
    )


def document_load_interval(
    document_counts: ArrayLike, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of each expert's share of the load, resampling documents with replacement.

    Args:
      document_counts: `[N, ..., E]` assignments by document, as `group_expert_counts` gives.
      level: level of each interval (pointwise, not family-wise).
      num_resamples: bootstrap draws.
      seed: seed of the draws.

    Returns:
      Lower and upper ends, each `[..., E]` float64; NaN where no document has an assignment.
    """
    document_counts = np.asarray(document_counts, np.float64)
    num_documents = len(document_counts)
    if not num_documents:
        undefined = np.full(document_counts.shape[1:], np.nan)
        return undefined, undefined
    weights = np.random.default_rng(seed).multinomial(
        num_documents, np.full(num_documents, 1 / num_documents), num_resamples
    )
    resampled = np.tensordot(weights.astype(np.float64), document_counts, 1)  # [R, ..., E]
    totals = resampled.sum(-1, keepdims=True)
    shares = np.divide(resampled, totals, out=np.full_like(resampled, np.nan), where=totals > 0)
    return np.quantile(shares, (1 - level) / 2, axis=0), np.quantile(shares, (1 + level) / 2, axis=0)


def dead_expert_verdicts(
    counts: ArrayLike, num_tokens: int, num_choices: int, *, alpha: float = 0.01
) -> list[list[Verdict]]:
    """Says which experts are dead, where the window is long enough to say so.

    Under uniform routing an expert stays unused with probability about exp(-TK/E). An unused expert is "dead" if
    `T K / E >= ln(E L / alpha)`, which keeps the chance of calling any live expert dead below alpha; in a shorter
    window silence proves nothing and the verdict is "unknown".

    Args:
      counts: `[L, E]` assignments in the window.
      num_tokens: T, tokens in the window.
      num_choices: K.
      alpha: family-wise error over all `L * E` experts.

    Returns:
      `[L][E]` verdicts.
    """
    counts = np.asarray(counts)
    num_layers, num_experts = counts.shape
    is_conclusive = num_tokens * num_choices / num_experts >= np.log(num_experts * num_layers / alpha)
    unused: Verdict = "dead" if is_conclusive else "unknown"
    return [["alive" if count > 0 else unused for count in layer] for layer in counts]
