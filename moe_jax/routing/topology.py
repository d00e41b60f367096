"""Topology masks: which experts a token group may use, and how many of them.

The mask acts before selection, so a token's gates are normalised over the experts that it can really reach.
"""

import jax.numpy as jnp

from moe_jax.types import Array, Topology


def full_topology(num_layers: int, num_experts: int, num_choices: int) -> Topology:
    """The topology that changes nothing: one group, every expert open, K choices.

    Returns:
      `keep [L, 1, E]` all true and `num_choices [L, 1]` all K.
    """
    return Topology(
        keep=jnp.ones((num_layers, 1, num_experts), bool),
        num_choices=jnp.full((num_layers, 1), num_choices, jnp.int32),
    )


def single_topology(keep: Array, num_choices: Array) -> Topology:
    """One topology for all tokens, from `keep [L, E]` and `num_choices [L]`."""
    return Topology(keep=jnp.asarray(keep, bool)[:, None, :], num_choices=jnp.asarray(num_choices, jnp.int32)[:, None])


def population_topology(keep: Array, num_choices: Array) -> Topology:
    """A population as token groups, from `keep [P, L, E]` and `num_choices [P, L]`; group p is candidate p."""
    return Topology(
        keep=jnp.swapaxes(jnp.asarray(keep, bool), 0, 1),  # (P, L, E) -> (L, P, E)
        num_choices=jnp.asarray(num_choices, jnp.int32).T,
    )


def open_experts(topology: Topology, token_groups: Array | None, num_tokens: int) -> tuple[Array, Array]:
    """Spreads one layer's topology over tokens.

    Args:
      topology: one layer: `keep [G, E]`, `num_choices [G]`.
      token_groups: `[T]` int32 group of every token, or None when G is 1.
      num_tokens: T.

    Returns:
      is_open: `[T, E]` bool.
      limit: `[T]` int32, the choices a token may make.

    Raises:
      ValueError: several groups, but nothing that says which token is in which.
    """
    num_groups, num_experts = topology.keep.shape
    if token_groups is None:
        if num_groups != 1:
            raise ValueError(f"a topology of {num_groups} token groups needs token_groups [T]; got None")
        return (
            jnp.broadcast_to(topology.keep, (num_tokens, num_experts)),
            jnp.broadcast_to(topology.num_choices, (num_tokens,)),
        )
    return topology.keep[token_groups], topology.num_choices[token_groups]
