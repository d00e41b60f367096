"""The metadata of a GGUF file, read key by key with checks; what nobody reads can be refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.store import CheckpointError


class Metadata:
    """Typed access to the metadata of a file, which remembers the keys that were asked for.

    Attributes:
      path: of the file.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self._values = file.metadata
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """Returns a value, or None."""
        self._read.add(key)
        return self._values.get(key)

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        """Builds the error of a value that does not fit."""
        shown = "missing" if found is None else f"{found!r:.200}"
        return CheckpointError(f"{self.path}: metadata key {key!r} is {shown}, expected {expected}")

    def expect(self, key: str, *allowed: object) -> None:
        """Refuses a value that is not among those allowed; None stands for a missing key."""
        value = self.get(key)
        if isinstance(value, np.ndarray) or value not in allowed:
            raise self.error(key, value, " or ".join(repr(a) for a in allowed if a is not None))

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns an integer of at least `least`."""
        value = self._get_or(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number, float32 in the file, as the shortest decimal that rounds to it."""
        value = self._get_or(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise self.error(key, value, "a positive number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        """Returns a bool."""
        value = self._get_or(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Returns a string."""
        value = self._get_or(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Returns a list of strings."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(key, value, "a list of strings")
        return value

    def numbers(self, key: str, length: int) -> np.ndarray:
        """Returns `[length]` numbers."""
        value = self.get(key)
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self.error(key, value, f"a list of {length} numbers")
        return value

    def token_id(self, name: str, num_tokens: int) -> int | None:
        """Returns the id of a special token such as "eos", or None if the file names none."""
        key = f"tokenizer.ggml.{name}_token_id"
        if self.get(key) is None:
            return None
        if (value := self.count(key, least=0)) >= num_tokens:
            raise self.error(key, value, f"less than {num_tokens}, the size of the vocabulary")
        return value

    def refuse_unread(self, prefix: str, but: tuple[str, ...] = ()) -> None:
        """Refuses keys below `prefix` that were not asked for and do not end in one of `but`."""
        unread = [key for key in self._values if key.startswith(prefix) and key not in self._read]
        if refused := [key for key in unread if not key.endswith(but)]:
            found = ", ".join(f"{key} = {self._values[key]!r:.80}" for key in refused)
            raise CheckpointError(
                f"{self.path} has metadata that are not handled and may change the result: {found}; use the model's "
                "Hugging Face folder instead"
            )

    def _get_or(self, key: str, default: Any) -> Any:
        """Returns a value, or the default if the key is missing."""
        value = self.get(key)
        return default if value is None else value
