"""Safetensors files, read and written one tensor at a time (https://huggingface.co/docs/safetensors).

A file is eight bytes of length, a JSON header of names, dtypes, shapes and byte ranges, and the bytes. Reading maps the
file into memory and copies nothing; writing lays the file out first and fills it in any order. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from moe_jax.errors import MendableError

DTYPES = MappingProxyType(
    {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }
)
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class HubError(MendableError, ValueError):
    """A checkpoint that cannot be used as asked; the message names the file and says what to do."""


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint, seen as named tensors in the layout of `transformers`."""

    def names(self) -> list[str]:
        """The tensors' names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def read(self, name: str) -> np.ndarray:
        """A tensor, possibly a read-only view of the file."""


class TensorFile:
    """One safetensors file, mapped into memory."""

    def __init__(self, path: str | Path):
        """Reads and checks the header.

        Raises:
          HubError: no safetensors file, or one that was cut off or altered.
        """
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise HubError(f"{self.path} is no whole safetensors file: {size} bytes, header of {length}{_AGAIN}")
            try:
                header = json.loads(file.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                self._entries = {name: _entry(fact) for name, fact in header.items()}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise HubError(f"{self.path} has a damaged header ({error}){_AGAIN}") from error
        self._start = 8 + length
        self._check_ranges(size)
        self._bytes = np.memmap(self.path, np.uint8, "r") if size > self._start else np.zeros(size, np.uint8)

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype."""
        return self._entries[name][0]

    def read(self, name: str) -> np.ndarray:
        """A tensor, as a read-only view of the file."""
        dtype, shape, start, stop = self._entries[name]
        return self._bytes[self._start + start : self._start + stop].view(dtype).reshape(shape)

    def _check_ranges(self, size: int) -> None:
        """Refuses byte ranges that do not fit their shapes, overlap, leave gaps or pass the end."""
        end = 0
        for name, (dtype, shape, start, stop) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            expected = math.prod(shape) * dtype.itemsize
            if start != end or stop - start != expected:
                raise HubError(
                    f"{self.path}: tensor {name!r} {dtype}{list(shape)} should take {expected} bytes from {end}, the "
                    f"header says {start} to {stop}{_AGAIN}"
                )
            end = stop
        if self._start + end != size:
            raise HubError(f"{self.path} has {size} bytes, its header promises {self._start + end}{_AGAIN}")


_AGAIN = "; download it again"


def _entry(fact: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and byte range of a tensor in the header."""
    if fact["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {fact['dtype']!r}; known: {', '.join(DTYPES)}")
    start, stop = fact["data_offsets"]
    numbers = [*fact["shape"], start, stop]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"shape and offsets must be whole numbers, got {numbers}")
    return np.dtype(DTYPES[fact["dtype"]]), tuple(fact["shape"]), start, stop


class Checkpoint:
    """A folder of safetensors files: one file, or shards with an index."""

    def __init__(self, folder: str | Path):
        """Opens every file of the folder.

        Raises:
          HubError: no such files, or an index that names files or tensors that are not there.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX
        self._files: dict[str, TensorFile] = {}
        if index.is_file():
            places = _read_index(index)
            files = {name: self._open(name) for name in sorted(set(places.values()))}
            for tensor, name in places.items():
                if tensor not in files[name].names():
                    raise HubError(f"{index} promises tensor {tensor!r} in {name}, which lacks it{_AGAIN}")
                self._files[tensor] = files[name]
            return
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise HubError(
                f"{self.folder} has no *.safetensors file; pickled checkpoints (*.bin, *.pt) are never opened: save "
                "the model with safe_serialization=True"
            )
        for path in paths:
            file = TensorFile(path)
            self._files |= dict.fromkeys(file.names(), file)

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._files[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor, as a read-only view of its file."""
        return self._files[name].read(name)

    def _open(self, name: str) -> TensorFile:
        """Opens a shard of the index, which must be a plain file of this folder."""
        if name != Path(name).name or not (self.folder / name).is_file():
            raise HubError(f"{self.folder / INDEX} names {name!r}, which is no file of that folder{_AGAIN}")
        return TensorFile(self.folder / name)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor names to file names."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        is_fine = all(isinstance(key, str) and isinstance(value, str) for key, value in places.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(f"{path} is no index of safetensors files ({error}){_AGAIN}") from error
    if not is_fine:
        raise HubError(f"{path}: weight_map must map tensor names to file names{_AGAIN}")
    return places


class TensorWriter:
    """A safetensors file laid out in full, to be filled through `arrays` in any order; memory stays small."""

    def __init__(self, path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None):
        """Creates the file, of zeros.

        Args:
          path: where.
          tensors: name to what has `shape` and `dtype`.
          metadata: strings to keep in the header.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        places, end = {}, 0
        for name, tensor in tensors.items():
            dtype = np.dtype(tensor.dtype)
            size = math.prod(tensor.shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            places[name] = (dtype, tensor.shape, end, end + size)
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        with Path(path).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        start = 8 + len(text)
        self._bytes = np.memmap(path, np.uint8, "r+")
        self.arrays = {
            name: self._bytes[start + a : start + b].view(dtype).reshape(shape)
            for name, (dtype, shape, a, b) in places.items()
        }

    def close(self) -> None:
        """Writes out what is still in memory."""
        self._bytes.flush()


_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
