"""Choosing the next token from logits `[B, V]`: pure functions, every row by itself.

    repetition     logits of tokens already in the text: z / penalty where z > 0, z * penalty elsewhere   1909.05858
    temperature    z / temperature
    top-k          the k largest stay                                                                     1805.04833
    top-p          the fewest largest whose probabilities sum to p or more stay                           1904.09751
    min-p          those with at least min_p times the largest probability stay                           2407.01082

They apply in this order, which is that of `transformers`; then a token is drawn from the softmax of what stays. The
least logit that stays is found by bisection, since sorting a vocabulary takes XLA's CPU backend 20 times as long.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults draw from the model's own distribution.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, and then only the penalty below matters.
      top_k: tokens that stay; 0 for all.
      top_p: probability that stays, in (0, 1].
      min_p: the least probability that stays, relative to the largest, in [0, 1).
      repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0 and int(self.top_k) == self.top_k, "a whole number, at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0 is off)"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 is off)"),
        }
        for name, (is_allowed, expected) in ranges.items():
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)} must be {expected}")

    @property
    def settings(self) -> dict[str, int | float]:
        """What is on, by name. A program is compiled for the names; it takes the numbers as they come."""
        off = Sampling()
        values = {name: float(value) for name, value in vars(self).items() if value != getattr(off, name)}
        if not self.temperature:
            return {name: value for name, value in values.items() if name == "repetition_penalty"}
        if self.top_k:
            values["top_k"] = int(self.top_k)
        return values | {"temperature": float(self.temperature)}


GREEDY = Sampling(temperature=0.0)


def next_tokens(logits: Array, settings: Mapping[str, Array], keys: Array, is_present: Array | None) -> Array:
    """Draws a token for every row.

    Args:
      logits: `[B, V]` float32.
      settings: `Sampling.settings`; without a temperature the choice is greedy.
      keys: `[B]` PRNG keys, consumed; a greedy choice leaves them alone.
      is_present: `[B, V]` bool, the tokens of the text so far; needed with a repetition penalty.

    Returns:
      `[B]` int32 token ids.
    """
    if "repetition_penalty" in settings:
        assert is_present is not None  # kept whenever there is a penalty
        logits = penalize_repetition(logits, is_present, settings["repetition_penalty"])
    if "temperature" not in settings:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings["temperature"]
    for name, keep in FILTERS.items():
        if name in settings:
            logits = keep(logits, settings[name])
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def penalize_repetition(logits: Array, is_present: Array, penalty: float | Array) -> Array:
    """Makes the tokens of `is_present [B, V]` less likely, or more for a penalty below 1."""
    return jnp.where(is_present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, num_kept: int | Array) -> Array:
    """`[B, V]` with minus infinity below the k-th largest of a row; ties with it stay."""
    return _keep(logits, _largest_enough(logits, lambda is_kept: is_kept.sum(-1) >= num_kept))


def keep_top_p(logits: Array, probability: float | Array) -> Array:
    """`[B, V]` with minus infinity below the fewest largest whose probabilities reach the given sum; ties stay."""
    p = jax.nn.softmax(logits, axis=-1)
    return _keep(logits, _largest_enough(logits, lambda is_kept: jnp.where(is_kept, p, 0).sum(-1) >= probability))


def keep_min_p(logits: Array, ratio: float | Array) -> Array:
    """`[B, V]` with minus infinity where the probability is below `ratio` times the row's largest."""
    return _keep(logits, logits.max(-1, keepdims=True) + jnp.log(ratio))


def _keep(logits: Array, least: Array) -> Array:
    return jnp.where(logits >= least, logits, -jnp.inf)


def _largest_enough(logits: Array, is_enough: Callable[[Array], Array]) -> Array:
    """`[B, 1]`, the largest number such that enough stays of what is not below it, found bit by bit.

    Args:
      logits: `[B, V]` float32.
      is_enough: `[B, V]` bool, what stays, to `[B]` bool; once true, true for more.

    Returns:
      A logit of the row; something below all of them if nothing is enough.
    """
    top_bit = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >= top_bit, ~bits, bits | top_bit)  # unsigned integers in the order of the floats

    def try_bit(i: Array, least: Array) -> Array:
        raised = least | (top_bit >> i.astype(jnp.uint32))
        return jnp.where(is_enough(ordered >= raised[:, None]), raised, least)

    least = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(len(logits), jnp.uint32))[:, None]
    bits = jnp.where(least >= top_bit, least ^ top_bit, ~least)
    least = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(least), -jnp.inf, least)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
