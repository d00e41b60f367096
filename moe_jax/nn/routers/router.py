"""What a router module is: it owns the parameters of a score, and gives every expert a logit for every token."""

from typing import NamedTuple, Protocol

import jax

from moe_jax.types import Array


class RouterLogits(NamedTuple):
    """What a router module gives: `logits [B, S, E]` float32, and the standard deviation of their noise, if learned."""

    logits: Array
    noise_scale: Array | None = None


class Router(Protocol):
    """Called as `router(x [B, S, D], token_mask [B, S] or None, key or None)`.

    It computes in float32 whatever comes in (Switch 2101.03961, section 2.4). No unmasked token's logits depend on a
    masked token, a later token or another sequence. Without a key nothing is random.
    """

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores `[B, S, D]`; see the class."""


def draw_kernel(key: Array, rows: int, columns: int) -> Array:
    """A matrix `[rows, columns]` from N(0, 1/rows), so that inputs of unit variance give outputs of unit variance."""
    return jax.random.normal(key, (rows, columns)) * rows**-0.5
