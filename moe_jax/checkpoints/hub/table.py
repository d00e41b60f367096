"""The two-way table between the tensors of a checkpoint and ours, and the engine that reads it in either direction.

An entry names a tensor of theirs and one of ours and says by an einops pattern how the second becomes the first; read
backwards it imports. `{layer}` and `{expert}` in their name run over layers and experts.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from einops import EinopsError, parse_shape, rearrange

from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors

Part = tuple[int, int, int]  # an axis of our tensor, and the range of it that an entry is about


class Entry(NamedTuple):
    """One line of a table.

    Attributes:
      theirs: name pattern in the checkpoint, such as "model.layers.{layer}.self_attn.q_proj.weight".
      ours: path of our parameter, "norm/scale"; below "layers/" it is a parameter of the block of each layer.
      pattern: einops pattern from our tensor, of one layer and one expert, to theirs, such as "d h k -> (h k) d".
      part: the part of our tensor that it is about, if not all; see `Part`.
      sizes: lengths of the pattern's axes that neither shape tells.
      layers: which layers have it; None for no `{layer}`.
      experts: E, if their experts lie in tensors of their own.
      pairs: (axis, start): our numbers from `start` on along that axis are rotary pairs (i, i + R/2) that theirs has
        side by side, (2i, 2i + 1).
      is_float32: whether a checkpoint has it in float32 whatever the others are.
      aliases: other names under which a checkpoint may hold the same tensor: the first that is there is read, and none
        of them is written.
    """

    theirs: str
    ours: str
    pattern: str
    part: Part | None = None
    sizes: Mapping[str, int] = {}
    layers: tuple[int, ...] | None = None
    experts: int | None = None
    pairs: tuple[int, int] | None = None
    is_float32: bool = False
    aliases: tuple[str, ...] = ()


class Binding(NamedTuple):
    """One tensor of a checkpoint and its place in ours: `at`, an index into the leading axes of the array at `path`."""

    theirs: str
    path: str
    at: tuple[int, ...]
    entry: Entry

    def view(self, array: np.ndarray) -> np.ndarray:
        """The part of our array that it is about, as a view."""
        array = array[self.at]
        if self.entry.part is None:
            return array
        axis, start, stop = self.entry.part
        return array[(slice(None),) * axis + (slice(start, stop),)]

    def export(self, array: np.ndarray) -> np.ndarray:
        """Their tensor, from our array."""
        ours = self.view(array)
        if self.entry.pairs is not None:
            axis, start = self.entry.pairs
            ours = ours.take(np.argsort(_their_places(ours.shape[axis], start)), axis)
        return rearrange(ours, self.entry.pattern, **self.entry.sizes)

    def fill(self, array: np.ndarray, theirs: np.ndarray) -> None:
        """Writes their tensor into our array, cast to its dtype.

        Raises:
          HubError: a shape that does not fit.
        """
        ours = self.view(array)
        left, right = self.entry.pattern.split(" -> ")
        apart = left.replace("(", "").replace(")", "")  # splitting axes makes views, so nothing is copied in between
        target = rearrange(ours, f"{left} -> {apart}", **self.entry.sizes)
        try:
            found = rearrange(theirs, f"{right} -> {apart}", **parse_shape(target, apart.replace("1", "_")))
            if self.entry.pairs is not None:
                axis, start = self.entry.pairs
                found = found.take(_their_places(found.shape[axis], start), axis)
            target[...] = found
        except (EinopsError, ValueError) as error:
            expected: list[int] = list(
                rearrange(np.empty(ours.shape, bool), self.entry.pattern, **self.entry.sizes).shape
            )
            raise HubError(
                f"tensor {self.theirs!r} has shape {list(theirs.shape)}, the config asks for {expected}"
            ) from error


def _their_places(length: int, start: int) -> np.ndarray:
    """For each of our numbers along an axis with rotary pairs, where it stands in theirs."""
    places = np.arange(length)
    return np.concatenate([places[:start], places[start::2], places[start + 1 :: 2]])


def bind(entries: Iterable[Entry], place: Mapping[int, tuple[str, int]]) -> Iterator[Binding]:
    """Runs a table's entries over their layers and experts.

    Args:
      entries: the table.
      place: for each layer, the path of its stack and its position in it.
    """
    for entry in entries:
        experts: list[tuple[int, ...]] = [()] if entry.experts is None else [(e,) for e in range(entry.experts)]
        for layer in (0,) if entry.layers is None else entry.layers:
            path, at = entry.ours, tuple[int, ...]()
            if entry.layers is not None:
                stack, position = place[layer]
                path, at = f"{stack}/{path.removeprefix('layers/')}", (position,)
            for expert in experts:
                name = entry.theirs.format(layer=layer, expert=expert[0] if expert else "")
                yield Binding(name, path, (*at, *expert), entry)


def import_tensors(
    source: Tensors,
    bindings: Iterable[Binding],
    target: Mapping[str, np.ndarray],
    given: Container[str] = (),
    ignored: tuple[str, ...] = (),
) -> Iterator[str]:
    """Fills our arrays from a checkpoint, tensor by tensor.

    Args:
      source: the checkpoint.
      bindings: the whole table.
      target: our arrays by path; every number of them must be filled.
      given: paths that need not, since they have their values already.
      ignored: beginnings and ends of their names that are left unread.

    Yields:
      The name of each tensor, once it is read.

    Raises:
      HubError: a tensor that is missing, not in the table, or of another shape; numbers of ours that nothing fills.
    """
    known = set(source.names())
    read, numbers = set[str](), dict.fromkeys(target, 0)
    for binding in bindings:
        found = [name for name in (binding.theirs, *binding.entry.aliases) if name in known]
        if not found:
            raise HubError(f"the checkpoint lacks tensor {binding.theirs!r}; it has {len(known)} others")
        read.update(found)
        binding.fill(target[binding.path], source.read(found[0]))
        numbers[binding.path] += math.prod(binding.view(target[binding.path]).shape)
        yield binding.theirs
    if unread := sorted(name for name in known - read if not name.startswith(ignored) and not name.endswith(ignored)):
        raise HubError(f"the checkpoint has {len(unread)} tensors that its config does not account for: {unread[:5]}")
    needed = {path: array.size for path, array in target.items() if path not in given}
    if short := {path: (numbers[path], size) for path, size in needed.items() if numbers[path] != size}:
        raise HubError(f"the table of this family leaves numbers unfilled (filled, size): {short}")
