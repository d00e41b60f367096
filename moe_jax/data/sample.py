"""A fair sample of documents within a number of bytes, the same whatever order they come in."""

from __future__ import annotations

import hashlib
import heapq
from typing import Generic, TypeVar

_T = TypeVar("_T")


class FairSample(Generic[_T]):
    """The documents whose names' SHA-256 come first, as many of them as fit.

    Holds no more than fits, so that a stream of any length can be sampled. A document that is alone larger than the
    limit is left out, and does not stop others.
    """

    def __init__(self, max_bytes: int | None):
        """Begins with nothing.

        Args:
          max_bytes: the sizes of the sample add up to at most this; None takes everything.
        """
        self._max_bytes = max_bytes
        self._total = 0
        self._kept: list[tuple[int, _T, int]] = []  # a heap of minus the hash: what goes first is on top
        self._first_refused: int | None = None

    def add(self, name: str, item: _T, size: int) -> None:
        """Offers a document.

        Args:
          name: its name, unlike those of all others.
          item: what `items` is to return.
          size: in bytes.
        """
        rank = int.from_bytes(hashlib.sha256(name.encode()).digest())
        if self._max_bytes is not None and size > self._max_bytes:
            return
        if self._first_refused is not None and rank > self._first_refused:
            return
        heapq.heappush(self._kept, (-rank, item, size))
        self._total += size
        while self._max_bytes is not None and self._total > self._max_bytes:
            refused, _, size = heapq.heappop(self._kept)
            self._first_refused, self._total = -refused, self._total - size

    def items(self) -> list[_T]:
        """Returns the sample in the order of the hashes, any beginning of which is a fair sample again."""
        return [item for _, item, _ in sorted(self._kept, key=lambda kept: -kept[0])]
