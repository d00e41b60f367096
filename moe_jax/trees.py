"""Small questions about arrays and trees of them that every layer asks; no flax, so that the lowest layers may too."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def count_parameters(tree: Any) -> int:
    """Counts the numbers in a tree.

    Args:
      tree: pytree of arrays, or of `jax.ShapeDtypeStruct`, since only shapes are read.

    Returns:
      Sum of the leaves' sizes; 0 for an empty tree.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def all_finite(tree: Any) -> jax.Array:
    """Tells whether a tree is free of NaN and infinity; works under `jit` and `vmap`.

    Args:
      tree: pytree of arrays of any dtype; only floating and complex leaves can fail.

    Returns:
      `[]` bool.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all() if leaves else jnp.array(True)


def cut(array: jax.Array, index: int | slice) -> jax.Array:
    """`array[index]` along the leading axis; of an array on one CPU device a view, which keeps the whole alive."""
    devices = array.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return array[index]
    return jax.device_put(np.asarray(array)[index], array.sharding, may_alias=True)
