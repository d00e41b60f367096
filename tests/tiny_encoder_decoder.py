"""Small encoder-decoders in the styles of Switch Transformers and NLLB-MoE, both short of capacity."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig

SWITCH = EncoderDecoderConfig(
    vocab_size=23,
    width=12,
    encoder_heads=2,
    decoder_heads=3,
    head_width=5,
    encoder_hidden=10,
    decoder_hidden=14,
    num_experts=4,
    capacity=2,
    capacity_unit="tokens",
    relative_buckets=8,
    relative_distance=10,
)
NLLB = EncoderDecoderConfig(
    vocab_size=23,
    width=12,
    encoder_layers=("moe", "dense"),
    encoder_heads=2,
    decoder_heads=3,
    encoder_hidden=10,
    decoder_hidden=14,
    expert_settings={"activation": "relu", "use_bias": True},
    num_experts=4,
    num_choices=2,
    rule="gshard_top_2",
    rule_settings={"second_policy": "all", "redistribute": True, "scale": 0.8},
    capacity=0.4,
    capacity_unit="share",
    capacity_per_sequence=True,
    norm="layer",
    positions="sinusoidal",
    attention_bias=True,
    scale_attention=True,
    scale_embedding=True,
    scale_logits=False,
    tie_embeddings=False,
    pad_id=1,
    start_id=2,
    stop_ids=(2,),
)
STYLES = {"switch": SWITCH, "nllb": NLLB}


@functools.cache
def make(config, weight_noise=0.2):
    """A model none of whose parameters is at its start."""
    model = EncoderDecoder(config, key=jax.random.key(0))
    params, rng = nnx.state(model, nnx.Param), np.random.default_rng(0)

    def disturb(x):
        return x + (weight_noise if x.ndim > 1 else 0.2) * rng.normal(size=x.shape).astype(np.float32)

    nnx.update(model, jax.tree.map(disturb, params))
    return model


def dropless(config):
    return dataclasses.replace(config, capacity=None)


def tokens_of(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 3, 23)


@functools.partial(jax.jit, static_argnames=("graphdef", "trace"))
def run(graphdef, state, *args, trace, key):
    return nnx.merge(graphdef, state)(*args, trace=trace, key=key)


def apply(model, *args, trace="stats", key=None):
    return run(*nnx.split(model), *args, trace=trace, key=key)
