"""GGUF, the file format of llama.cpp: typed metadata, a directory of tensors, and their data, mostly quantised.

    magic "GGUF" · version · two counts · metadata (key, type, value) · directory (name, sizes, kind, offset) · data

All little-endian; the data and every tensor in it begin at multiples of `general.alignment`. Types, block sizes and the
arithmetic of dequantisation are those of the package `gguf`. Its `GGUFReader` stays unused: it keeps several NumPy
arrays for every element of the metadata, so a file of 3 MB can take 2.1 GB and 27 s to open, and one of 50 bytes all
memory there is (gguf 0.19). Here the size of the file bounds both.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.checkpoints.store import CheckpointError

if TYPE_CHECKING:
    import gguf

_VERSIONS = (2, 3)
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_CHUNK = 1 << 18  # elements that are dequantised at a time


class Tensor(NamedTuple):
    """An entry of the directory.

    Attributes:
      shape: sizes, the axis along which the data is contiguous last, as in NumPy.
      kind: how it is quantised.
      start: its first byte in the file.
      row_bytes: what one row along the last axis takes.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Returns how many rows along the last axis there are."""
        return math.prod(self.shape[:-1])

    @property
    def end(self) -> int:
        """Returns the byte behind its last one."""
        return self.start + self.num_rows * self.row_bytes


class GGUFFile:
    """A file that is open for reading; nothing but its header is in memory.

    Attributes:
      path: where it is.
      metadata: key -> bool, int, float, str, list of str, or `[N]` array for lists of numbers.
      tensors: name -> entry of the directory, in the file's order.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads and checks the header.

        Raises:
          CheckpointError: if the file is missing, is no GGUF, or is damaged, naming what was found and expected.
          ImportError: if the package `gguf` is missing.
        """
        self.path = Path(path)
        self._gguf = _import_gguf()
        if not self.path.is_file():
            raise CheckpointError(f"{self.path} is not a file; expected the path of a .gguf file")
        if self.path.stat().st_size == 0:
            raise CheckpointError(f"{self.path} is empty; expected a GGUF file")
        self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
        cursor = _Cursor(self.path, self._data)
        num_tensors, num_entries = _read_preamble(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise cursor.error(f"metadata key {key!r} occurs twice")
            self.metadata[key] = _read_value(cursor, key)
        self.tensors = self._read_directory(cursor, num_tensors)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Dequantises rows of a tensor, a few at a time so that little but the result is in memory.

        Args:
          name: a key of `tensors`.
          rows: `[N]` integers, which rows, counted over all axes but the last.

        Returns:
          `[N, shape[-1]]` float32.

        Raises:
          CheckpointError: if a value is not finite.
        """
        tensor = self.tensors[name]
        raw = self._data[tensor.start : tensor.end].reshape(tensor.num_rows, tensor.row_bytes)
        result = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, _CHUNK // tensor.shape[-1])
        for begin in range(0, len(rows), step):
            with np.errstate(all="ignore"):  # what overflows is not finite, which is found below
                part = self._gguf.dequantize(raw[rows[begin : begin + step]], tensor.kind)
            if not np.isfinite(part).all():
                raise CheckpointError(f"{self.path}: tensor {name!r} holds values that are not finite; it is damaged")
            result[begin : begin + step] = part
        return result

    def _read_directory(self, cursor: _Cursor, num_tensors: int) -> dict[str, Tensor]:
        """Reads where the tensors are and checks that they lie inside the file, apart from each other."""
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = cursor.string("the name of a tensor")
            if name in entries:
                raise cursor.error(f"tensor {name!r} occurs twice")
            entries[name] = _read_entry(cursor, name)
        alignment = self.metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two")
        start = -(-cursor.position // alignment) * alignment
        tensors = {name: self._place(name, *entry, alignment, start) for name, entry in entries.items()}
        position, before = start, "the header"
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < position:
                raise CheckpointError(f"{self.path}: tensor {name!r} begins at byte {tensor.start}, inside {before}")
            position, before = tensor.end, f"tensor {name!r}, which ends at byte {tensor.end}"
        return tensors

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int, data_start: int
    ) -> Tensor:
        """Turns an entry of the directory into bytes of the file."""
        where = f"{self.path}: tensor {name!r}"
        quantisation = _check_kind(self._gguf, kind, where)
        block_size, block_bytes = self._gguf.GGML_QUANT_SIZES[quantisation]
        if min(shape) < 1 or shape[-1] % block_size:
            raise CheckpointError(
                f"{where} has shape {shape}; expected sizes of at least 1, and a last one that is a multiple of "
                f"{block_size}, the block of {quantisation.name}"
            )
        tensor = Tensor(shape, quantisation, data_start + offset, shape[-1] // block_size * block_bytes)
        if offset % alignment:
            raise CheckpointError(f"{where} begins at offset {offset}, expected a multiple of {alignment}")
        if tensor.end > len(self._data):
            raise CheckpointError(
                f"{where} of shape {shape} in {quantisation.name} ends at byte {tensor.end}, but the file has "
                f"{len(self._data)} bytes; it is cut off or damaged, fetch it again"
            )
        return tensor


class _Cursor:
    """Reads one thing after the other and never past the end."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self._path = path
        self._data = data.data
        self.position = 0

    def error(self, problem: str) -> CheckpointError:
        """Builds the error of a file that is not as it should be."""
        return CheckpointError(f"{self._path}: {problem} (before byte {self.position}); the file is damaged")

    def take(self, num_bytes: int, what: str) -> memoryview:
        """Returns the next bytes."""
        left = len(self._data) - self.position
        if num_bytes > left:
            raise CheckpointError(
                f"{self._path}: {what} takes {num_bytes} bytes from byte {self.position} on, but the file has only "
                f"{left} more; it is cut off or damaged, fetch it again"
            )
        self.position += num_bytes
        return self._data[self.position - num_bytes : self.position]

    def integer(self, layout: str, what: str) -> int:
        """Returns a number; `layout` is one of `struct`'s."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        """Returns a copy of the next `count` numbers."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count, what), dtype).copy()

    def string(self, what: str) -> str:
        """Returns a string, which is stored behind its length."""
        length = self.integer("<Q", f"the length of {what}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error})") from error


def _import_gguf() -> Any:
    """Imports the package that knows the quantisations."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'moe_jax[gguf]'") from error
    return gguf


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version; returns the number of tensors and of metadata entries."""
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != b"GGUF":
        raise cursor.error(f"it begins with {magic!r}, expected b'GGUF'")
    version = cursor.integer("<I", "the version")
    if version not in _VERSIONS:
        hint = " in big-endian order" if version and version & 0xFFFF == 0 else ""
        raise cursor.error(f"it has version {version}{hint}, expected one of {_VERSIONS} in little-endian order")
    return cursor.integer("<Q", "the number of tensors"), cursor.integer("<Q", "the number of metadata entries")


def _read_entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Reads shape, quantisation and offset of a tensor."""
    num_axes = cursor.integer("<I", f"the number of axes of tensor {name!r}")
    if not 1 <= num_axes <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {num_axes} axes, expected 1 to {_MAX_DIMENSIONS}")
    sizes = cursor.array("<u8", num_axes, f"the sizes of tensor {name!r}").tolist()
    kind = cursor.integer("<I", f"the quantisation of tensor {name!r}")
    return tuple(reversed(sizes)), kind, cursor.integer("<Q", f"the offset of tensor {name!r}")


def _read_value(cursor: _Cursor, key: str) -> Any:
    """Reads a typed value of the metadata."""
    what = f"the value of {key!r}"
    kind = cursor.integer("<I", f"the type of {key!r}")
    if kind == _STRING:
        return cursor.string(what)
    if kind in _SCALARS:
        return cursor.array(_SCALARS[kind], 1, what).item()
    if kind != _ARRAY:
        raise cursor.error(f"{key!r} has type {kind}, expected 0 to {max(_SCALARS)}")
    kind, count = cursor.integer("<I", f"the type of {key!r}"), cursor.integer("<Q", f"the length of {key!r}")
    if kind == _STRING:
        return [cursor.string(what) for _ in range(count)]
    if kind in _SCALARS:
        return cursor.array(_SCALARS[kind], count, what)
    raise cursor.error(f"{key!r} is a list of type {kind}; expected a list of strings or of numbers")


def _check_kind(gguf: Any, kind: int, where: str) -> Any:
    """Returns the quantisation of a number, refusing those that cannot be turned into float32."""
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
    except (ValueError, NotImplementedError) as error:
        names = {number.value: number.name for number in gguf.GGMLQuantizationType}
        raise CheckpointError(
            f"{where} has quantisation {kind} ({names.get(kind, 'unknown')}), which cannot be dequantised; expected "
            "float or one of llama.cpp's block formats, such as Q4_1, Q4_K or Q8_0"
        ) from error
    return quantisation
