"""From a section of a configuration to the frozen dataclass that the code works with.

The border is strict: an unknown key is refused by naming the nearest valid one, a value of the wrong type by naming the
right one, so that behind it nothing needs checking again.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from ml_collections import ConfigDict

from moe_jax.errors import MendableError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")


class ConfigError(MendableError, ValueError):
    """A configuration that the person who wrote it can mend; the message is one line."""


def section(dataclass_type: type[_T], values: Mapping[str, Any] | ConfigDict, name: str = "config") -> _T:
    """Builds a frozen dataclass from a section of a configuration.

    Understands bool, int, float (an int is taken), str, `tuple[X, ...]`, `tuple[X, Y]`, `Literal`, unions with None,
    `Mapping[str, X]` and nested dataclasses.

    Args:
      dataclass_type: the dataclass; its `__post_init__` may raise ValueError for values that make no sense.
      values: the section.
      name: the section's place, for messages, such as "config.training".

    Returns:
      An instance of `dataclass_type`; keys that the section does not mention keep the dataclass's defaults.

    Raises:
      ConfigError: for an unknown key, a missing one without default, a wrong type, or a value that is refused.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    fields = {field.name: field for field in dataclasses.fields(dataclass_type)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {name}.{key}{nearest_known(key, fields)}")
    for key, field in fields.items():
        without_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if without_default and key not in values:
            raise ConfigError(f"{name}.{key} is missing and has no default")
    hints = typing.get_type_hints(dataclass_type)
    try:
        return dataclass_type(
            **{key: convert_value(value, hints[key], f"{name}.{key}") for key, value in values.items()}
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def convert_value(value: Any, hint: Any, name: str) -> Any:
    """Checks a value against a type hint.

    Args:
      value: the value.
      hint: one of the hints that `section` understands.
      name: the value's place, for messages.

    Returns:
      The value in that type: an int becomes a float, a list a tuple, a mapping a dataclass, where the hint says so.

    Raises:
      ConfigError: if it does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            choices = [str(choice) for choice in arguments]
            raise ConfigError(f"{name} has no choice {value!r}{nearest_known(str(value), choices)}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        for member in members[:-1]:
            try:
                return convert_value(value, member, name)
            except ConfigError:
                continue
        return convert_value(value, members[-1], name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section of keys, got {value!r}")
        return section(hint, value, name)
    if origin is tuple and isinstance(value, list | tuple):
        item_hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(item_hints) == len(value):
            pairs = zip(value, item_hints, strict=True)
            return tuple(convert_value(item, item_hint, f"{name}[{i}]") for i, (item, item_hint) in enumerate(pairs))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: convert_value(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # A bool is an int to Python, but not to the person who wrote the config.
    is_right = origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not is_right:
        raise ConfigError(f"{name} expects {describe_type(hint)}, got {value!r} ({type(value).__name__})")
    return value


def nearest_known(word: str, known: Iterable[str]) -> str:
    """Phrases the end of a message about an unknown word.

    Args:
      word: what was written.
      known: what could have been meant.

    Returns:
      "; did you mean …?" with the nearest known word, or "; known: …" with all of them, or "" if there are none.
    """
    known = sorted(known)
    if close := difflib.get_close_matches(word, known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def describe_type(hint: Any) -> str:
    """Names a type hint in the words of a message, such as "an integer"."""
    known = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return known.get(hint, str(hint))
