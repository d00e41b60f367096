"""Grouped matmul as Pallas kernels, lowered through Triton: two kernels of our own for GPUs.

    rows      a program multiplies a block of one expert's rows by a column strip of its weights; serves the forward
              pass and, reading the weights transposed, the rows' gradient
    weights   a program owns one tile of one expert's weight gradient and loops over that expert's rows

Every program owns what it writes: nothing is added atomically, and the order of programs does not matter. Experts' rows
are cut into blocks beforehand; their number is static, and the programs of surplus blocks return at once.

NOT RUN ON A GPU. In interpret mode (the default on CPU) the kernels equal the oracle. XLA's GPU compiler, given the
description of an H100, compiles them with JAX 0.10.2 and 0.11.2; the code of the former is pipelined `wgmma` without
spilled registers, in TF32 for float32. Speed is unknown and the tiles are not tuned, so the kernels are used only when
asked for by name or by a measured table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.ops.grouped_matmul.passes import cut_into_blocks
from moe_jax.types import Array

_SMALLEST_TILE = 16  # Triton's dot takes nothing smaller
_BAND = 8  # blocks of rows


class Tiles(NamedTuple):
    """Sizes of a program's work, powers of two; a width that a tile does not divide gets a smaller tile.

    Attributes:
      rows: rows of a block; in the weight gradient, rows (of D) of the tile.
      columns: columns of the tile.
      contracted_bytes: length of a step of the inner loop, in bytes of one row.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline.
    """

    rows: int = 128
    columns: int = 128
    contracted_bytes: int = 128
    num_warps: int = 8
    num_stages: int = 3


TILES = Tiles()


def forward(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    dtype: jnp.dtype,
    *,
    tiles: Tiles = TILES,
    interpret: bool | None = None,
) -> Array:
    """Rows times their expert's weights; `interpret=None` interprets on CPU and compiles elsewhere."""
    return _rows_pass(rows, weights, group_sizes, dtype, 0, tiles, interpret)


def rows_gradient(
    output_grad: Array,
    weights: Array,
    group_sizes: Array,
    dtype: jnp.dtype,
    *,
    tiles: Tiles = TILES,
    interpret: bool | None = None,
) -> Array:
    """Rows of the output's gradient times their expert's transposed weights."""
    return _rows_pass(output_grad, weights, group_sizes, dtype, 1, tiles, interpret)


def weights_gradient(
    rows: Array,
    output_grad: Array,
    group_sizes: Array,
    dtype: jnp.dtype,
    *,
    tiles: Tiles = TILES,
    interpret: bool | None = None,
) -> Array:
    """Each expert's `rows.T @ output_grad`."""
    num_experts, width, hidden = group_sizes.shape[0], rows.shape[1], output_grad.shape[1]
    rows, output_grad = _pad_widths(rows), _pad_widths(output_grad)
    shape = (num_experts, rows.shape[1], output_grad.shape[1])
    tile = _fit(tiles.rows, shape[1]), _fit(tiles.columns, shape[2])
    starts = jnp.pad(jnp.cumsum(group_sizes, dtype=jnp.int32), (1, 0))
    kernel = functools.partial(_weights_kernel, tile=tile, step=tiles.contracted_bytes // rows.dtype.itemsize)
    gradient = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[1] // tile[0], shape[2] // tile[1], num_experts),
        compiler_params=triton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=_is_interpreted(interpret),
    )(starts, rows, output_grad)
    return gradient[:, :width, :hidden]


def _rows_pass(
    left: Array,
    weights: Array,
    group_sizes: Array,
    dtype: jnp.dtype,
    contracted: int,
    tiles: Tiles,
    interpret: bool | None,
) -> Array:
    """Rows of `left` times their expert's weights, contracting the given axis of the expert's matrix."""
    num_rows, num_columns = left.shape[0], weights.shape[2 - contracted]
    left, weights = _pad_widths(left), _pad_widths(weights, axes=(1, 2))
    padded_columns = weights.shape[2 - contracted]
    tile = tiles.rows, _fit(tiles.columns, padded_columns)
    step = _fit(tiles.contracted_bytes // left.dtype.itemsize, left.shape[1])
    nobody = num_rows - jnp.sum(group_sizes, keepdims=True)  # one more group, which has no weights and gets zeros
    blocks = cut_into_blocks(jnp.concatenate([group_sizes, nobody]), num_rows, tile[0])
    output = pl.pallas_call(
        functools.partial(_rows_kernel, tile=tile, step=step, contracted=contracted),
        out_shape=jax.ShapeDtypeStruct((num_rows, padded_columns), dtype),
        grid=(blocks.expert.shape[0] * (padded_columns // tile[1]),),
        compiler_params=triton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=_is_interpreted(interpret),
    )(blocks.expert, blocks.begin, blocks.end, left, weights)
    return output[:, :num_columns]


def _rows_kernel(
    expert_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    left_ref: Any,
    weights_ref: Any,
    output_ref: Any,
    *,
    tile: tuple[int, int],
    step: int,
    contracted: int,
) -> None:
    """One block of rows, one strip of columns."""
    block, strip = _place(expert_ref.shape[0], output_ref.shape[1] // tile[1])
    expert, begin, end = expert_ref[block], begin_ref[block], end_ref[block]
    rows, columns = pl.ds(begin, tile[0]), pl.ds(strip * tile[1], tile[1])
    is_valid = (begin + jnp.arange(tile[0]) < end)[:, None]

    @pl.when(begin < end)
    def multiply() -> None:
        def add_step(i: Array, total: Array) -> Array:
            inner = pl.ds(i * step, step)
            left = triton.load(left_ref.at[rows, inner], mask=is_valid, other=0)
            local = weights_ref[expert, inner, columns] if contracted == 0 else weights_ref[expert, columns, inner].T
            return total + jnp.dot(left, local, preferred_element_type=jnp.float32)

        is_somebody = (expert < weights_ref.shape[0]).astype(jnp.int32)  # a weakly typed bound fails in Triton
        num_steps = is_somebody * (left_ref.shape[1] // step)
        total = jax.lax.fori_loop(0, num_steps, add_step, jnp.zeros(tile, jnp.float32))
        triton.store(output_ref.at[rows, columns], total.astype(output_ref.dtype), mask=is_valid)


def _place(num_blocks: int, num_strips: int) -> tuple[Array, Array]:
    """The program's block and strip: a band of blocks takes a strip before the next one, so that both stay in cache."""
    program = pl.program_id(0)
    first = program // (_BAND * num_strips) * _BAND
    height = jnp.minimum(num_blocks - first, _BAND)
    place = program - first * num_strips
    return first + place % height, place // height


def _weights_kernel(
    starts_ref: Any, rows_ref: Any, grad_ref: Any, output_ref: Any, *, tile: tuple[int, int], step: int
) -> None:
    """One tile of one expert's gradient."""
    expert = pl.program_id(2)
    begin, end = starts_ref[expert], starts_ref[expert + 1]
    left_columns, right_columns = (pl.ds(pl.program_id(axis) * tile[axis], tile[axis]) for axis in (0, 1))

    def add_step(i: Array, total: Array) -> Array:
        first = begin + i * step
        is_valid = (first + jnp.arange(step) < end)[:, None]
        left = triton.load(rows_ref.at[pl.ds(first, step), left_columns], mask=is_valid, other=0)
        right = triton.load(grad_ref.at[pl.ds(first, step), right_columns], mask=is_valid, other=0)
        return total + jnp.dot(left.T, right, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, pl.cdiv(end - begin, step), add_step, jnp.zeros(tile, jnp.float32))
    output_ref[expert, left_columns, right_columns] = total.astype(output_ref.dtype)


def _pad_widths(values: Array, axes: tuple[int, ...] = (1,)) -> Array:
    """Pads axes with zeros to a multiple of the smallest tile; widths of real models need none."""
    padding = [(0, -size % _SMALLEST_TILE if axis in axes else 0) for axis, size in enumerate(values.shape)]
    return jnp.pad(values, padding)


def _fit(tile: int, width: int) -> int:
    """The largest power of two that divides the width, at most the tile."""
    return min(tile, width & -width)


def _is_interpreted(interpret: bool | None) -> bool:
    """What None means."""
    return jax.default_backend() == "cpu" if interpret is None else interpret
