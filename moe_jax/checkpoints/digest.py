"""A digest of an array's bits that does not depend on how the array lies over devices and hosts.

Orbax itself does not notice flipped bits. A usual digest reads bytes in order, for which one host would have to hold
them all. This one is a sum over the array's words w,

    sum w[i, j, ...] * a_0[i] * a_1[j] * ...   modulo 2**64,

with a fixed random odd number a_d[i] for each index i of each axis d. A sum has no order: every host adds up the shards
that it holds, and one number of each array goes over the network. Odd factors can be undone modulo 2**64, so a change
of one word always changes the sum; of two changed words, one case in 2**32 escapes at worst. It guards against
accidents, not against forgery.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.types import Array


def digest_arrays(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, str]:
    """Digests arrays where they lie. With several processes all must call it together.

    Args:
      arrays: name -> array of JAX or NumPy; typed PRNG keys as their data.

    Returns:
      name -> 16 hexadecimal digits, the same for the same bits on any mesh.
    """
    totals = [sum(_weighted_sum(part, first) for first, part in _parts(array)) % 2**64 for array in arrays.values()]
    sums = np.array(totals, np.uint64)
    if jax.process_count() > 1:
        # JAX would cut 64-bit numbers in half.
        sums = multihost_utils.process_allgather(sums.view(np.uint32)).view(np.uint64).sum(0, dtype=np.uint64)
    return {name: f"{int(total):016x}" for name, total in zip(arrays, sums, strict=True)}


def _parts(array: Array | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The blocks of an array that this process counts, each with the index of its first element."""
    if isinstance(array, jax.Array):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                yield tuple(side.start or 0 for side in shard.index), np.asarray(shard.data)
    elif jax.process_index() == 0:
        yield (0,) * array.ndim, np.asarray(array)


def _weighted_sum(part: np.ndarray, first: tuple[int, ...]) -> int:
    """The sum over a block of an array."""
    if not part.size:
        return 0
    block = np.atleast_1d(np.ascontiguousarray(part))
    # A number of more than 32 bits counts as several words along the last axis.
    words = block.view(f"u{min(part.itemsize, 4)}")
    starts = list(first or (0,))
    starts[-1] *= words.shape[-1] // block.shape[-1]
    for axis in reversed(range(words.ndim)):
        words = np.einsum("...i,i->...", words, _factors(axis, starts[axis], words.shape[axis]), dtype=np.uint64)
    return int(words)


def _factors(axis: int, start: int, length: int) -> np.ndarray:
    """`[length]` uint64, odd: SplitMix64 (Steele et al., 2014) of the indices from `start`, seeded by the axis."""
    state = np.arange(start + 1, start + length + 1, dtype=np.uint64) + np.uint64(axis << 40)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)
