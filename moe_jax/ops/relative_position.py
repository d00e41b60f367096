"""Relative positions in buckets (T5, 1910.10683, section 2.1): near distances by themselves, far ones together.

With N buckets for one direction, half of them exact (X = N / 2), and M the distance from which on all share the last:

    b(n) = n                                                       n < X
    b(n) = min(N - 1, X + floor(log(n / X) / log(M / X) * (N - X)))   else

An encoder, which sees both sides, gives half of its buckets to keys that lie ahead; a decoder has none for these.
"""

import math

import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array

_MOST_DISTANT = 2**20  # of what the table of buckets is made for


def check_buckets(num_buckets: int, max_distance: int, is_bidirectional: bool) -> None:
    """Refuses settings of `relative_position_buckets` that leave nothing to tell apart.

    Raises:
      ValueError: too few buckets, or a distance that exact buckets cover already, or above 2**20.
    """
    one_side = num_buckets // 2 if is_bidirectional else num_buckets
    if one_side < 2 or not one_side // 2 < max_distance <= _MOST_DISTANT:
        raise ValueError(
            f"num_buckets={num_buckets} must leave at least 2 for each direction, and max_distance={max_distance} be "
            f"more than the {one_side // 2} that have a bucket of their own, and at most {_MOST_DISTANT}"
        )


def relative_position_buckets(relative: Array, *, num_buckets: int, max_distance: int, is_bidirectional: bool) -> Array:
    """The bucket of each relative position.

    Args:
      relative: `[...]` int, the key's position minus the query's.
      num_buckets: of both directions together; 32 in T5.
      max_distance: M; 128 in T5.
      is_bidirectional: whether keys ahead have buckets of their own, the second half; else they share bucket 0.

    Returns:
      `[...]` int32 in `[0, num_buckets)`.

    Raises:
      ValueError: see `check_buckets`.
    """
    check_buckets(num_buckets, max_distance, is_bidirectional)
    one_side = num_buckets // 2 if is_bidirectional else num_buckets
    distance = jnp.abs(relative) if is_bidirectional else jnp.maximum(-relative, 0)
    bucket = jnp.asarray(_bucket_table(one_side, max_distance))[jnp.minimum(distance, max_distance)]
    return bucket + one_side * (relative > 0) if is_bidirectional else bucket


def _bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """`[M + 1]` int32 bucket of each distance, in NumPy float32: accelerators round logarithms differently."""
    num_exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact)
    scaled = np.log(ratio) / np.float32(math.log(max_distance / num_exact)) * np.float32(num_buckets - num_exact)
    far = np.minimum(num_exact + scaled.astype(np.int32), num_buckets - 1)
    return np.where(distance < num_exact, distance, far).astype(np.int32)
