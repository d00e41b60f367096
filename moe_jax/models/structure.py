"""A model's structure apart from its numbers: for those who fill it from elsewhere, array by array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig
from moe_jax.types import Array

ModelConfig = DecoderConfig | EncoderDecoderConfig
Model = Decoder | EncoderDecoder


def named_arrays(model: nnx.Module) -> dict[str, Array]:
    """The arrays of a model, or of a part of one, by path, such as "stacks/0/attention/qkv"."""
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def array_shapes(config: ModelConfig) -> dict[str, nnx.Variable]:
    """Variables by path whose values are shapes and dtypes; nothing is allocated."""
    return {_name(path): leaf for path, leaf in nnx.to_flat_state(_abstract(config)[1])}


def untrained_arrays(config: ModelConfig) -> dict[str, Array]:
    """What a new model carries besides parameters, by path: balance state and layer patterns."""

    @jax.jit
    def initialise() -> nnx.State:  # the parameters that nothing returns are never drawn
        return nnx.state(_init(config), nnx.Not(nnx.Param))

    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(initialise())}


def fill_model(config: ModelConfig, array_of: Callable[[str, nnx.Variable], Array]) -> Any:
    """Builds a model of given arrays: a `Decoder` or an `EncoderDecoder`, as the config says.

    Args:
      config: the architecture.
      array_of: from a path and its shape to the array; called once for each, in turn.
    """
    graphdef, shapes = _abstract(config)
    leaves = [(path, leaf.replace(array_of(_name(path), leaf))) for path, leaf in nnx.to_flat_state(shapes)]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _init(config: ModelConfig) -> Model:
    key = jax.random.key(0)
    return Decoder(config, key=key) if isinstance(config, DecoderConfig) else EncoderDecoder(config, key=key)


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: _init(config)))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
