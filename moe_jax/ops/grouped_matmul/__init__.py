"""One matmul per expert over rows sorted by expert, with a VJP of our own and an implementation chosen per pass.

    out[n] = rows[n] @ weights[e]    e the expert that owns row n; zero where nobody does

    blocked     a loop over filled blocks: exact in work; the default on CPU
    einsum      blocks padded and batched: up to 1.5 times the FLOPs under any skew; the default on GPU, until measured
    ragged_dot  XLA's own: the default on TPU where it compiles to no dense product; dense on CPU, E times the FLOPs
    pallas      our own kernels through Triton, for GPU
    tokamax     Mosaic kernels of the optional package `tokamax`, for GPU
    megablox    JAX's own Pallas kernels for TPU

Each is a module with the three passes of `passes.PerPass` as functions. They mix freely: the best one differs by pass.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul.measured import Problem, choose, read_table
from moe_jax.ops.grouped_matmul.passes import PassFn, PerPass
from moe_jax.types import Array

# Modules of this package, imported on first use: Pallas takes a third of a second to load.
IMPLEMENTATIONS: dict[str, str] = {
    "blocked": "blocked",
    "einsum": "einsum",
    "ragged_dot": "ragged",
    "pallas": "pallas",
    "tokamax": "tokamax",
    "megablox": "megablox",
}


def grouped_matmul(rows: Array, weights: Array, group_sizes: Array, *, impl: str | PerPass | None = None) -> Array:
    """Multiplies each row by the matrix of the expert that owns it.

    Sums run in at least float32. Under `vmap`, members of the population run one after the other.

    Args:
      rows: `[N, D]` floating, sorted by expert; the first `group_sizes[0]` belong to expert 0, and so on.
      weights: `[E, D, F]` in the dtype of `rows`.
      group_sizes: `[E]` integers, at most N in sum. Rows past the sum belong to nobody: they may hold anything, their
        results are zero, and they get no gradient and give none.
      impl: a name of `IMPLEMENTATIONS` for all passes, a `PerPass` of names, or None for the fastest one measured on
        this device (see `measured.py`).

    Returns:
      `[N, F]` in the dtype of `rows`. Differentiable (reverse mode) in `rows` and `weights`.

    Raises:
      ValueError: for shapes or dtypes that do not fit, or an unknown name.
    """
    _check(rows, weights, group_sizes)
    num_rows, (num_experts, width, hidden) = rows.shape[0], weights.shape
    if 0 in (num_rows, num_experts, width, hidden):
        return jnp.zeros((num_rows, hidden), rows.dtype)
    if impl is None:
        device = jax.devices()[0]
        problem = Problem(device.device_kind, rows.dtype.name, num_rows, num_experts, width, hidden)
        impl = choose(problem, device.platform, read_table())
    passes = PerPass(impl, impl, impl) if isinstance(impl, str) else impl
    for name in passes:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"unknown grouped matmul {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    return _grouped_matmul(passes, rows, weights, group_sizes.astype(jnp.int32))


def _check(rows: Array, weights: Array, group_sizes: Array) -> None:
    """Refuses what cannot be meant."""
    is_fitting = (
        rows.ndim == 2
        and weights.ndim == 3
        and rows.shape[1] == weights.shape[1]
        and group_sizes.shape == weights.shape[:1]
    )
    if not is_fitting:
        raise ValueError(
            "expected rows [N, D], weights [E, D, F] and group_sizes [E], got "
            f"{rows.shape}, {weights.shape} and {group_sizes.shape}"
        )
    if rows.dtype != weights.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows and weights must share a floating dtype, got {rows.dtype} and {weights.dtype}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")


def load_pass(name: str, which: str) -> PassFn:
    """One pass of an implementation.

    Args:
      name: a key of `IMPLEMENTATIONS`.
      which: a field of `PerPass`.

    Returns:
      The function.
    """
    return getattr(importlib.import_module(f"{__name__}.{IMPLEMENTATIONS[name]}"), which)


def _run_pass(passes: PerPass, which: str, dtype: jnp.dtype, *operands: Array) -> Array:
    """One pass; `vmap` maps it sequentially, since not every kernel can be batched."""
    function = load_pass(getattr(passes, which), which)
    one_by_one = jax.custom_batching.sequential_vmap(lambda left, right, sizes: function(left, right, sizes, dtype))
    return one_by_one(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(passes: PerPass, rows: Array, weights: Array, group_sizes: Array) -> Array:
    """The forward pass, with the other two as its VJP."""
    return _run_pass(passes, "forward", rows.dtype, rows, weights, group_sizes)


def _forward(passes: PerPass, rows: Array, weights: Array, group_sizes: Array) -> tuple[Array, tuple]:
    """Keeps the operands."""
    return _grouped_matmul(passes, rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(passes: PerPass, residuals: tuple, output_grad: Array) -> tuple[Array, Array, None]:
    """The gradients of rows and weights; the sizes have none."""
    rows, weights, group_sizes = residuals
    rows_grad = _run_pass(passes, "rows_gradient", rows.dtype, output_grad, weights, group_sizes)
    weights_grad = _run_pass(passes, "weights_gradient", weights.dtype, rows, output_grad, group_sizes)
    return rows_grad, weights_grad, None


_grouped_matmul.defvjp(_forward, _backward)
