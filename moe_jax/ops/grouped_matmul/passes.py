"""The nouns of the grouped matmul: its three passes, and which rows belong to which expert.

Rows are sorted by expert. Expert `e` owns `group_sizes[e]` of them, after those of the experts before it; the rows past
`sum(group_sizes)` belong to nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.types import Array


class PerPass(NamedTuple):
    """An implementation's name for each pass.

    With `e` the expert of row `n`:

    Attributes:
      forward: rows `[N, D]`, weights `[E, D, F]` -> `[N, F]`; `out[n] = rows[n] @ weights[e]`.
      rows_gradient: output gradient `[N, F]`, weights `[E, D, F]` -> `[N, D]`; `d_rows[n] = d_out[n] @ weights[e].T`.
      weights_gradient: rows `[N, D]`, output gradient `[N, F]` -> `[E, D, F]`; `d_weights[e]` is the sum over the rows
        of `e` of `outer(rows[n], d_out[n])`.
    """

    forward: str
    rows_gradient: str
    weights_gradient: str


# (left, right, group_sizes [E] int32, dtype of the result) -> result; sums in at least float32, and nobody's rows of
# either operand may hold anything: their results are zero, and they add nothing.
PassFn = Callable[[Array, Array, Array, jnp.dtype], Array]


class RowBlocks(NamedTuple):
    """Rows cut into blocks, no block shared by two experts.

    Attributes:
      expert: `[M]` int32 owner of each block; a block beyond the last has `begin == end`.
      begin: `[M]` int32 first row.
      end: `[M]` int32, one past the expert's last row; a block holds the rows up to `end`, at most its length.
      row_slots: `[N]` int32 place of each row in the blocks laid end to end, `M * length` for nobody's rows.
    """

    expert: Array
    begin: Array
    end: Array
    row_slots: Array


def expert_of_rows(group_sizes: Array, num_rows: int) -> Array:
    """The owner of each row.

    Args:
      group_sizes: `[E]` int32 rows per expert.
      num_rows: N.

    Returns:
      `[N]` int32 in `[0, E]`; `E` marks nobody's rows.
    """
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(group_sizes), rows, side="right", method="compare_all").astype(jnp.int32)


def owned_rows(values: Array, group_sizes: Array) -> Array:
    """`values [N, ...]` with nobody's rows set to zero."""
    is_owned = jnp.arange(values.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(is_owned.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def cut_into_blocks(group_sizes: Array, num_rows: int, length: int) -> RowBlocks:
    """Cuts every expert's rows into blocks; the number of blocks is the largest that any routing can need.

    Args:
      group_sizes: `[E]` int32 rows per expert.
      num_rows: N.
      length: rows of a block.

    Returns:
      `M = (N + E * (length - 1)) // length` blocks.
    """
    num_experts = group_sizes.shape[0]
    num_blocks = (num_rows + num_experts * (length - 1)) // length
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    blocks = -(-group_sizes // length)
    first_block = jnp.cumsum(blocks) - blocks
    owner = expert_of_rows(blocks, num_blocks)
    expert = jnp.minimum(owner, num_experts - 1)
    begin = starts[expert] + (jnp.arange(num_blocks, dtype=jnp.int32) - first_block[expert]) * length
    end = ends[expert]
    begin = jnp.where(owner < num_experts, begin, end)

    row_owner = expert_of_rows(group_sizes, num_rows)
    row_expert = jnp.minimum(row_owner, num_experts - 1)
    rank = jnp.arange(num_rows, dtype=jnp.int32) - starts[row_expert]
    row_slots = jnp.where(row_owner < num_experts, first_block[row_expert] * length + rank, num_blocks * length)
    return RowBlocks(expert, begin, end, row_slots)
