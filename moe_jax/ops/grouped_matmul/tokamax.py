"""Grouped matmul by the Mosaic kernels of `tokamax` (an optional package; written against 0.0.12 with JAX 0.10).

Of tokamax only the Mosaic kernels are used. Its Triton kernel for the weight gradient adds, in 0.0.12, the last rows of
the expert before to the gradient of an expert without rows (seen in interpret mode), and reads before its input if that
is the first expert. Rows that belong to nobody are left unwritten there, so they are masked here.

NOT RUN ON A GPU. On CPU tokamax's XLA implementation takes the kernels' place: right, and dense. XLA's GPU compiler,
given the description of an H100, compiles the three Mosaic kernels.
"""

from __future__ import annotations

import importlib
import sys

import jax
import jax.numpy as jnp
from absl import flags
from jax.lax import RaggedDotDimensionNumbers

from moe_jax.ops.grouped_matmul.passes import owned_rows
from moe_jax.ops.grouped_matmul.ragged import FORWARD, ROWS_GRADIENT, WEIGHTS_GRADIENT
from moe_jax.types import Array


def forward(rows: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, D], [E, D, F] -> [N, F]`."""
    return owned_rows(_ragged_dot(rows, weights, group_sizes, FORWARD, dtype), group_sizes)


def rows_gradient(output_grad: Array, weights: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, F], [E, D, F] -> [N, D]`; tokamax transposes the weights in memory."""
    return owned_rows(_ragged_dot(output_grad, weights, group_sizes, ROWS_GRADIENT, dtype), group_sizes)


def weights_gradient(rows: Array, output_grad: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """`[N, D], [N, F] -> [E, D, F]`."""
    rows, output_grad = owned_rows(rows, group_sizes), owned_rows(output_grad, group_sizes)  # 0 * NaN is NaN
    gradient = _ragged_dot(rows, output_grad, group_sizes, WEIGHTS_GRADIENT, dtype)
    return jnp.where((group_sizes > 0)[:, None, None], gradient, 0)


def _ragged_dot(
    left: Array, right: Array, group_sizes: Array, dimensions: RaggedDotDimensionNumbers, dtype: jnp.dtype
) -> Array:
    """The product; tokamax's kernels add up in float32."""
    try:
        tokamax = importlib.import_module("tokamax")
    except ImportError as error:
        raise ImportError('impl="tokamax" needs the package: pip install tokamax==0.0.12 (JAX 0.10)') from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # otherwise tokamax parses the command line itself and dies of anybody's options
    kernels = "xla" if jax.default_backend() == "cpu" else "mosaic"
    return tokamax.ragged_dot_general(
        left, right, group_sizes, dimensions, preferred_element_type=dtype, implementation=kernels
    )
