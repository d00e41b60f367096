"""An encoder-decoder language model with any mix of dense and mixture-of-experts layers.

With relative positions and RMS norms it is T5 (1910.10683) and, with MoE layers, the Switch Transformer (2101.03961);
with sinusoidal positions, layer norms and biases it is NLLB-MoE (2207.04672). Their dropouts are not here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig
from moe_jax.models.encoder_decoder_parts import init_decoder_block, init_encoder_block, init_relative_bias
from moe_jax.nn.encoder_decoder_blocks import LayerCache
from moe_jax.nn.norms import NORMS
from moe_jax.ops.sinusoid import sinusoidal_positions
from moe_jax.routing import keep_trace
from moe_jax.types import Array, RouterOutput, TraceLevel


class DecodingCache(NamedTuple):
    """What the decoder keeps of the tokens that it has passed.

    Attributes:
      layers: of each decoder layer, with room for N target tokens.
      token_mask: `[B, N]` bool, which places hold a token that may be attended to.
      source_mask: `[B, S]` bool, or None if no source token is masked.
      length: `[]` int32, how many places are filled.
    """

    layers: tuple[LayerCache, ...]
    token_mask: Array
    source_mask: Array | None
    length: Array


class EncoderDecoder(nnx.Module):
    """The language model. Called on source and target it gives logits and what every router did."""

    def __init__(self, config: EncoderDecoderConfig, *, key: Array):
        """Initialises all parameters in float32.

        Args:
          config: the architecture.
          key: consumed; `jax.vmap` over keys makes a population.
        """
        self.config = config
        source_key, target_key, read_key, bias_key, encoder_key, decoder_key = jax.random.split(key, 6)
        shape, small = (config.vocab_size, config.width), config.width**-0.5
        scale, is_tied = small if config.scale_embedding else 1.0, config.tie_embeddings
        self.embedding = nnx.Param(jax.random.normal(source_key, shape) * scale)
        self.target_embedding = None if is_tied else nnx.Param(jax.random.normal(target_key, shape) * scale)
        self.read_out = None if is_tied else nnx.Param(jax.random.normal(read_key, shape[::-1]) * small)
        bias_keys = jax.random.split(bias_key)
        self.encoder_bias = init_relative_bias(config, config.encoder_heads, True, bias_keys[0])
        self.decoder_bias = init_relative_bias(config, config.decoder_heads, False, bias_keys[1])
        self.encoder = nnx.List(
            init_encoder_block(config, kind, jax.random.fold_in(encoder_key, i))
            for i, kind in enumerate(config.encoder_layers)
        )
        self.decoder = nnx.List(
            init_decoder_block(config, kind, jax.random.fold_in(decoder_key, i))
            for i, kind in enumerate(config.decoder_layers)
        )
        self.encoder_norm = NORMS[config.norm](config.width, config.norm_epsilon)
        self.decoder_norm = NORMS[config.norm](config.width, config.norm_epsilon)

    def __call__(
        self,
        encoder_tokens: Array,
        decoder_tokens: Array,
        encoder_mask: Array | None = None,
        decoder_mask: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        key: Array | None = None,
    ) -> tuple[Array, RouterOutput, RouterOutput]:
        """Next-token logits of a whole target.

        Args:
          encoder_tokens: `[B, S]` int token ids of the source.
          decoder_tokens: `[B, S']` int, the target behind the start token.
          encoder_mask: `[B, S]` bool, false for padding: not attended to, not routed, not counted.
          decoder_mask: `[B, S']` bool, the same of the target.
          trace: how much of the routing to return.
          key: consumed by routers that draw in training; None means evaluation.

        Returns:
          `[B, S', V]` float32 logits, and the router outputs of encoder and decoder, each with a leading `[L]` over its
          MoE layers; fields are None if it has none.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        encoded, encoder_routed = self.encode(encoder_tokens, encoder_mask, trace, key=encoder_key)
        cache = self.start_cache(encoded, encoder_mask, decoder_tokens.shape[1])
        logits, _, decoder_routed = self.decode(decoder_tokens, cache, decoder_mask, trace, key=decoder_key)
        return logits, encoder_routed, decoder_routed

    def encode(
        self, tokens: Array, token_mask: Array | None = None, trace: TraceLevel = "stats", *, key: Array | None = None
    ) -> tuple[Array, RouterOutput]:
        """Reads the source.

        Args:
          tokens: `[B, S]` int.
          token_mask: `[B, S]` bool, or None for no padding.
          trace: how much of the routing to return.
          key: as in `__call__`.

        Returns:
          `[B, S, D]` behind the last norm, and the router output of the encoder's MoE layers.
        """
        is_token = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
        x = self._embed(self.embedding[...], tokens, is_token, jnp.zeros_like(tokens[:, 0]))
        places = jnp.arange(tokens.shape[1])
        bias = None if self.encoder_bias is None else self.encoder_bias(places, places)
        outputs = []
        for index, block in enumerate(self.encoder):
            x, routed = block(x, token_mask, bias, None if key is None else jax.random.fold_in(key, index))
            outputs.append(routed)
        return self.encoder_norm(x), _stack(outputs, trace)

    def start_cache(self, encoded: Array, source_mask: Array | None, max_length: int) -> DecodingCache:
        """An empty cache for a target of at most `max_length` tokens; computes the source's keys and values.

        Args:
          encoded: `[B, S, D]` of `encode`.
          source_mask: `[B, S]` bool, or None.
          max_length: N, static.
        """
        layers = []
        for block in self.decoder:
            source_keys, source_values = block.cross_attention.keys_and_values(encoded)
            empty = jnp.zeros((len(encoded), max_length, *block.attention.key.shape[1:]), encoded.dtype)
            layers.append(LayerCache(empty, empty, source_keys, source_values))
        token_mask = jnp.zeros((len(encoded), max_length), bool)
        return DecodingCache(tuple(layers), token_mask, source_mask, jnp.int32(0))

    def decode(
        self,
        tokens: Array,
        cache: DecodingCache,
        token_mask: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        key: Array | None = None,
    ) -> tuple[Array, DecodingCache, RouterOutput]:
        """Passes the target's next tokens: all of them in training, one in a step of generation.

        A capacity counts only the tokens passed together, so what a whole target drops, single steps may not.

        Args:
          tokens: `[B, S']` int; the cache must have room for them, which is not checked.
          cache: of the tokens before; see `start_cache`.
          token_mask: `[B, S']` bool, or None for no padding.
          trace: how much of the routing to return.
          key: as in `__call__`.

        Returns:
          `[B, S', V]` float32 logits, the cache with these tokens in it, and the router output of the MoE layers.
        """
        is_token = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
        table = self.embedding if self.target_embedding is None else self.target_embedding
        x = self._embed(table[...], tokens, is_token, cache.token_mask.sum(1))
        filled = jax.lax.dynamic_update_slice_in_dim(cache.token_mask, is_token, cache.length, axis=1)
        places = cache.length + jnp.arange(tokens.shape[1])
        all_places = jnp.arange(filled.shape[1])
        mask = (all_places[None, :] <= places[:, None])[None, None] & filled[:, None, None, :]
        bias = None if self.decoder_bias is None else self.decoder_bias(places, all_places)
        layers, outputs = [], []
        for index, (block, kept) in enumerate(zip(self.decoder, cache.layers, strict=True)):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, kept, routed = block(x, kept, cache.length, mask, cache.source_mask, token_mask, bias, layer_key)
            layers.append(kept)
            outputs.append(routed)
        cache = DecodingCache(tuple(layers), filled, cache.source_mask, cache.length + tokens.shape[1])
        return self._logits(x), cache, _stack(outputs, trace)

    def _embed(self, table: Array, tokens: Array, is_token: Array, num_before: Array) -> Array:
        """`[B, S]` ids behind `num_before [B]` tokens to `[B, S, D]`; masked tokens have no position."""
        config = self.config
        x = table.astype(config.compute_dtype)[tokens]
        if config.scale_embedding:
            x *= config.width**0.5
        if config.positions == "relative":
            return x
        ranks = num_before[:, None] + jnp.cumsum(is_token, axis=1)  # 1 for the first token
        positions = sinusoidal_positions(config.pad_id + ranks, config.width)
        return x + jnp.where(is_token[:, :, None], positions, 0).astype(x.dtype)

    def _logits(self, x: Array) -> Array:
        """`[B, S, D]` after the last layer to `[B, S, V]` float32."""
        x = self.decoder_norm(x).astype(jnp.float32)
        if self.config.scale_logits:
            x *= self.config.width**-0.5
        return x @ (self.embedding[...].T if self.read_out is None else self.read_out[...])


def _stack(outputs: list[RouterOutput | None], trace: TraceLevel) -> RouterOutput:
    """One output with a leading axis over the layers that route."""
    kept = [keep_trace(routed, trace) for routed in outputs if routed is not None]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept) if kept else RouterOutput(None, None, None)
