"""Small questions about pytrees of arrays that every layer asks; no flax, so that the lowest layers may ask too."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


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
