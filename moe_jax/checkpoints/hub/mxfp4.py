"""MXFP4 tensors (Rouhani et al. 2310.10537; OCP Microscaling Formats v1.0), unpacked when they are read.

Thirty-two numbers share one power of two, `2^(scale - 127)`. Each is a sign and one of eight magnitudes in four bits,
two to a byte, the first in the lower half. In a checkpoint of gpt-oss a matrix `name [E, I, O]` of E experts lies as

    name_blocks [E, O, I / 32, 16] uint8        name_scales [E, O, I / 32] uint8
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors

BLOCKS, SCALES = "_blocks", "_scales"
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_PAIRS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])[np.arange(256)[:, None] >> np.array([[0, 4]]) & 15]  # [byte, 2]
_LARGEST = 252  # scale whose numbers are all finite in float32; 255 means NaN


class UnpackedTensors:
    """A checkpoint's tensors, packed ones shown as what they stand for; bfloat16 holds every value exactly."""

    def __init__(self, tensors: Tensors):
        """Wraps a checkpoint.

        Raises:
          HubError: blocks and scales that do not belong together.
        """
        self._tensors = tensors
        stored = tensors.names()
        packed = {name.removesuffix(end) for name in stored for end in (BLOCKS, SCALES) if name.endswith(end)}
        for name in packed:
            blocks, scales = (tensors.shape(name + end) if name + end in stored else () for end in (BLOCKS, SCALES))
            if len(blocks) != 4 or blocks != (*scales, 16):
                raise HubError(
                    f"packed tensor {name!r} needs {name}{BLOCKS} [E, O, G, 16] and {name}{SCALES} [E, O, G], got "
                    f"shapes {list(blocks)} and {list(scales)}; download the checkpoint again"
                )
        self._packed = packed
        self._names = [name for name in stored if not name.endswith((BLOCKS, SCALES))] + sorted(packed)

    def names(self) -> list[str]:
        """The tensors' names, without the endings of packed ones."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, of packed ones the shape that they unpack to."""
        if name not in self._packed:
            return self._tensors.shape(name)
        experts, rows, groups, width = self._tensors.shape(name + BLOCKS)
        return (experts, 2 * width * groups, rows)

    def read(self, name: str) -> np.ndarray:
        """A tensor; what is packed is unpacked to bfloat16, one expert after the other.

        Raises:
          HubError: packed tensors that are no bytes, or have a scale beyond float32.
        """
        if name not in self._packed:
            return self._tensors.read(name)
        blocks, scales = self._tensors.read(name + BLOCKS), self._tensors.read(name + SCALES)
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise HubError(f"packed tensor {name!r} must be bytes, got {blocks.dtype} blocks, {scales.dtype} scales")
        unpacked = np.empty(self.shape(name), ml_dtypes.bfloat16)
        for target, one, scale in zip(unpacked, blocks, scales, strict=True):
            if scale.max(initial=0) > _LARGEST:
                raise HubError(f"packed tensor {name!r} has a scale of 2^{int(scale.max()) - 127}; download it again")
            target[...] = unpack(one, scale).T
        return unpacked


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Packed numbers `[..., G, 16]` and scales `[..., G]`, both uint8, to `[..., 32 G]` float32."""
    numbers = np.ldexp(_PAIRS[blocks].reshape(*blocks.shape[:-1], -1), scales[..., None].astype(np.int32) - 127)
    return numbers.reshape(*blocks.shape[:-2], -1)
