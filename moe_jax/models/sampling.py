"""Choosing the next token from logits `[B, V]`: pure functions, a row by itself.

    repetition     logits of tokens already in the text: z / penalty where z > 0, z * penalty elsewhere   1909.05858
    temperature    z / temperature
    top-k          the k largest stay                                                                     1805.04833
    top-p          the fewest largest whose probabilities sum to p or more stay                           1904.09751
    min-p          those with at least min_p times the largest probability stay                           2407.01082

They apply in this order, which is that of `transformers`; then a token is drawn from the softmax of what stays.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; every default changes nothing.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, whatever the settings below except the penalty.
      top_k: tokens that stay; 0 for all.
      top_p: probability that stays, in (0, 1].
      min_p: the least probability that stays, relative to the largest, in [0, 1).
      repetition_penalty: above 1, tokens of the prompt or the text so far become less likely.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        is_allowed = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0 and int(self.top_k) == self.top_k,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p < 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        ranges = {
            "temperature": "at least 0 (0 is greedy)",
            "top_k": "a whole number, at least 0 (0 is off)",
            "top_p": "in (0, 1] (1 is off)",
            "min_p": "in [0, 1) (0 is off)",
            "repetition_penalty": "above 0 (1 is off)",
        }
        for name, is_fine in is_allowed.items():
            if not is_fine:
                raise ValueError(f"{name}={getattr(self, name)} must be {ranges[name]}")

    @property
    def settings(self) -> dict[str, float]:
        """What is on, by name: the structure that a program is compiled for, with numbers that it takes as they come.

        A greedy choice has no "temperature", and nothing that only matters beside one.
        """
        off = Sampling()
        values = {name: float(value) for name, value in vars(self).items() if value != getattr(off, name)}
        if "top_k" in values:
            values["top_k"] = int(self.top_k)
        if not self.temperature:
            return {name: value for name, value in values.items() if name == "repetition_penalty"}
        return values | {"temperature": float(self.temperature)}


GREEDY = Sampling(temperature=0.0)


def next_tokens(logits: Array, settings: Mapping[str, Array], keys: Array, is_present: Array | None) -> Array:
    """Draws a token for every row.

    Args:
      logits: `[B, V]` float32.
      settings: `Sampling.settings`, as numbers or scalar arrays.
      keys: `[B]` PRNG keys, consumed; a greedy choice leaves them alone.
      is_present: `[B, V]` bool, the tokens of the text so far; needed with a repetition penalty.

    Returns:
      `[B]` int32 token ids.
    """
    if "repetition_penalty" in settings:
        assert is_present is not None  # the generator keeps it whenever there is a penalty
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
    falling = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.clip(num_kept, 1, logits.shape[-1]) - 1
    return _keep(logits, jax.lax.dynamic_slice_in_dim(falling, last, 1, axis=-1))


def keep_top_p(logits: Array, probability: float | Array) -> Array:
    """`[B, V]` with minus infinity below the fewest largest whose probabilities reach the given sum; ties stay."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    reached_before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)[:, :-1]
    is_needed = jnp.pad(reached_before < probability, ((0, 0), (1, 0)), constant_values=True)
    return _keep(logits, jnp.min(jnp.where(is_needed, falling, jnp.inf), axis=-1, keepdims=True))


def keep_min_p(logits: Array, ratio: float | Array) -> Array:
    """`[B, V]` with minus infinity where the probability is below `ratio` times the row's largest."""
    return _keep(logits, logits.max(-1, keepdims=True) + jnp.log(ratio))


def _keep(logits: Array, least: Array) -> Array:
    return jnp.where(logits >= least, logits, -jnp.inf)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
