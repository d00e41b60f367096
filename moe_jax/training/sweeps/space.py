"""The space of a sweep: which keys of a configuration vary, and over which values.

config.space = space({
    "optimizer.learning_rate": log_uniform(1e-4, 1e-2),
    "model.num_experts": choice(4, 8, 16),
    "network": variants({"experts": {}, "dense": {"model.layers": ("dense", "dense")}}),
})

An axis is named by the dotted key that it sets; `variants` set several keys at once, or none, and the name is free. In
a configuration an axis is a plain tuple, `("model.num_experts", "choice", 4, 8, 16)`, so that it is recorded as JSON.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_jax.runs import ConfigError
from moe_jax.runs.sections import convert_value, nearest_known, section

Settings = dict[str, Any]  # dotted key -> value
Sections = Mapping[str, type]  # section of the configuration -> the dataclass that it becomes


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of the space.

    Attributes:
      name: the dotted key, or the name of a set of variants.
      kind: "choice", "variants", "uniform", "log_uniform", "integers" or "log_integers".
      arguments: the values; names with pairs of keys and values; or both ends, included.
    """

    name: str
    kind: str
    arguments: tuple[Any, ...]

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values, or the variants' names; None for a range."""
        if self.kind == "variants":
            return tuple(name for name, _ in self.arguments)
        return self.arguments if self.kind == "choice" else None

    @property
    def is_numeric(self) -> bool:
        """Whether values lie on a line."""
        return self.values is None or (self.kind == "choice" and all(type(v) in (int, float) for v in self.values))

    @property
    def is_log(self) -> bool:
        """Whether the line is logarithmic: a range that says so, or choices over more than a factor of 4."""
        if self.kind == "choice":
            return self.is_numeric and min(self.arguments) > 0 and max(self.arguments) > 4 * min(self.arguments)
        return self.kind.startswith("log_")

    def at(self, fraction: float) -> Any:
        """The value at a fraction in [0, 1) of the way: uniform fractions give the axis's own distribution."""
        if self.values is not None:
            return self.values[int(fraction * len(self.values))]
        low, high = self.arguments
        is_integer = self.kind.endswith("integers")
        if is_integer:
            low, high = low - 0.5, high + 0.5  # each integer has the piece of the line around it
        value = low * (high / low) ** fraction if self.is_log else low + fraction * (high - low)
        return min(max(round(value), self.arguments[0]), self.arguments[1]) if is_integer else value

    def settings(self, value: Any) -> Settings:
        """The keys that a value stands for."""
        return dict(dict(self.arguments)[value]) if self.kind == "variants" else {self.name: value}


def choice(*values: Any) -> tuple[Any, ...]:
    """These values, in this order."""
    return ("choice", *values)


def variants(settings: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """Named sets of keys and values; a set may be empty."""
    return ("variants", *((name, tuple(pairs.items())) for name, pairs in settings.items()))


def uniform(low: float, high: float) -> tuple[Any, ...]:
    """A number between the ends."""
    return ("uniform", low, high)


def log_uniform(low: float, high: float) -> tuple[Any, ...]:
    """A positive number between the ends, every factor equally likely."""
    return ("log_uniform", low, high)


def integers(low: int, high: int) -> tuple[Any, ...]:
    """An integer from `low` to `high`, both included."""
    return ("integers", low, high)


def log_integers(low: int, high: int) -> tuple[Any, ...]:
    """A positive integer from `low` to `high`, every factor about equally likely."""
    return ("log_integers", low, high)


KINDS = ("choice", "variants", "uniform", "log_uniform", "integers", "log_integers")


def space(axes: Mapping[str, tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """Puts axes together, as a configuration holds them."""
    return tuple((name, *axis) for name, axis in axes.items())


def read_axes(entries: Sequence[Sequence[Any]], sections: Sections) -> list[Axis]:
    """Reads and checks a space.

    Args:
      entries: what `space` gave.
      sections: the sections of the configuration that is swept.

    Returns:
      The axes, their values in the types that the sections ask for.

    Raises:
      ConfigError: no axis, an unknown kind or key (naming the nearest known), a key set twice, a value of the wrong
        type, ends in the wrong order.
    """
    if not entries:
        raise ConfigError('config.space is empty; give an axis, as in space({"optimizer.learning_rate": choice(1, 2)})')
    axes = [_read_axis(*entry, sections=sections) for entry in entries]
    owners: dict[str, str] = {}
    for axis in axes:
        names = {key for _, pairs in axis.arguments for key, _ in pairs} if axis.kind == "variants" else {axis.name}
        for key in sorted(names):
            if key in owners:
                raise ConfigError(f"config.space sets {key} in two axes, {owners[key]} and {axis.name}; keep one")
            owners[key] = axis.name
    return axes


def apply(config: ConfigDict, settings: Settings) -> ConfigDict:
    """A copy of a configuration with other values; keys that it does not mention are added."""
    values = config.to_dict()
    for key, value in settings.items():
        *parents, last = key.split(".")
        holder = values
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[last] = value
    return ConfigDict(values)


def check_config(config: ConfigDict, sections: Sections, where: str) -> None:
    """Refuses a configuration of which a section refuses its values.

    Raises:
      ConfigError: what is wrong, and at which point of the sweep.
    """
    for name, dataclass_type in sections.items():
        try:
            section(dataclass_type, config.get(name, {}), f"config.{name}")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _read_axis(name: str, kind: str, *arguments: Any, sections: Sections) -> Axis:
    """One axis, checked."""
    where = f"config.space[{name!r}]"
    if kind not in KINDS:
        raise ConfigError(f"{where} has unknown kind {kind!r}{nearest_known(kind, KINDS)}")
    if not arguments:
        raise ConfigError(f"{where} has no values; give at least one")
    if kind == "variants":
        _require_different([variant for variant, _ in arguments], where)
        pairs = [(variant, _convert_pairs(settings, sections, where)) for variant, settings in arguments]
        return Axis(name, kind, tuple(pairs))
    values = tuple(_convert(name, value, sections, where) for value in arguments)
    if kind == "choice":
        _require_different(values, where)
    else:
        _require_ends(name, kind, values, where)
    return Axis(name, kind, values)


def _require_different(values: Sequence[Any], where: str) -> None:
    """Refuses a value that is there twice."""
    if repeated := [value for index, value in enumerate(values) if value in values[:index]]:
        raise ConfigError(f"{where} names {repeated[0]!r} twice")


def _require_ends(name: str, kind: str, ends: tuple[Any, ...], where: str) -> None:
    """Refuses what is no range of that kind."""
    if len(ends) != 2 or not all(type(end) in (int, float) for end in ends) or not ends[0] < ends[1]:
        raise ConfigError(f"{where} is {kind}{ends}, expected two numbers, the lower one first")
    if kind.startswith("log_") and ends[0] <= 0:
        raise ConfigError(f"{where} starts at {ends[0]}; a logarithmic range needs a lower end above 0")
    if kind.endswith("integers") != all(type(end) is int for end in ends):
        raise ConfigError(f"{where} is {kind}{ends}; {name} takes {'numbers' if 'int' in kind else 'integers'}")


def _convert_pairs(pairs: Sequence[Sequence[Any]], sections: Sections, where: str) -> tuple[tuple[str, Any], ...]:
    """The keys and values of a variant, checked."""
    return tuple((key, _convert(key, value, sections, where)) for key, value in pairs)


def _convert(key: str, value: Any, sections: Sections, where: str) -> Any:
    """A value in the type that its key asks for."""
    head, *rest = key.split(".")
    known = {
        f"{name}.{field}": hint
        for name, kind in sections.items()
        for field, hint in typing.get_type_hints(kind).items()
    }
    field = f"{head}.{rest[0]}" if rest else head
    hint = known.get(field)
    for inner in rest[1:]:
        if typing.get_origin(hint) is not Mapping:
            raise ConfigError(f"{where}: {field} has no keys of its own, so there is no {inner!r} in it")
        hint = typing.get_args(hint)[1]
    if hint is None:
        raise ConfigError(f"{where}: unknown key {key!r}{nearest_known(key, known)}")
    return convert_value(value, hint, f"{where}: {key}")
