"""Grouped matmul by `jax.lax.ragged_dot_general`: XLA's own, native on TPU.

On CPU, XLA expands it to a masked product over all experts, E times the FLOPs; on GPU it may. So it is never a default
on CPU, and elsewhere only after `ops.expansion` has found no expansion (see `measured.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from moe_jax.ops.grouped_matmul.passes import owned_rows
from moe_jax.types import Array

# Contracted axes of left and right, ragged axis of left, group axis of right; lists, as tokamax compares with its own.
FORWARD = RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
ROWS_GRADIENT = RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
WEIGHTS_GRADIENT = RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def forward(rows: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, D], [E, D, F] -> [N, F]`."""
    return owned_rows(_ragged_dot(rows, weights, group_sizes, FORWARD, dtype), group_sizes)


def rows_gradient(output_grad: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, F], [E, D, F] -> [N, D]`."""
    return owned_rows(_ragged_dot(output_grad, weights, group_sizes, ROWS_GRADIENT, dtype), group_sizes)


def weights_gradient(rows: Array, output_grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, D], [N, F] -> [E, D, F]`."""
    rows, output_grad = owned_rows(rows, group_sizes), owned_rows(output_grad, group_sizes)  # 0 * NaN is NaN
    return _ragged_dot(rows, output_grad, group_sizes, WEIGHTS_GRADIENT, dtype)


def _ragged_dot(
    left: Array, right: Array, group_sizes: Array, dimensions: RaggedDotDimensionNumbers, dtype: jnp.dtype
) -> Array:
    """The product, summed in at least float32."""
    accumulator = jnp.promote_types(left.dtype, jnp.float32)
    product = jax.lax.ragged_dot_general(left, right, group_sizes, dimensions, preferred_element_type=accumulator)
    return product.astype(dtype)
