"""A folder of checkpoints, written by Orbax (https://orbax.readthedocs.io).

A checkpoint holds the leaves of a tree under their paths, not the tree's classes, so that any tree with the same paths,
shapes and dtypes restores it, and a mismatch can be named. Typed PRNG keys are stored as their key data.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from moe_jax.errors import MendableError
from moe_jax.types import ArrayTree


class CheckpointError(MendableError, RuntimeError):
    """A checkpoint that cannot be used as asked; the message names it and says what to do."""


class CheckpointStore:
    """The checkpoints of one stage of a run, the newest `max_to_keep` of them, as a context manager.

    A checkpoint appears whole or not at all: Orbax writes it beside its place and renames it. Saving copies the arrays
    before it returns, so that they may be donated, and writes in the background unless `is_async` is False.
    """

    def __init__(self, folder: str | Path, max_to_keep: int = 2, is_async: bool = True) -> None:
        """Opens a folder of checkpoints, made if missing, and removes what killed processes left half-written.

        Args:
          folder: its path; nobody else may be writing there.
          max_to_keep: how many checkpoints stay.
          is_async: write in the background.
        """
        # Imported here, so that commands which touch no checkpoint start without Orbax.
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self._args = ocp.args
        # Removing a folder takes many steps, any of which a kill may interrupt; moving it away takes one.
        self._trash = self.folder / "deleted"
        # Orbax's own cleaning runs later, in the background, and leaves a whole one that only lacks its last rename.
        for leftover in [self._trash, *self.folder.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            todelete_subdir=self._trash.name,
            enable_async_checkpointing=is_async,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Lists the steps of the complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: ArrayTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves a tree.

        Args:
          step: a step that is not saved yet.
          tree: pytree of JAX or NumPy arrays, typed PRNG keys included.
          metadata: JSON-able facts to keep with it.

        Raises:
          CheckpointError: if the step exists already.
          TypeError: if a leaf is no array.
        """
        if step in self._manager.all_steps():
            raise CheckpointError(f"checkpoint {self.path(step)} exists already; delete it to write step {step} again")
        self.wait()
        shutil.rmtree(self._trash, ignore_errors=True)
        leaves = _named_leaves(tree)
        facts = {name: _facts(leaf) | {"sha256": _digest(leaf)} for name, leaf in leaves.items()}
        key_kinds = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)}
        # Orbax refuses arrays without numbers; their shape in the facts says all there is.
        state = {name: _as_data(leaf) for name, leaf in leaves.items() if leaf.size}
        self._manager.save(
            step,
            args=self._args.Composite(
                state=self._args.StandardSave(state),
                facts=self._args.JsonSave({"leaves": facts, "key_kinds": key_kinds, "metadata": dict(metadata or {})}),
            ),
            force=True,
        )

    def restore(self, step: int, like: ArrayTree) -> ArrayTree:
        """Restores a tree, bit for bit.

        Args:
          step: the step.
          like: tree of arrays or `jax.ShapeDtypeStruct` with the paths, shapes, dtypes and shardings to restore to;
            NumPy arrays come back as NumPy arrays.

        Returns:
          A tree of the structure of `like`.

        Raises:
          CheckpointError: if the step is missing, its leaves differ from `like` (naming them), or it is damaged.
        """
        recorded = self._read_facts(step)
        facts = recorded["leaves"]
        wanted = _named_leaves(like)
        if problems := _differences(facts, {name: _facts(leaf) for name, leaf in wanted.items()}):
            raise CheckpointError(f"checkpoint {self.path(step)} does not fit: {'; '.join(problems[:5])}")
        targets = {name: _target(leaf) for name, leaf in wanted.items() if leaf.size}
        try:
            args = self._args.Composite(state=self._args.StandardRestore(targets))
            state = self._manager.restore(step, args=args).state
        except Exception as error:
            # TensorStore raises many types for a damaged file; all mean the same to the reader.
            raise self._damaged(step, str(error).splitlines()[0]) from error
        leaves = []
        for name, leaf in wanted.items():
            data = state[name] if leaf.size else np.zeros(*_shape_dtype(leaf))
            restored = _as_leaf(data, leaf, recorded["key_kinds"].get(name))
            if _digest(restored) != facts[name]["sha256"]:
                raise self._damaged(step, f"the contents of {name} have changed since they were saved")
            leaves.append(restored)
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata that was saved with a step.

        Raises:
          CheckpointError: if the step is missing or damaged.
        """
        return self._read_facts(step)["metadata"]

    def wait(self) -> None:
        """Waits until every checkpoint is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and stops the background threads."""
        self._manager.close()
        shutil.rmtree(self._trash, ignore_errors=True)

    def _read_facts(self, step: int) -> dict[str, Any]:
        """Reads what `save` recorded beside the arrays."""
        if step not in self._manager.all_steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {known}")
        try:
            return self._manager.restore(step, args=self._args.Composite(facts=self._args.JsonRestore())).facts
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(step, str(error).splitlines()[0]) from error

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        """Builds the error of a damaged checkpoint."""
        others = [other for other in self.steps() if other != step]
        rest = f"step {others[-1]}" if others else "the beginning"
        return CheckpointError(
            f"checkpoint {self.path(step)} is damaged ({reason}); delete that folder to go on from {rest}"
        )


def _named_leaves(tree: ArrayTree) -> dict[str, Any]:
    """Returns path -> leaf, refusing leaves that are no arrays."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"leaf {name!r} is {type(leaf).__name__}, not an array")
    return leaves


def _is_key(leaf: Any) -> bool:
    """Tells whether a leaf is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _facts(leaf: Any) -> dict[str, Any]:
    """Describes a leaf by shape and dtype, in JSON."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _as_data(leaf: Any) -> Any:
    """Returns the plain array behind a leaf."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Returns shape and dtype of the plain array behind a leaf, which may be a `ShapeDtypeStruct`."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return data.shape, data.dtype


def _target(leaf: Any) -> Any:
    """Describes to Orbax what to restore a leaf to."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    if _is_key(leaf) or getattr(leaf, "sharding", None) is None:
        return jax.ShapeDtypeStruct(*_shape_dtype(leaf), sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _as_leaf(data: Any, like: Any, key_kind: str | None) -> Any:
    """Turns a restored plain array into the kind of leaf that `like` is."""
    if isinstance(like, np.ndarray | np.generic):
        return np.asarray(data)
    if not getattr(like, "committed", getattr(like, "sharding", None) is not None):
        # Arrays bound to a device are another program to jit: a restart would compile everything once more.
        data = jax.numpy.asarray(np.asarray(data))
    return jax.numpy.asarray(data) if key_kind is None else jax.random.wrap_key_data(data, impl=key_kind)


def _digest(leaf: Any) -> str:
    """Returns the SHA-256 of a leaf's bytes: Orbax itself does not notice flipped bits."""
    return hashlib.sha256(np.asarray(_as_data(leaf)).tobytes()).hexdigest()


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Phrases how the leaves of a checkpoint differ from those that are asked for."""
    problems = [f"it lacks {name}" for name in wanted.keys() - saved.keys()]
    problems += [f"it holds {name}, which is not asked for" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        have = (saved[name]["dtype"], saved[name]["shape"])
        want = (wanted[name]["dtype"], wanted[name]["shape"])
        if have != want:
            problems.append(f"{name} is {have[0]}{have[1]}, expected {want[0]}{want[1]}")
    return sorted(problems)
