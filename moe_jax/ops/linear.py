"""Matrix products with weights, also for a single row, where the time is that of reading the weights."""

import jax.numpy as jnp

from moe_jax.ops.low_precision import Precision, multiply
from moe_jax.types import Array

# XLA's CPU backend gives every 2 MiB of a matrix-vector product a thread of its own, and so runs the small ones of a
# decoded token on one core. In parts, which are a batch, they run on several.
PARTS = 4
LARGE = 8 * 2**20  # bytes from which the product has as many threads without


def linear(x: Array, weights: Array, *, dtype: jnp.dtype | None = None, precision: Precision = "full") -> Array:
    """`x [..., D]` times `weights [D, ...]`.

    Args:
      x: `[..., D]`.
      weights: `[D, ...]` in x's dtype.
      dtype: of sums and result; None for x's.
      precision: of the factors, "full" for x's; see `ops.low_precision`.

    Returns:
      The leading axes of x, then the trailing ones of the weights.
    """
    width = x.shape[-1]
    rows, matrix = x.reshape(-1, width), weights.reshape(width, -1)
    if precision != "full":
        y = multiply(rows, matrix, precision)
    elif len(rows) == 1 and width % PARTS == 0 and matrix.nbytes < LARGE:
        operands = (rows.reshape(PARTS, 1, -1), matrix.reshape(PARTS, width // PARTS, -1))
        parts = jnp.einsum("prd,pdf->prf", *operands, preferred_element_type=dtype)
        y = sum(parts[1:], start=parts[0])  # not a reduction, for which XLA would call a library and wait
    else:
        y = jnp.matmul(rows, matrix, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], *weights.shape[1:])
