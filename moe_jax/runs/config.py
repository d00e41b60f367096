"""Configuration files of `ml_collections`, their overrides on the command line, and their record as JSON.

`configs/<name>.py` defines `get_config() -> ConfigDict`; `moe_jax.runs.sections` takes each part of it inside.
"""

from __future__ import annotations

import ast
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.runs.sections import ConfigError, convert_value, describe_type, nearest_known


def load_config(path_or_name: str | Path) -> ConfigDict:
    """Loads the configuration that a Python file describes.

    Args:
      path_or_name: a `.py` file with `get_config()`, or a bare name for `configs/<name>.py` below the current folder.

    Returns:
      What `get_config()` returns.

    Raises:
      ConfigError: if the file is missing (naming the nearest one), fails, or does not return a `ConfigDict`.
    """
    path = Path(path_or_name)
    if not path.suffix:
        path = Path("configs") / f"{path_or_name}.py"
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py") if p.stem != "__init__")
        raise ConfigError(f"config file {path} does not exist{nearest_known(str(path), known)}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except Exception as error:
        raise ConfigError(f"config file {path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config file {path} must define get_config() returning an ml_collections.ConfigDict")
    return config


def override(config: ConfigDict, assignments: Mapping[str, str]) -> ConfigDict:
    """Replaces values of a configuration by what was typed on a command line.

    Args:
      config: the configuration; left as it is.
      assignments: dotted key -> text. The text is read as the type of the value that it replaces: `true`/`false`,
        numbers, tuples as `3,4` or `(3, 4)`; where the value is None, as a Python literal or else a string.

    Returns:
      A new configuration.

    Raises:
      ConfigError: for an unknown key, a section instead of a key, or a text of the wrong type.
    """
    values = config.to_dict()
    for key, text in assignments.items():
        *parents, last = key.split(".")
        holder = values
        for depth, part in enumerate([*parents, last]):
            if not isinstance(holder, dict) or part not in holder:
                where = ".".join(["config", *key.split(".")[:depth]])
                known = holder if isinstance(holder, dict) else ()
                raise ConfigError(f"unknown key config.{key}: {where} has no {part!r}{nearest_known(part, known)}")
            if depth < len(parents):
                holder = holder[part]
        if isinstance(holder[last], dict):
            raise ConfigError(f"config.{key} is a section; set one of its keys: {', '.join(sorted(holder[last]))}")
        holder[last] = _parse(text, holder[last], f"config.{key}")
    return ConfigDict(values)


def to_json(config: ConfigDict) -> str:
    """Writes a resolved configuration as JSON with sorted keys and a final newline; equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote; lists become tuples again, since a config holds no lists."""
    return ConfigDict(_with_tuples(json.loads(text)))


def differing_keys(left: ConfigDict, right: ConfigDict) -> list[str]:
    """Lists the dotted keys whose values differ between two configurations, or that only one of them has."""
    a, b = flatten(left), flatten(right)
    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key])


def describe_differences(left: ConfigDict, right: ConfigDict, left_name: str, right_name: str) -> str:
    """Phrases which values differ between two configurations.

    Args:
      left: a configuration.
      right: another.
      left_name: how the message calls the first, such as "recorded".
      right_name: how it calls the second.

    Returns:
      "training.steps: 10 recorded, 20 now; ..." or "" if they are equal.
    """
    a, b = flatten(left), flatten(right)
    return "; ".join(
        f"{key}: {_told(key, a)} {left_name}, {_told(key, b)} {right_name}" for key in differing_keys(left, right)
    )


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Flattens a configuration to dotted keys, in its own order; an empty section stays as an empty dict."""
    flat: dict[str, Any] = {}
    for key, value in _with_tuples(config.to_dict()).items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(ConfigDict(value)).items()}
        else:
            flat[key] = value
    return flat


def _told(key: str, values: Mapping[str, Any]) -> str:
    """A value in the words of a message."""
    return repr(values[key]) if key in values else "not set"


def _with_tuples(value: Any) -> Any:
    """Replaces every list by a tuple."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _parse(text: str, current: Any, name: str) -> Any:
    """Reads a command line's text as the type of the value that it replaces."""
    if isinstance(current, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name} expects true or false, got {text!r}")
        return text.lower() == "true"
    if isinstance(current, int | float):
        try:
            return type(current)(text)
        except ValueError:
            raise ConfigError(f"{name} expects {describe_type(type(current))}, got {text!r}") from None
    if isinstance(current, str):
        return text
    if not isinstance(current, list | tuple):
        return _literal(text)
    value = _literal(text)
    if isinstance(value, str):
        value = tuple(_literal(part) for part in text.split(",")) if text else ()
    elif not isinstance(value, list | tuple):
        value = (value,)
    return tuple(convert_value(item, type(current[0]), name) for item in value) if current else tuple(value)


def _literal(text: str) -> Any:
    """Reads a Python literal; anything else is the string itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
