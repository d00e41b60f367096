"""The leaves of a tree as a checkpoint holds them: plain arrays under their paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.types import ArrayTree


def named_leaves(tree: ArrayTree) -> dict[str, Any]:
    """Returns path -> leaf, refusing leaves that are no arrays."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"leaf {name!r} is {type(leaf).__name__}, not an array")
    return leaves


def is_key(leaf: Any) -> bool:
    """Tells whether a leaf is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe_leaf(leaf: Any) -> dict[str, Any]:
    """Describes a leaf by shape and dtype, in JSON."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def as_data(leaf: Any) -> Any:
    """Returns the plain array behind a leaf."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Returns shape and dtype of the plain array behind a leaf, which may be a `ShapeDtypeStruct`."""
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return data.shape, data.dtype


def is_placed(leaf: Any) -> bool:
    """Tells whether a leaf is bound to devices. If not it must stay so: jit would compile another program for it."""
    return getattr(leaf, "committed", getattr(leaf, "sharding", None) is not None)


def restore_target(leaf: Any) -> Any:
    """Describes to Orbax what to restore a leaf to."""
    if is_key(leaf) or not is_placed(leaf):
        return np.empty(*shape_and_dtype(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def as_leaf(data: Any, like: Any, key_kind: str | None) -> Any:
    """Turns a restored plain array into the kind of leaf that `like` is."""
    if isinstance(like, np.ndarray | np.generic):
        return np.asarray(data)
    return jax.numpy.asarray(data) if key_kind is None else jax.random.wrap_key_data(data, impl=key_kind)


def describe_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Phrases how the leaves of a checkpoint differ from those that are asked for."""
    problems = [f"it lacks {name}" for name in wanted.keys() - saved.keys()]
    problems += [f"it holds {name}, which is not asked for" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        have = (saved[name]["dtype"], saved[name]["shape"])
        want = (wanted[name]["dtype"], wanted[name]["shape"])
        if have != want:
            problems.append(f"{name} is {have[0]}{have[1]}, expected {want[0]}{want[1]}")
    return sorted(problems)
