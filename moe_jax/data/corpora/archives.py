"""Reads files out of archives that nobody vouches for: in memory, as a stream, within limits.

Nothing is unpacked onto the disk, so no path in an archive can name a place there; links are not followed and devices
not opened, since only regular files are read. Understood are .deb (`ar` with `data.tar`), wheels and other zip files,
and tar, each compressed by gzip, xz, bzip2 or zstd, also inside one another.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow

from moe_jax.data.corpora.source import CorpusError

_BUFFER = 1 << 18  # bytes
_DAMAGE = (
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass
class Limits:
    """How much an archive may unpack to, all archives inside it included; what is read is taken off.

    Attributes:
      unpacked_bytes: of everything.
      member_bytes: of one file that is read.
      members: how many there may be.
    """

    unpacked_bytes: int = 4_000_000_000
    member_bytes: int = 64_000_000
    members: int = 250_000


def read_members(path: Path, members: tuple[str, ...], limits: Limits | None = None) -> Iterator[tuple[str, bytes]]:
    """Yields the files of an archive whose paths match, in the archive's order.

    Args:
      path: of the archive.
      members: as in `Source`.
      limits: None for the default ones.

    Yields:
      Name, which is the expression's first group or else the whole path, and content; a file that is compressed by
      itself (`.gz`, `.dz`, …) comes unpacked.

    Raises:
      CorpusError: the archive is damaged, unpacks to more than the limits, or has a path that leads out of it.
    """
    limits = dataclasses.replace(limits or Limits())
    try:
        with path.open("rb") as file:
            yield from _matching(file, [re.compile(pattern) for pattern in members], limits, str(path))
    except _DAMAGE as error:
        raise CorpusError(f"{path} is damaged ({error}); delete it, so that it is downloaded again") from error


def _matching(
    stream: _Stream, patterns: list[re.Pattern[str]], limits: Limits, where: str
) -> Iterator[tuple[str, bytes]]:
    """Goes through one archive, and into those inside it while there is more than one pattern."""
    for name, content in _members(stream, limits, where):
        if not (match := patterns[0].fullmatch(name)):
            continue
        if len(patterns) > 1:
            yield from _matching(content, patterns[1:], limits, f"{where}: {name}")
            continue
        data = _unpacked(content, limits, where).read(limits.member_bytes + 1)
        if len(data) > limits.member_bytes:
            raise CorpusError(f"{where}: {name} is over {limits.member_bytes} bytes, more than a text; it is not used")
        yield match.group(1) if match.groups() else name, data


def _members(stream: _Stream, limits: Limits, where: str) -> Iterator[tuple[str, _Stream]]:
    """Yields path and content of every regular file of a zip or tar archive, or of the `data.tar` of a .deb."""
    buffered = _buffered(stream)
    if buffered.peek(4)[:4] == b"PK\3\4":
        with zipfile.ZipFile(buffered) as archive:
            for info in archive.infolist():
                name = _checked(info.filename, limits, where)
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield name, _Counted(content, limits, where)
        return
    if buffered.peek(8)[:8] == b"!<arch>\n":
        buffered = io.BufferedReader(_Counted(buffered, limits, where, size=_seek_data(buffered)), _BUFFER)
    with tarfile.open(fileobj=_unpacked(buffered, limits, where), mode="r|", bufsize=_BUFFER) as archive:
        for member in archive:
            name = _checked(member.name, limits, where)
            if member.isreg() and isinstance(file := archive.extractfile(member), io.BufferedReader):
                yield name, file


def _checked(name: str, limits: Limits, where: str) -> str:
    """Counts a member and returns its path without a leading "./", if it stays inside the archive."""
    limits.members -= 1
    if limits.members < 0:
        raise CorpusError(f"{where} has more files than any text that is known here; it is not used")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise CorpusError(f"{where} has a file named {name!r}, which leads out of the archive; it is not used")
    return str(path)


def _seek_data(deb: io.BufferedReader) -> int:
    """Moves to the `data.tar` of a .deb, an `ar` archive of three files, and returns its size."""
    deb.read(8)
    while len(header := deb.read(60)) == 60:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return size
        deb.read(size + size % 2)  # members begin at even offsets
    raise tarfile.ReadError("a .deb without data.tar")


def _buffered(stream: _Stream) -> io.BufferedReader:
    """Lets a stream be looked at before it is read."""
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, _BUFFER)


def _unpacked(stream: _Stream, limits: Limits, where: str) -> io.BufferedReader:
    """Decompresses a stream if its first bytes say that it is compressed, and counts what comes out."""
    buffered = _buffered(stream)
    head = buffered.peek(6)
    opener = next((_COMPRESSIONS[magic] for magic in _COMPRESSIONS if head.startswith(magic)), lambda stream: stream)
    return io.BufferedReader(_Counted(opener(buffered), limits, where), _BUFFER)


class _Readable(Protocol):
    """What can be read."""

    def read(self, size: int, /) -> bytes: ...


class _Counted(io.RawIOBase):
    """A stream, or `size` bytes of it, that takes what is read off the limits: no zip bomb gets past them."""

    def __init__(self, stream: _Readable, limits: Limits, where: str, size: int = sys.maxsize):
        self._stream, self._limits, self._where, self._left = stream, limits, where, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        self._left -= len(data)
        self._limits.unpacked_bytes -= len(data)
        if self._limits.unpacked_bytes < 0:
            raise CorpusError(f"{self._where} unpacks to more than any text that is known here; it is not used")
        buffer[: len(data)] = data
        return len(data)


_Stream = io.BufferedReader | _Counted
_COMPRESSIONS: dict[bytes, Callable[[Any], _Readable]] = {  # by the first bytes
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
    b"\x28\xb5\x2f\xfd": lambda stream: pyarrow.CompressedInputStream(stream, "zstd"),
}
