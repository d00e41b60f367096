"""Products with weights in int8 or float8, by qwix (https://github.com/google/qwix); gradients as in full precision.

    y = s_x s_w (round(x / s_x) round(w / s_w)),   s = max |.| over the contracted axis / the type's largest number

One scale for each row of x and each column of w. The product of the rounded numbers is one of that type in the compiled
program, with sums in int32 or float32. Backward, rounding counts as identity (straight through, 1308.3432), and the
products are in the dtype of x: master weights and optimizer see nothing of it.

Only qwix's arithmetic is used. Its `quantize_model` replaces `jnp.einsum` and `lax.dot_general` while a module runs, so
it would take the router and attention too, and refuses an einsum of one operand.
"""

import functools
import importlib.util
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moe_jax.types import Array

Precision = Literal["full", "int8", "float8"]
TYPES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def check_precision(precision: str) -> None:
    """Refuses what cannot be done.

    Raises:
      ValueError: an unknown name; the message lists the known ones. A low precision without qwix installed.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
    if precision != "full" and importlib.util.find_spec("qwix") is None:
        raise ValueError(f'precision={precision!r} needs the package qwix: pip install "moe_jax[scale]"')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(rows: Array, matrix: Array, precision: Precision) -> Array:
    """A product of rounded numbers.

    Args:
      rows: `[N, D]`.
      matrix: `[D, F]` in the dtype of the rows.
      precision: "int8" or "float8".

    Returns:
      `[N, F]` in the dtype of the rows.
    """
    import qwix

    left = qwix.quantize(rows, TYPES[precision], channelwise_axes=(0,))
    right = qwix.quantize(matrix, TYPES[precision], channelwise_axes=(1,))
    return qwix.dot_general(left, right, (((1,), (0,)), ((), ()))).astype(rows.dtype)


def _forward(rows: Array, matrix: Array, precision: Precision) -> tuple[Array, tuple[Array, Array]]:
    return multiply(rows, matrix, precision), (rows, matrix)


def _backward(precision: Precision, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    del precision
    rows, matrix = kept
    return gradient @ matrix.T, rows.T @ gradient


multiply.defvjp(_forward, _backward)
