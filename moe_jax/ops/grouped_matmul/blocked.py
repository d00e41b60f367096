"""Grouped matmul as a loop over filled blocks: exact in work, and the fast one on CPU.

For each expert that has rows, its weights are read once and its rows go through block by block. Block lengths form a
ladder, say (512, 128): an expert with 700 rows takes one long and two short blocks, so little is padding. The number of
iterations is dynamic: an empty expert costs nothing. The weight gradient of an expert grows in the loop's carry and is
written once.

The loops carry and multiply float32, also for bfloat16 operands: XLA's CPU backend updates a slice of a bfloat16 array
by converting all of it, every time (with a bfloat16 carry, 64 experts took 5 times as long).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.types import Array

_SHORTEST_LONG_BLOCK = 32
_LONGEST_BLOCK = 512


def block_ladder(num_rows: int, num_experts: int) -> tuple[int, int]:
    """Chooses two block lengths for a mean expert load: long blocks for the bulk, a quarter of that for the rest.

    The long one is the largest power of two within the mean load, between 32 and 512: longer gains a matmul nothing,
    shorter makes the loop's overhead show. The short one bounds the padding, to an eighth of the mean load on average.

    Args:
      num_rows: N.
      num_experts: E.

    Returns:
      The block lengths in rows, falling.
    """
    mean_load = max(num_rows // num_experts, 1)
    power_of_two = 1 << (mean_load.bit_length() - 1)
    long = min(max(power_of_two, _SHORTEST_LONG_BLOCK), _LONGEST_BLOCK)
    return long, long // 4


def loop_over_blocks(
    starts: Array,
    lengths: tuple[int, ...],
    load: Callable[[Array], Any],
    block: Callable[[Array, Array, int, Any, Any], tuple[Any, Any]],
    store: Callable[[Array, Any, Any], Any],
    carry: Any,
) -> Any:
    """Visits the experts that have rows, in order, and cuts the rows of each into blocks.

    Args:
      starts: `[E + 1]` int32 first row of each expert, and one past the last row of all.
      lengths: falling block lengths in rows.
      load: expert's index -> state, what is local to the expert.
      block: (first row of the block, one past the expert's last row, block length, carry, state) -> (carry, state). The
        last block of an expert may reach into the rows of the next.
      store: (expert's index, carry, state) -> carry, after the expert's last block.
      carry: the first carry.

    Returns:
      The last carry.
    """
    counts = jnp.diff(starts)
    busy = jnp.nonzero(counts > 0, size=counts.shape[0], fill_value=0)[0]

    def run_expert(i: Array, carry: Any) -> Any:
        index = busy[i]
        begin, end = starts[index], starts[index + 1]
        state = (carry, load(index))
        for length in lengths:
            rows = end - begin
            num_blocks = -(-rows // length) if length == lengths[-1] else rows // length

            def run_block(j: Array, state: tuple, begin: Array = begin, length: int = length) -> tuple:
                return block(begin + j * length, end, length, *state)

            state = jax.lax.fori_loop(0, num_blocks, run_block, state)
            begin += num_blocks * length
        return store(index, *state)

    return jax.lax.fori_loop(0, jnp.sum(counts > 0), run_expert, carry)


def forward(rows: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Multiplies the rows of each block by their expert's weights."""
    return _rows_pass(rows, weights, group_sizes, dtype, contracted=0)


def rows_gradient(output_grad: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Multiplies the rows of each block by their expert's transposed weights."""
    return _rows_pass(output_grad, weights, group_sizes, dtype, contracted=1)


def weights_gradient(rows: Array, output_grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Adds up `rows.T @ output_grad` over the blocks of each expert."""
    num_experts, num_rows = group_sizes.shape[0], rows.shape[0]
    shape = (rows.shape[1], output_grad.shape[1])
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)

    def block(begin: Array, end: Array, length: int, carry: Array, total: Array) -> tuple[Array, Array]:
        start, is_valid = _window(begin, end, length, num_rows)
        # Both sides are masked: a row of another expert may hold NaN, and 0 * NaN is NaN.
        left, right = (
            jnp.where(is_valid, jax.lax.dynamic_slice_in_dim(values, start, length), 0).astype(accumulator)
            for values in (rows, output_grad)
        )
        return carry, total + jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))

    return loop_over_blocks(
        _starts(group_sizes),
        _ladder(num_rows, num_experts),
        load=lambda index: jnp.zeros(shape, accumulator),
        block=block,
        store=lambda index, carry, total: jax.lax.dynamic_update_index_in_dim(carry, total, index, 0),
        carry=jnp.zeros((num_experts, *shape), accumulator),
    ).astype(dtype)


def _rows_pass(left: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype, contracted: int) -> Array:
    """Rows of `left` times their expert's weights, contracting the given axis of the expert's matrix."""
    num_rows, (num_experts, *widths) = left.shape[0], weights.shape
    dimensions = (((1,), (contracted,)), ((), ()))
    accumulator = jnp.promote_types(left.dtype, jnp.float32)

    def block(begin: Array, end: Array, length: int, output: Array, local: Array) -> tuple[Array, Array]:
        start, is_valid = _window(begin, end, length, num_rows)
        rows = jax.lax.dynamic_slice_in_dim(left, start, length).astype(accumulator)
        product = jax.lax.dot_general(rows, local, dimensions)
        before = jax.lax.dynamic_slice_in_dim(output, start, length)
        output = jax.lax.dynamic_update_slice_in_dim(output, jnp.where(is_valid, product, before), start, 0)
        return output, local

    return loop_over_blocks(
        _starts(group_sizes),
        _ladder(num_rows, num_experts),
        load=lambda index: jax.lax.dynamic_index_in_dim(weights, index, keepdims=False).astype(accumulator),
        block=block,
        store=lambda index, output, local: output,
        carry=jnp.zeros((num_rows, widths[1 - contracted]), accumulator),
    ).astype(dtype)


def _starts(group_sizes: Array) -> Array:
    """First row of each expert, and one past the last row of all."""
    return jnp.pad(jnp.cumsum(group_sizes, dtype=jnp.int32), (1, 0))


def _ladder(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """The block lengths, none longer than the array."""
    return tuple(min(length, num_rows) for length in block_ladder(num_rows, num_experts))


def _window(begin: Array, end: Array, length: int, num_rows: int) -> tuple[Array, Array]:
    """Where to read a block so that it stays inside the array, and which of its rows are the block's, `[length, 1]`."""
    start = jnp.minimum(begin, num_rows - length)
    rows = start + jnp.arange(length, dtype=jnp.int32)
    return start, ((rows >= begin) & (rows < end))[:, None]
