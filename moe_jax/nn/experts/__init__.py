"""Kinds of experts: pure functions of one expert's parameters and rows; no flax, no parameters.

A kind is a network and how E of them are drawn (`ExpertKind`). `EXPERTS` holds a function for each name, whose
keyword-only arguments are the kind's settings. `lift` makes an expert of any function `[C, D] -> [C, D]`; to use it by
name, in a config too, add a line to `EXPERTS`. `nn.expert_stack.ExpertStack` owns the parameters of any kind.

Other sorts of experts are parts of the layer (`nn.moe`): those that every token passes, those that compute in a latent
space, those that compute nothing, and attention heads (`nn.attention_experts`).
"""

import functools
from collections.abc import Callable
from typing import Any

from moe_jax.nn.experts.deep import deep, deepen
from moe_jax.nn.experts.kind import ExpertKind, lift
from moe_jax.nn.experts.networks import ACTIVATIONS, gated, gpt_oss, mlp
from moe_jax.routing.rule import check_settings, settings_of

__all__ = [
    "ACTIVATIONS",
    "EXPERTS",
    "SWIGLU",
    "ExpertKind",
    "deep",
    "deepen",
    "gated",
    "get_expert_kind",
    "gpt_oss",
    "lift",
    "mlp",
]


def get_expert_kind(name: str, **settings: Any) -> ExpertKind:
    """The kind of that name, with settings; the same object for the same arguments, so that programs compile once.

    Args:
      name: a key of `EXPERTS`.
      settings: values for the kind's own settings, such as `use_bias=True`; hashable.

    Raises:
      ValueError: an unknown name or setting, or a value that the kind refuses; the message lists what is known.
    """
    if name not in EXPERTS:
        raise ValueError(f"unknown expert kind {name!r}; known: {', '.join(EXPERTS)}")
    check_settings(settings, settings_of(EXPERTS[name]), f"expert kind {name!r}")
    return _make(EXPERTS[name], tuple(sorted(settings.items())))


@functools.cache
def _make(make: Callable[..., ExpertKind], settings: tuple[tuple[str, Any], ...]) -> ExpertKind:
    return make(**dict(settings))


EXPERTS: dict[str, Callable[..., ExpertKind]] = {
    "swiglu": gated,
    "geglu": functools.partial(gated, activation="gelu"),
    "mlp": mlp,
    "relu2": functools.partial(mlp, activation="relu2"),
    "gpt_oss": gpt_oss,
    "deep": deep,
}

SWIGLU = get_expert_kind("swiglu").expert
