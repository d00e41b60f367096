"""Grouped matmul as one batched matmul over blocks: exact, dropless, without a loop or a kernel of our own.

Each expert's rows are padded to whole blocks, and each block meets a copy of its expert's weights. Shapes are static:
there are always `M = (N + E * (b - 1)) // b` blocks of `b` rows. With `b` the largest power of two within half the mean
load N / E (1 when that is less), FLOPs are at most 1.5 times the ideal under any skew. The copies of weights, or of
their gradients in float32, take `M * D * F` numbers; M is below 5 E, and is N where experts see less than 4 rows.

The weight gradient adds the blocks of one expert with `segment_sum`: on GPU their order, and so the last bit, is the
hardware's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul.passes import RowBlocks, cut_into_blocks
from moe_jax.types import Array


def block_length(num_rows: int, num_experts: int) -> int:
    """The largest power of two within half the mean load, at least 1."""
    return 1 << max((num_rows // (2 * num_experts)).bit_length() - 1, 0)


def forward(rows: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Multiplies each block by its expert's weights."""
    return _rows_pass("MbD,MDF->MbF", rows, weights, group_sizes, dtype)


def rows_gradient(output_grad: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Multiplies each block by its expert's transposed weights."""
    return _rows_pass("MbF,MDF->MbD", output_grad, weights, group_sizes, dtype)


def weights_gradient(rows: Array, output_grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Contracts each block over its rows, then adds the blocks of each expert."""
    num_experts = group_sizes.shape[0]
    length = block_length(rows.shape[0], num_experts)
    blocks = cut_into_blocks(group_sizes, rows.shape[0], length)
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    products = jnp.einsum(
        "MbD,MbF->MDF",
        _gather(rows, blocks, length),
        _gather(output_grad, blocks, length),
        preferred_element_type=accumulator,
    )
    return jax.ops.segment_sum(products, blocks.expert, num_experts, indices_are_sorted=True).astype(dtype)


def _rows_pass(equation: str, left: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """Blocks times weights, and the rows of the result back in their order."""
    num_rows = left.shape[0]
    length = block_length(num_rows, weights.shape[0])
    blocks = cut_into_blocks(group_sizes, num_rows, length)
    accumulator = jnp.promote_types(left.dtype, jnp.float32)
    products = jnp.einsum(
        equation, _gather(left, blocks, length), weights[blocks.expert], preferred_element_type=accumulator
    ).astype(dtype)
    products = products.reshape(-1, products.shape[-1])  # [M, b, F] -> [M*b, F]
    return products.at[blocks.row_slots].get(mode="fill", fill_value=0)


def _gather(rows: Array, blocks: RowBlocks, length: int) -> Array:
    """Rows `[N, D]` as blocks `[M, b, D]`, zero where a block is not filled."""
    indices = blocks.begin[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    indices = jnp.where(indices < blocks.end[:, None], indices, rows.shape[0])
    return rows.at[indices].get(mode="fill", fill_value=0)
