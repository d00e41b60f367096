"""Files that are either the old one or the new one, never half of one, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from moe_jax.errors import MendableError

_PARTIAL = ".partial"


class WriteError(MendableError, OSError):
    """A file that cannot be written; the message says why and what to do."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file through a neighbour and a rename, so that a reader never sees a part of it.

    Args:
      path: the file; missing parent folders are made.
      data: its whole content; text is written as UTF-8.

    Raises:
      WriteError: if the disk is full or cannot be written; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        # The rename itself is durable only once the folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise WriteError(
            f"cannot write {path} ({error.strerror}); make room or choose another folder, then run the same command "
            "again"
        ) from error


def remove_partial_files(folder: Path) -> None:
    """Removes what killed processes left of their `write_atomic` below a folder, which nobody else may be writing.

    Runs inside the folder, such as the trials of a sweep, clean up after themselves: another process may have them.
    """
    inner = {status.parent for status in folder.rglob("status.json")} - {folder}
    for path in folder.rglob(f".*{_PARTIAL}"):
        if inner.isdisjoint(path.parents):
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, keys in their own order, with a final newline, atomically; tuples become lists."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: if the file is not JSON, naming it.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
