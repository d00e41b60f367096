"""Moving token rows to experts and back by gathers alone, in both passes.

Autodiff turns a gather's transpose into a scatter-add, which is slow on CPU and not deterministic on GPU. Both maps
here know their inverse, so their transposes are gathers too. With `a = assignments[r]`:

    take:     rows[r] = tokens[a // K]                         d_tokens[t] = sum_k d_rows[slots[t, k]]
    combine:  out[t]  = sum_k gates[t, k] * rows[slots[t, k]]  d_rows[r]   = gates.flat[a] * d_out[a // K]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def _gather_or_zero(values: Array, indices: Array) -> Array:
    """Takes along the leading axis; an index one past the end gives zero."""
    return values.at[indices].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_token_rows(tokens: Array, assignments: Array, slots: Array) -> Array:
    """Copies each token to the rows its assignments own.

    Args:
      tokens: `[T, D]`.
      assignments: `[R]` int32, the assignment (`t * K + k`) of each row; `T * K` marks an unused row, which is zero.
      slots: `[T, K]` int32, the row of each assignment; `R` marks an assignment without a row.

    Returns:
      `[R, D]` in the dtype of `tokens`.
    """
    return _gather_or_zero(tokens, assignments // slots.shape[1])


def _take_forward(tokens: Array, assignments: Array, slots: Array) -> tuple[Array, Array]:
    """Keeps the slots: they are the transposed gather."""
    return take_token_rows(tokens, assignments, slots), slots


def _take_backward(slots: Array, rows_grad: Array) -> tuple[Array, None, None]:
    """Sums each token's rows in float32."""
    tokens_grad = jnp.sum(_gather_or_zero(rows_grad, slots), axis=1, dtype=jnp.float32)
    return tokens_grad.astype(rows_grad.dtype), None, None


take_token_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def combine_rows(rows: Array, gates: Array, assignments: Array, slots: Array) -> Array:
    """Sums each token's expert rows, weighted by its gates.

    Args:
      rows: `[R, D]` expert outputs.
      gates: `[T, K]` float32.
      assignments: `[R]` int32, as in `take_token_rows`.
      slots: `[T, K]` int32, as in `take_token_rows`; an assignment without a row adds nothing.

    Returns:
      `[T, D]` float32.
    """
    return jnp.sum(gates[:, :, None] * _gather_or_zero(rows, slots), axis=1)


def _combine_forward(rows: Array, gates: Array, assignments: Array, slots: Array) -> tuple[Array, tuple]:
    """Keeps everything: each cotangent needs the other factor."""
    return combine_rows(rows, gates, assignments, slots), (rows, gates, assignments, slots)


def _combine_backward(residuals: tuple, out_grad: Array) -> tuple[Array, Array, None, None]:
    """Gathers the output's cotangent to the rows, and pairs it with the rows for the gates."""
    rows, gates, assignments, slots = residuals
    row_gates = _gather_or_zero(gates.reshape(-1), assignments)
    rows_grad = row_gates[:, None] * _gather_or_zero(out_grad, assignments // slots.shape[1])
    gates_grad = jnp.sum(out_grad[:, None, :] * _gather_or_zero(rows, slots), axis=2)
    return rows_grad.astype(rows.dtype), gates_grad.astype(gates.dtype), None, None


combine_rows.defvjp(_combine_forward, _combine_backward)
