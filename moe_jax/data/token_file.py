"""Tokens of a large text: made once, kept in the user's cache folder, mapped into memory by every process that reads.

A folder `<digest of texts and tokenizer>` holds `tokens`, one flat array of all documents, and `offsets.npy`, where
each of them begins. It appears whole or not at all, and may be deleted when nobody trains.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class TokenFile:
    """A flat array of tokens in a file, mapped when it is first read. A copy in another process maps the same file."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """Names the file and what its numbers are."""
        self.path, self.dtype = path, dtype

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """`[N]`, read-only, in pages of the file that memory holds only as long as there is room."""
        return np.asarray(np.memmap(self.path, self.dtype, mode="r"))

    def __reduce__(self) -> tuple:
        return TokenFile, (self.path, self.dtype)


class TokenSpan(NamedTuple):
    """The tokens of a document: those from `start` to `stop` in a file."""

    file: TokenFile
    start: int
    stop: int

    @property
    def tokens(self) -> np.ndarray:
        """`[stop - start]`, a view of the file."""
        return self.file.tokens[self.start : self.stop]


class FlatTokens(NamedTuple):
    """Documents in one array: document d is `tokens[starts[d] : starts[d] + sizes[d]]`.

    Attributes:
      source: the array `[N]`, or the file that it is mapped from.
      starts: `[documents]` int64.
      sizes: `[documents]` int64.
    """

    source: np.ndarray | TokenFile
    starts: np.ndarray
    sizes: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """`[N]`."""
        return self.source.tokens if isinstance(self.source, TokenFile) else self.source


def flatten(parts: Sequence[np.ndarray | TokenSpan]) -> FlatTokens:
    """Joins the tokens of documents; those of one file stay in it, in whatever order."""
    spans = [part for part in parts if isinstance(part, TokenSpan)]
    if spans and len(spans) == len(parts) and all(span.file is spans[0].file for span in spans):
        starts, stops = (np.array(column, np.int64) for column in list(zip(*spans, strict=True))[1:])
        return FlatTokens(spans[0].file, starts, stops - starts)
    arrays = [part.tokens if isinstance(part, TokenSpan) else part for part in parts]
    sizes = np.array([len(array) for array in arrays], np.int64)
    return FlatTokens(np.concatenate(arrays), np.cumsum(sizes) - sizes, sizes)


def cache_folder() -> Path:
    """Where token files are kept: `moe_jax/tokens` in the user's cache folder, which XDG_CACHE_HOME moves."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe_jax" / "tokens"


def store_tokens(
    texts: Sequence[bytes], tokenizer: bytes, dtype: np.dtype, encode: Callable[[], Iterable[np.ndarray]]
) -> list[TokenSpan]:
    """Finds the token file of texts, or makes it.

    Args:
      texts: of the documents.
      tokenizer: what tells a tokenizer, and the way it is used, from all others.
      dtype: that holds its ids.
      encode: gives the tokens of each text, called only if there is no file yet.

    Returns:
      The tokens of each text, all in one file.
    """
    folder = cache_folder() / _digest(texts, tokenizer)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:8]}-"))
        try:
            _write(partial, dtype, encode())
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster with the same file
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    offsets = np.load(folder / "offsets.npy").tolist()
    file = TokenFile(folder / "tokens", np.dtype(dtype))
    return [TokenSpan(file, start, stop) for start, stop in itertools.pairwise(offsets)]


def _write(folder: Path, dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """Writes tokens as they come, and then where each document ends."""
    offsets = [0]
    with (folder / "tokens").open("wb") as file:
        for part in parts:
            part.astype(dtype, copy=False).tofile(file)
            offsets.append(offsets[-1] + len(part))
        file.flush()
        os.fsync(file.fileno())
    with (folder / "offsets.npy").open("wb") as file:
        np.save(file, np.array(offsets, np.int64))
        file.flush()
        os.fsync(file.fileno())


def _digest(texts: Sequence[bytes], tokenizer: bytes) -> str:
    """Hashes texts and tokenizer."""
    digest = hashlib.sha256(len(tokenizer).to_bytes(8, "big") + tokenizer)
    for text in texts:
        digest.update(len(text).to_bytes(8, "big"))
        digest.update(text)
    return digest.hexdigest()
