"""A folder of checkpoints, written by Orbax (https://orbax.readthedocs.io).

A checkpoint holds the leaves of a tree under their paths, not the tree's classes, so that any tree with the same paths,
shapes and dtypes restores it, and a mismatch can be named. Typed PRNG keys are stored as their key data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.checkpoints.digest import digest_arrays
from moe_jax.checkpoints.leaves import (
    as_data,
    as_leaf,
    describe_differences,
    describe_leaf,
    is_key,
    named_leaves,
    restore_target,
    shape_and_dtype,
)
from moe_jax.errors import MendableError
from moe_jax.hosts import any_host, gather_texts, is_first_host
from moe_jax.types import ArrayTree

_GOES_ON = "it goes on from the last checkpoint"


class CheckpointError(MendableError, RuntimeError):
    """A checkpoint that cannot be used as asked; the message names it and says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written; `reason` says what is wrong with them."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Restored(NamedTuple):
    """The newest checkpoint that is whole.

    Attributes:
      step: its step.
      tree: its contents.
      damaged: newer ones that were set aside, step -> what is wrong with it.
    """

    step: int
    tree: ArrayTree
    damaged: dict[int, str]

    @property
    def warnings(self) -> list[str]:
        """What people must be told of the damaged ones, in a line each."""
        return [
            f"the checkpoint of step {step} is damaged ({reason}) and was set aside in the folder `damaged` beside it; "
            f"going on from step {self.step}"
            for step, reason in self.damaged.items()
        ]


class CheckpointStore:
    """The checkpoints of one stage of a run, as a context manager.

    A checkpoint appears whole or not at all: Orbax writes it beside its place and renames it. Saving copies the arrays
    before it returns, so that they may be donated, and writes in the background unless `is_async` is False. Arrays may
    be split over devices and hosts, and are restored to any other mesh and number of hosts. With several hosts, which
    share the folder, all must call every method together.
    """

    def __init__(self, folder: str | Path, max_to_keep: int = 2, is_async: bool = True, keep_every: int = 0) -> None:
        """Opens a folder of checkpoints, made if missing, and removes what killed processes left half-written.

        Args:
          folder: its path; nobody else may be writing there.
          max_to_keep: how many of the newest checkpoints stay.
          is_async: write in the background.
          keep_every: steps that are multiples of it stay for good; 0 for none.
        """
        # Imported here, so that commands which touch no checkpoint start without Orbax.
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self._args = ocp.args
        self._reader = ocp.StandardCheckpointHandler()
        # Removing a folder takes many steps, any of which a kill may interrupt; moving it away takes one.
        self._trash = self.folder / "deleted"
        self._remove_leftovers()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            keep_period=keep_every or None,
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
          CheckpointError: if the step exists already, or this or the checkpoint before it cannot be written.
          TypeError: if a leaf is no array.
        """
        if step in self._manager.all_steps():
            raise CheckpointError(f"checkpoint {self.path(step)} exists already; delete it to write step {step} again")
        self.wait()
        self._remove_leftovers()
        leaves = named_leaves(tree)
        data = {name: as_data(leaf) for name, leaf in leaves.items()}
        self._require_room(sum(array.nbytes for array in data.values()))
        digests = digest_arrays(data)
        facts = {
            "leaves": {name: describe_leaf(leaf) | {"digest": digests[name]} for name, leaf in leaves.items()},
            "key_kinds": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if is_key(leaf)},
            "metadata": dict(metadata or {}),
        }
        # Orbax refuses arrays without numbers; their shape in the facts says all there is.
        state = {name: array for name, array in data.items() if array.size}
        try:
            self._manager.save(
                step,
                args=self._args.Composite(
                    state=self._args.StandardSave(state),
                    facts=self._args.JsonSave(facts | {"sha256": _digest_json(facts)}),
                ),
                force=True,
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background.

        Raises:
          CheckpointError: if one could not be written.
        """
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritten(error) from error
        return self._manager.is_saving_in_progress()

    def restore(self, step: int, like: ArrayTree) -> ArrayTree:
        """Restores a tree, bit for bit.

        Args:
          step: the step.
          like: tree of arrays or `jax.ShapeDtypeStruct` with the paths, shapes, dtypes and shardings to restore to;
            NumPy arrays come back as NumPy arrays.

        Returns:
          A tree of the structure of `like`.

        Raises:
          DamagedError: if its files are damaged.
          CheckpointError: if the step is missing, or its leaves differ from `like` (naming them).
        """
        recorded, problem = self._read_facts(step), ""
        facts = recorded["leaves"]
        wanted = named_leaves(like)
        if problems := describe_differences(facts, {name: describe_leaf(leaf) for name, leaf in wanted.items()}):
            raise CheckpointError(f"checkpoint {self.path(step)} does not fit: {'; '.join(problems[:5])}")
        targets = {name: restore_target(leaf) for name, leaf in wanted.items() if leaf.size}
        try:
            # Without the manager, whose barriers would keep the other hosts waiting when one meets damage.
            state = self._reader.restore(self.path(step) / "state", args=self._args.StandardRestore(targets))
        except Exception as error:
            # TensorStore raises many types for a damaged file; all mean the same to the reader.
            problem = _first_line(error)
        self._require_whole(step, problem)
        data = {name: state[name] if leaf.size else np.zeros(*shape_and_dtype(leaf)) for name, leaf in wanted.items()}
        for name, digest in digest_arrays(data).items():
            if digest != facts[name]["digest"]:
                raise self._damaged(step, f"the contents of {name} have changed since they were saved")
        leaves = [as_leaf(data[name], leaf, recorded["key_kinds"].get(name)) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_newest(self, like: ArrayTree) -> Restored | None:
        """Restores the newest checkpoint that is whole and moves damaged newer ones to the subfolder `damaged`.

        Args:
          like: as for `restore`.

        Returns:
          The checkpoint, or None if there is none at all.

        Raises:
          CheckpointError: if all are damaged, which leaves them as they are, or one does not fit `like`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                tree = self.restore(step, like)
            except DamagedError as error:
                damaged[step] = error.reason
                continue
            if damaged:
                self._set_aside(list(damaged))
            return Restored(step, tree, damaged)
        if damaged:
            listed = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({listed}); check the disk, put back a copy, or delete "
                "that folder to begin this stage anew"
            )
        return None

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata that was saved with a step.

        Raises:
          CheckpointError: if the step is missing or damaged.
        """
        return self._read_facts(step)["metadata"]

    def wait(self) -> None:
        """Waits until every checkpoint is on disk.

        Raises:
          CheckpointError: if one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits and stops the background threads."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._unwritten(error) from error
        self._remove_leftovers()

    def _read_facts(self, step: int) -> dict[str, Any]:
        """Reads what `save` recorded beside the arrays."""
        if step not in self._manager.all_steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {known}")
        facts, problem = {}, ""
        try:
            facts = json.loads((self.path(step) / "facts" / "metadata").read_text())
            if facts.pop("sha256") != _digest_json(facts):
                problem = "its facts have changed since they were saved"
        except (ValueError, OSError, KeyError, AttributeError) as error:
            problem = _first_line(error)
        self._require_whole(step, problem)
        return facts

    def _require_whole(self, step: int, problem: str) -> None:
        """Raises on every host what any of them found to be damaged."""
        if problem := next(filter(None, gather_texts(problem)), ""):
            raise self._damaged(step, problem)

    def _require_room(self, size: int) -> None:
        """Refuses to begin what cannot end: Orbax's threads tell a full disk at great length."""
        free = shutil.disk_usage(self.folder).free
        if any_host(free < size + 2**20):
            raise CheckpointError(
                f"a checkpoint of {size / 2**20:.0f} MiB does not fit into {self.folder} ({free / 2**20:.0f} MiB "
                f"free); make room, then run the same command again: {_GOES_ON}"
            )

    def _remove_leftovers(self) -> None:
        """Removes deleted and half-written checkpoints; Orbax's own cleaning leaves one that only lacks its rename."""
        if is_first_host():
            for leftover in [self._trash, *self.folder.glob("*.orbax-checkpoint-tmp*")]:
                shutil.rmtree(leftover, ignore_errors=True)

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints out of the way of new ones of the same step."""
        if is_first_host():
            for step in steps:
                target = self.folder / "damaged" / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                self.path(step).rename(target)
        gather_texts("")  # nobody lists the folder before it is done
        self._manager.reload()

    def _damaged(self, step: int, reason: str) -> DamagedError:
        """Builds the error of a damaged checkpoint."""
        others = [other for other in self.steps() if other != step]
        rest = f"step {others[-1]}" if others else "the beginning"
        message = f"checkpoint {self.path(step)} is damaged ({reason}); delete that folder to go on from {rest}"
        return DamagedError(message, reason)

    def _unwritten(self, error: Exception) -> CheckpointError:
        """Builds the error of a checkpoint that could not be written, and frees the space that it took."""
        self._remove_leftovers()
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder} ({_first_line(error)}); mend the disk, then run the "
            f"same command again: {_GOES_ON}"
        )


def _digest_json(value: dict[str, Any]) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if there is none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
