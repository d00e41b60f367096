"""Documents packed into rows of one length, so that each is used whole and little of a row is padding.

A document longer than a row fills rows of its own, and a rest. Rests and short documents are put together by best-fit
decreasing, in which no document that fits into a row is ever cut (Ding et al. 2404.10830, section 2). What shares a row
never sees the other, so it does not matter that the same documents share one in every epoch.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


class LaidOut(NamedTuple):
    """The N tokens of some rows.

    Attributes:
      row: `[N]` which of the rows.
      column: `[N]` place in it.
      position: `[N]` place among all tokens.
      document: `[N]` the document that it is of.
      segment: `[N]` number of its piece in the row, from 1.
    """

    row: np.ndarray
    column: np.ndarray
    position: np.ndarray
    document: np.ndarray
    segment: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """R rows of pieces of documents: row r has the pieces `first[r], ..., first[r + 1] - 1`, in this order.

    Attributes:
      starts: `[N]` int64, where a piece begins among all tokens.
      sizes: `[N]` int32, its tokens.
      document: `[N]` int32, the document that it is of.
      first: `[R + 1]` int64.
    """

    starts: np.ndarray
    sizes: np.ndarray
    document: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        """Returns R."""
        return len(self.first) - 1

    def lay_out(self, rows: np.ndarray) -> LaidOut:
        """Puts every token of some rows, `[B]` of any order, in its place."""
        num_pieces = self.first[rows + 1] - self.first[rows]
        pieces = ranges(self.first[rows], num_pieces)
        sizes = self.sizes[pieces]
        num_tokens = np.add.reduceat(sizes, np.cumsum(num_pieces) - num_pieces)
        return LaidOut(
            row=np.repeat(np.arange(len(rows)), num_tokens),
            column=ranges(np.zeros(len(rows), np.int64), num_tokens),
            position=ranges(self.starts[pieces], sizes),
            document=np.repeat(self.document[pieces], sizes),
            segment=np.repeat(ranges(np.ones(len(rows), np.int64), num_pieces), sizes),
        )


def pack_rows(starts: np.ndarray, sizes: np.ndarray, length: int) -> PackedRows:
    """Cuts and packs documents, every token exactly once.

    Args:
      starts: `[documents]` int64, where each begins among all tokens.
      sizes: `[documents]` int64, its tokens; empty ones have no piece.
      length: tokens of a row.
    """
    num_full, rest = np.divmod(sizes, length)
    full = np.repeat(np.arange(len(sizes)), num_full)
    (left,) = np.nonzero(rest)
    row = np.concatenate([np.arange(len(full)), len(full) + best_fit(rest[left], length)])
    order = np.argsort(row, kind="stable")
    piece_starts = np.concatenate([ranges(starts, num_full, length), (starts + num_full * length)[left]])
    piece_sizes = np.concatenate([np.full(len(full), length), rest[left]])
    return PackedRows(
        piece_starts[order],
        piece_sizes[order].astype(np.int32),
        np.concatenate([full, left])[order].astype(np.int32),
        np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64),
    )


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing: pieces from large to small, each into the fullest bin that has room for it.

    Args:
      sizes: `[N]` int in `[1, capacity]`; equal ones keep their order.
      capacity: of a bin.

    Returns:
      `[N]` int64 bin of each piece; bins count from 0.
    """
    bins = np.empty(len(sizes), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, num_bins = 0, 0  # bit r of `rooms` says whether `by_room[r]` has a bin
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen, num_bins = capacity, num_bins, num_bins + 1
        bins[piece] = chosen
        if room > size:
            by_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


def ranges(starts: np.ndarray, counts: np.ndarray, stride: int = 1) -> np.ndarray:
    """Runs of numbers end to end: `starts[i], starts[i] + stride, ...`, `counts[i]` of them, for each i."""
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + stride * (np.arange(len(before)) - before)
