"""Attributes of a public model's `config.json`: all are handled, known to have no effect, or refused by name."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig, LayerKind
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.routers import ROUTERS
from moe_jax.routing import get_rule, rule_settings
from moe_jax.routing.rule import settings_of

# Activations by their names in `transformers`, and ours.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}

# What every config of `transformers` may hold, without effect on what a model computes in evaluation.
_WITHOUT_EFFECT = (
    *("_attn_implementation", "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype"),
    *("early_stopping", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "label2id"),
    *("length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beams"),
    *("output_attentions", "output_hidden_states", "output_past", "problem_type", "return_dict"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"),
)


def read_attributes(
    hf: Mapping[str, Any],
    family: str,
    *,
    handled: Mapping[str, Any],
    only: Mapping[str, Any],
    without_effect: Iterable[str],
) -> dict[str, Any]:
    """The attributes that a family reads, with its defaults where the file has none; `eos_token_id` becomes a tuple.

    Args:
      hf: the content of `config.json`.
      family: its `model_type`, for messages.
      handled: what the family reads, with its defaults.
      only: what it does not read, with the one value that we can run.
      without_effect: what changes nothing in evaluation.

    Raises:
      ValueError: an attribute of another model type, with a value that we cannot run, or unknown.
    """
    if hf.get("model_type", family) != family:
        raise ValueError(f"this is a config of model_type {hf['model_type']!r}, expected {family!r}")
    known = {*handled, *only, *without_effect, *_WITHOUT_EFFECT}
    if unknown := sorted(set(hf) - known):
        raise ValueError(
            f"{family} has unknown attributes {', '.join(f'{name}={hf[name]!r}' for name in unknown)}: they may change "
            "what the model computes; remove those that do not"
        )
    for name, value in only.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{family} with {name}={hf[name]!r} is not supported, only {name}={value!r}")
    values = {name: hf.get(name, default) for name, default in handled.items()}
    for name, default in handled.items():
        if name == "eos_token_id":
            values[name] = _stop_ids(values[name])
        else:
            _check_type(name, values[name], default)
    return values


def _stop_ids(value: object) -> tuple[int, ...]:
    """The end of a text in a config: a token, several, or none."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    for one in ids:
        _check_type("eos_token_id", one, 0)
    return ids


def _check_type(name: str, value: object, default: object) -> None:
    """Refuses a value of another type than the default's; where that is None, a number is meant."""
    expected: tuple[type, ...] = (type(default),)
    if isinstance(default, float):
        expected = (float, int)
    elif default is None:
        expected = (int, type(None))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise ValueError(f"{name}={value!r} must be {' or '.join(kind.__name__ for kind in expected)}")


def activation(name: str, attribute: str) -> str:
    """Our name of an activation.

    Raises:
      ValueError: an unknown one, naming the attribute that asked for it.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"{attribute}={name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(ours: object) -> object:
    """Their name of an activation, or ours where they have none."""
    return next((theirs for theirs, mine in ACTIVATIONS.items() if mine == ours), ours)


def layer_kinds(num_layers: int, is_sparse: Callable[[int, int], bool], step: int) -> tuple[LayerKind, ...]:
    """The kinds of layers 0, 1, ..., from whether a layer is sparse at that step.

    Raises:
      ValueError: a number of layers that cannot be meant.
    """
    if not 1 <= num_layers <= 10_000:
        raise ValueError(f"a config of {num_layers} layers, expected 1 to 10,000")
    return tuple("moe" if is_sparse(index, step) else "dense" for index in range(num_layers))


def find_step(layers: tuple[LayerKind, ...], is_sparse: Callable[[int, int], bool], field: str) -> int:
    """The step of sparse layers that gives these layers.

    Raises:
      ValueError: layers of no regular step; the message names the config's field.
    """
    for step in range(len(layers) + 2):
        if layer_kinds(len(layers), is_sparse, step) == layers:
            return step
    raise ValueError(f"{field}={layers} has no regular step of MoE layers, which this family needs")


def check_written(config: EncoderDecoderConfig, written: EncoderDecoderConfig, family: str) -> None:
    """Refuses to write a config that would not be read as the same architecture.

    Args:
      config: what was to be written.
      written: what is read from it.
      family: for messages.

    Raises:
      ValueError: the fields that the family cannot express, with the values that it has for them.
    """
    ours, theirs = _spell_out(config), _spell_out(written)
    if lost := [f"{name}={value!r} (it has {theirs[name]!r})" for name, value in ours.items() if value != theirs[name]]:
        raise ValueError(f"a {family} model cannot have {', '.join(lost)}")


def _spell_out(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The fields that make the architecture, with the values that stand behind defaults."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("backend", "stats_level", "compute_dtype", "capacity", "capacity_unit", "capacity_per_sequence"):
        del fields[name]
    router = settings_of(ROUTERS[config.router].__init__)
    del router["key"]
    return fields | {
        "capacity": config.token_capacity,
        "head_width": [
            config.head_width or config.width // heads for heads in (config.encoder_heads, config.decoder_heads)
        ],
        "expert_settings": settings_of(EXPERTS[config.expert]) | dict(config.expert_settings),
        "router_settings": router | dict(config.router_settings),
        "rule_settings": rule_settings(get_rule(config.rule, **config.rule_settings)),
    }
