"""Capacity arithmetic: how many tokens an expert may take, and who is left out.

GShard (2006.16668) and Switch (2101.03961, eq. 3) give every expert `C = ceil(factor * T * K / E)` rows. First
choices are served before second choices (GShard's order), earlier tokens before later ones; whoever comes after
row C is dropped. Batch-prioritised routing (2106.05974, section 4) serves tokens by a priority instead. Released
models say C in other units and count it over other groups of tokens (`Capacity`).
"""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_order import rank_in_expert
from moe_jax.types import Array

CapacityUnit = Literal["balance", "share", "tokens"]


class Capacity(NamedTuple):
    """How many tokens an expert may take, and of which.

    Attributes:
      amount: in the unit.
      unit: "balance" is what perfectly balanced routing would give it (GShard, Switch), "share" all the tokens (1.0
        drops nothing), "tokens" one token.
      per_sequence: whether each sequence is served by itself; else all tokens of the batch together.
    """

    amount: float
    unit: CapacityUnit = "balance"
    per_sequence: bool = False

    def rows(self, num_tokens: int, num_experts: int, num_choices: int) -> int:
        """C: rounded up, at least 1 and at most T, where T is the length of a sequence if each is served by itself.

        Raises:
          ValueError: an amount that is not positive, or an unknown unit.
        """
        if self.unit == "balance":
            return expert_capacity(num_tokens, num_experts, num_choices, self.amount)
        if self.amount <= 0 or self.unit not in get_args(CapacityUnit):
            raise ValueError(
                f"capacity {self.amount} of unit {self.unit!r} must be positive and its unit one of "
                f"{', '.join(get_args(CapacityUnit))}; use None for dropless routing"
            )
        rows = self.amount * num_tokens if self.unit == "share" else self.amount
        return min(num_tokens, max(1, math.ceil(rows)))


def expert_capacity(num_tokens: int, num_experts: int, num_choices: int, factor: float) -> int:
    """Rows per expert: `ceil(factor * T * K / E)`, at least 1 and at most T.

    Args:
      num_tokens: T, masked tokens included since shapes are static.
      num_experts: E.
      num_choices: K.
      factor: 1.0 fits perfectly balanced routing; typical values are 1.0 to 2.0.
    """
    if factor <= 0:
        raise ValueError(f"capacity factor must be positive, got {factor}; use None for dropless routing")
    return min(num_tokens, max(1, math.ceil(factor * num_tokens * num_choices / num_experts)))


def drop_over_capacity(
    expert_ids: Array, num_experts: int, capacity: int, priority: Array | None = None, num_groups: int = 1
) -> Array:
    """Replaces by the sentinel `E` every assignment beyond its expert's capacity.

    Args:
      expert_ids: `[T, K]` int32 in `[0, E]`.
      num_experts: E.
      capacity: C, static.
      priority: `[T]` float32; among choices of one rank, tokens with a higher one are served first, ties by position.
        None serves by position.
      num_groups: n, static; each of n equal runs of tokens is served by itself and has C rows per expert.

    Returns:
      `[T, K]` int32 with at most C assignments per expert and group; empty slots take no capacity.
    """
    if num_groups > 1:
        groups = jax.tree.map(lambda x: x.reshape(num_groups, -1, *x.shape[1:]), (expert_ids, priority))
        kept = jax.vmap(lambda ids, first: drop_over_capacity(ids, num_experts, capacity, first))(*groups)
        return kept.reshape(expert_ids.shape)
    num_tokens, num_choices = expert_ids.shape
    order = None if priority is None else jnp.argsort(-priority, stable=True)
    served = expert_ids if order is None else expert_ids[order]
    by_choice = served.T.reshape(-1)  # (T, K) -> (K*T,): first choices of all tokens come first
    rank, _ = rank_in_expert(by_choice, num_experts)
    kept = jnp.where(rank < capacity, by_choice, num_experts).reshape(num_choices, num_tokens).T
    return kept if order is None else jnp.zeros_like(kept).at[order].set(kept, unique_indices=True)
