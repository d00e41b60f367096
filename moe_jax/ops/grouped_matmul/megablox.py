"""Grouped matmul by JAX's megablox kernels for TPU (`jax.experimental.pallas.ops.tpu.megablox`).

They want the rows in whole tiles and each row to have an owner: rows are padded, and nobody's rows go, as zeros, to the
last expert. NOT RUN ON A TPU: in interpret mode (used on CPU) they equal the oracle, and XLA's TPU compiler, given the
description of a v5e, compiles them. The tiles are not tuned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul.passes import owned_rows
from moe_jax.types import Array

_TILES = (128, 128, 128)  # rows, contracted width, other width; in the weight gradient rows, D, F


def forward(rows: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`gmm` with the weights as they are."""
    return _rows_pass(rows, weights, group_sizes, dtype, is_transposed=False)


def rows_gradient(output_grad: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`gmm` with the weights transposed."""
    return _rows_pass(output_grad, weights, group_sizes, dtype, is_transposed=True)


def weights_gradient(rows: Array, output_grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`tgmm`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    left, sizes = _whole_tiles(rows, group_sizes)
    right, _ = _whole_tiles(output_grad, group_sizes)
    return tgmm(left.T, right, sizes, dtype, _TILES, interpret=jax.default_backend() == "cpu")


def _rows_pass(left: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype, is_transposed: bool) -> Array:
    """Rows of `left` times their expert's weights."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    padded, sizes = _whole_tiles(left, group_sizes)
    product = gmm(
        padded, weights, sizes, dtype, _TILES, transpose_rhs=is_transposed, interpret=jax.default_backend() == "cpu"
    )
    return product[: left.shape[0]]


def _whole_tiles(rows: Array, group_sizes: Array) -> tuple[Array, Array]:
    """Rows in whole tiles, nobody's zeroed and given to the last expert."""
    padding = -rows.shape[0] % _TILES[0]
    padded = jnp.pad(owned_rows(rows, group_sizes), ((0, padding), (0, 0)))
    return padded, group_sizes.at[-1].add(padded.shape[0] - jnp.sum(group_sizes))
