"""Weights of 8 bits with one scale for each block, as DeepSeek-V3 publishes them (2412.19437, section 3.3), unpacked.

    w[i, j] = w8[i, j] * scale[i // 128, j // 128]

A block at the lower or right edge is as large as what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors

SCALE = "_scale_inv"


class BlockFp8:
    """A checkpoint in which a tensor with a second one, named the same and `_scale_inv`, is their product."""

    def __init__(self, tensors: Tensors, block: tuple[int, int]):
        """Checks that every scale has its tensor and the shape that it needs.

        Args:
          tensors: the checkpoint as it is stored.
          block: rows and columns of a block.

        Raises:
          HubError: a scale without its tensor, or of another shape.
        """
        self._tensors, self._block = tensors, block
        names = set(tensors.names())
        self._scaled = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
        for name in sorted(self._scaled):
            if name not in names:
                raise HubError(f"the checkpoint has {name + SCALE!r} without the tensor {name!r} that it scales")
            shape = tensors.shape(name)
            needed = tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
            if len(shape) != 2 or tensors.shape(name + SCALE) != needed:
                raise HubError(
                    f"tensor {name + SCALE!r} has shape {list(tensors.shape(name + SCALE))}; one number for each "
                    f"{block[0]} x {block[1]} block of {name!r} {list(shape)} is needed"
                )

    def names(self) -> list[str]:
        """The tensors' names, without the scales."""
        return [name for name in self._tensors.names() if not name.endswith(SCALE)]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor; float32 if it was packed.

        Raises:
          HubError: a packed one without its scale.
        """
        stored = self._tensors.read(name)
        if name not in self._scaled:
            if stored.dtype == ml_dtypes.float8_e4m3fn:
                raise HubError(f"tensor {name!r} is stored in 8 bits, and {name + SCALE!r} with its scales is missing")
            return stored
        unpacked, (rows, columns) = stored.astype(np.float32), self._block
        for index, scales in enumerate(self._tensors.read(name + SCALE).astype(np.float32)):
            unpacked[index * rows : (index + 1) * rows] *= scales.repeat(columns)[: stored.shape[1]]
        return unpacked


def open_block_fp8(tensors: Tensors, hub_config: Mapping[str, Any]) -> Tensors:
    """`Family.open` of families whose published weights have 8 bits: as they are without a `quantization_config`.

    Raises:
      HubError: weights that are packed in another way.
    """
    given = hub_config.get("quantization_config")
    if given is None:
        return tensors
    block = given.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if given.get("quant_method") != "fp8" or given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn") or not is_block:
        raise HubError(
            f"quantization_config={given} is not supported: only quant_method 'fp8' in e4m3 with a weight_block_size "
            "of two numbers; look for a checkpoint in bfloat16"
        )
    return BlockFp8(tensors, (block[0], block[1]))
