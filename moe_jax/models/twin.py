"""The dense twin: the model without experts that a mixture-of-experts model must be compared with.

Two controls answer two questions. At equal FLOPs: does sparsity buy anything for the compute of one token? At equal
total parameters: how much of a model that always uses all of its parameters does the sparse one reach? The second
spends many times the FLOPs and bounds what the experts can give.

The twin keeps width, depth, attention, embedding and read-out. Every layer becomes dense, and all have one hidden
width, as dense models do: a mixed config's layers of `dense_hidden` and of K * F meet at their mean. The router
counts, since a token pays for it: a SwiGLU hidden unit has 3 D parameters, so a router of D * E is worth E / 3 units,
and MoE layers alone give the width K * F + E / 3. The nearest whole one is taken; a receipt says how near it is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from moe_jax.models.config import DecoderConfig, LayerKind
from moe_jax.models.cost import model_cost

Match = Literal["flops", "active_parameters", "parameters"]  # properties of `cost.ModelCost`


@dataclasses.dataclass(frozen=True)
class Pair:
    """One quantity of both models, and the twin's over the original's."""

    original: float
    twin: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Receipt:
    """How equal two models are; `dataclasses.asdict` makes it JSON.

    Attributes:
      parameters: all of them.
      active_parameters: those that a token uses.
      flops: forward FLOPs per token.
    """

    parameters: Pair
    active_parameters: Pair
    flops: Pair


def dense_twin(
    config: DecoderConfig, match: Match = "flops", mean_choices: Sequence[float] | None = None
) -> DecoderConfig:
    """Makes the dense config nearest to a mixture-of-experts config in one quantity.

    Args:
      config: has at least one MoE layer.
      match: what to make equal: "flops" per token, "active_parameters" (the same twin, unless experts have biases), or
        "parameters", all of them.
      mean_choices: experts that a token uses on average in each MoE layer, for rules where that is not K.

    Returns:
      The config with `layers` and `dense_hidden` changed. Another `dense_hidden`, for example a multiple of 128 for an
      accelerator's sake, is as good a twin as its `receipt` says.

    Raises:
      ValueError: a config without MoE layers, or an unknown `match`.
    """
    if "moe" not in config.layers:
        raise ValueError(
            f"layers={config.layers} are all dense already: a dense twin needs a config with a 'moe' layer"
        )
    if match not in get_args(Match):
        raise ValueError(f"unknown match {match!r}; known: {', '.join(get_args(Match))}")

    dense: LayerKind = "dense"

    def with_hidden(hidden: int) -> DecoderConfig:
        return dataclasses.replace(config, layers=(dense,) * len(config.layers), dense_hidden=hidden)

    target = getattr(model_cost(config, 1, mean_choices), match)
    one, two = (getattr(model_cost(with_hidden(hidden), 1), match) for hidden in (1, 2))
    return with_hidden(max(1, 1 + round((target - one) / (two - one))))  # the cost is linear in the hidden width


def receipt(
    config: DecoderConfig, twin: DecoderConfig, sequence_length: int, mean_choices: Sequence[float] | None = None
) -> Receipt:
    """Counts two models side by side.

    Args:
      config: the original.
      twin: what is compared with it, a `dense_twin` or any other.
      sequence_length: S, on which the attention's FLOPs depend; the causal half is counted.
      mean_choices: of the original, as in `dense_twin`.
    """
    costs = model_cost(config, sequence_length, mean_choices), model_cost(twin, sequence_length)
    pairs = {}
    for field in dataclasses.fields(Receipt):
        original, other = (getattr(cost, field.name) for cost in costs)
        pairs[field.name] = Pair(original, other, other / original)
    return Receipt(**pairs)
