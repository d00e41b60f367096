"""Rotary positions in a `config.json`: `rope_parameters`, or `rope_theta` and `rope_scaling` in older ones."""

from __future__ import annotations

import math
from typing import Any

from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig
from moe_jax.ops.rotary import yarn_magnitude

# Their names of the settings of each of our `ops.rotary.ROTARIES`, except the base.
NAMES: dict[str, dict[str, str]] = {
    "plain": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_factor",
        "high_freq_factor": "high_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "magnitude",
    },
    "longrope": {
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "original_max_position_embeddings": "original_length",
        "short_mscale": "short_magnitude",
        "long_mscale": "long_magnitude",
    },
}
THEIRS = {"plain": "default"}
_ORIGINAL = "original_max_position_embeddings"


def read_rotary(hub: HubConfig, default_base: float = 10_000.0, default_share: float | None = None) -> dict[str, Any]:
    """The fields `rotary` and `rotary_settings`.

    Args:
      hub: the `config.json`.
      default_base: of the frequencies, where it does not say.
      default_share: of a head that turns, where it does not say; None for a family whose heads turn whole.

    Raises:
      HubError: a kind of rotary positions, or a parameter of one, that is not handled.
    """
    kind, given = _kind_and_parameters(hub)
    base = float(given.pop("rope_theta", default_base))
    name = {"default": "plain"}.get(kind, kind)
    if name not in NAMES:
        known = ", ".join(THEIRS.get(name, name) for name in NAMES)
        raise HubError(f"{hub.source}: rotary positions of type {kind!r} are not supported; known: {known}")
    share = hub.get("partial_rotary_factor", float, default_share or 1.0)
    share = float(given.pop("partial_rotary_factor", share))
    if not 0 < share <= 1 or (share < 1 and default_share is None):
        allowed = "1, since heads of this family turn whole" if default_share is None else "in (0, 1]"
        raise HubError(f"{hub.source}: partial_rotary_factor={share} must be {allowed}")
    settings: dict[str, Any] = {"base": base}
    if _ORIGINAL not in NAMES[name]:
        given.pop(_ORIGINAL, None)
    elif _ORIGINAL not in given:
        given[_ORIGINAL] = hub.count("max_position_embeddings", most=2**40)
    if name == "yarn":
        given = _with_yarn_magnitude(given)
    if name == "longrope":
        given = _with_longrope_magnitude(hub, given)
    for theirs, value in given.items():
        if theirs not in NAMES[name]:
            raise HubError(f"{hub.source}: parameter {theirs}={value!r} of {kind!r} rotary positions is not known")
        settings[NAMES[name][theirs]] = tuple(map(float, value)) if isinstance(value, list) else value
    if "factor" in NAMES[name] and "factor" not in settings:
        raise HubError(f"{hub.source}: rotary positions of type {kind!r} need a factor")
    if share != 1:
        settings["share"] = share
    return {"rotary": name, "rotary_settings": settings}


def write_rotary(config: DecoderConfig) -> dict[str, Any]:
    """The key that `read_rotary` reads."""
    settings = dict(config.rotary_settings)
    written: dict[str, Any] = {"rope_type": THEIRS.get(config.rotary, config.rotary)}
    written["rope_theta"] = settings.pop("base", 10_000.0)
    if "share" in settings:
        written["partial_rotary_factor"] = settings.pop("share")
    ours = {name: theirs for theirs, name in NAMES[config.rotary].items()}
    for name, value in settings.items():
        written[ours[name]] = list(value) if isinstance(value, tuple) else value
    return {"rope_parameters": written}


def _kind_and_parameters(hub: HubConfig) -> tuple[str, dict[str, Any]]:
    """The kind that a config names, and the parameters that it gives, old spelling or new, without those that are null.

    Raises:
      HubError: a parameter that is no positive number, list of them, or switch.
    """
    parts = (
        {"rope_theta": hub.maybe("rope_theta", float)},
        hub.maybe("rope_scaling", dict) or {},
        hub.maybe("rope_parameters", dict) or {},
        {_ORIGINAL: hub.maybe(_ORIGINAL, int)},
    )
    given = {key: value for part in parts for key, value in part.items() if value is not None}
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    for key in ("mrope_section", *(key for key in ("mscale", "mscale_all_dim") if given.get(key) == 0)):
        given.pop(key, None)
    for key, value in given.items():
        if key == "truncate":
            is_fine, wanted = isinstance(value, bool), "true or false"
        elif key in ("short_factor", "long_factor"):
            is_fine, wanted = isinstance(value, list) and all(map(_is_positive, value)), "a list of positive numbers"
        else:
            is_fine, wanted = _is_positive(value), "a positive number"
        if not is_fine:
            raise HubError(f"{hub.source}: {key!r} of the rotary positions must be {wanted}, got {value!r}")
    return str(kind), given


def _is_positive(value: Any) -> bool:
    """Whether it is a positive number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 3e38


def _with_yarn_magnitude(given: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's two weights of the magnitude, as the magnitude that they come to; see `yarn_score_scale`."""
    weight, weight_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if "attention_factor" not in given and weight and weight_all:
        factor = given.get("factor", 1.0)
        given["attention_factor"] = yarn_magnitude(factor, weight) / yarn_magnitude(factor, weight_all)
    return given


def yarn_score_scale(hub: HubConfig, query_width: int) -> float:
    """Factor on the scores of DeepSeek's attention, `magnitude(mscale_all_dim)^2 / sqrt(width)`; 0 for the usual."""
    _, given = _kind_and_parameters(hub)
    if "mscale_all_dim" not in given:
        return 0.0
    return yarn_magnitude(given.get("factor", 1.0), given["mscale_all_dim"]) ** 2 * query_width**-0.5


def _with_longrope_magnitude(hub: HubConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The magnitude of both ranges, which follows from the lengths unless it is given (2402.13753, section 3.2)."""
    factor, usual, original = given.pop("factor", None), given.pop("attention_factor", None), given[_ORIGINAL]
    if {"short_mscale", "long_mscale"} <= given.keys():
        return given
    if original <= 1:
        raise HubError(f"{hub.source}: longrope needs an {_ORIGINAL} above 1, got {original}")
    factor = factor or hub.count("max_position_embeddings", most=2**40) / original
    usual = usual or (1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))
    return {"short_mscale": usual, "long_mscale": usual} | given
