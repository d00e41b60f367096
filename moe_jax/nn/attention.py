"""Causal grouped-query attention (Ainslie et al. 2305.13245) with rotary positions, as public models have it."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.expert_stack import Setting
from moe_jax.ops.attention import attend, attention_weights, visible_keys
from moe_jax.ops.linear import linear
from moe_jax.ops.low_precision import Precision, check_precision
from moe_jax.ops.norms import rms_norm
from moe_jax.ops.rotary import Rotary, get_rotary, rotate
from moe_jax.types import Array

QueryKeyNorm = Literal["none", "head", "all", "l2"]
EVERYTHING = 2**30  # a window or chunk that no text fills


class KeyValues(NamedTuple):
    """What a layer keeps of each token for later ones: `keys [B, ..., K, S]` and `values [B, ..., S, V]`.

    In grouped-query attention the keys, turned, and the values, each with an axis `[Hkv]`. They lie as the products
    with one query want them: XLA's CPU backend would write keys `[B, S, Hkv, K]` anew in this order for every token.
    """

    keys: Array
    values: Array

    def put(self, positions: Array, keys: Array, values: Array) -> "KeyValues":
        """Writes one token of each sequence, `[B, ..., K]` and `[B, ..., V]`, at its position `[B]`."""
        rows = jnp.arange(len(positions))
        return KeyValues(
            self.keys.at[rows, ..., positions].set(keys), self.values.at[rows, ..., positions, :].set(values)
        )

    def grow(self, capacity: int) -> "KeyValues":
        """Adds zeros for later tokens, up to S = `capacity`."""
        added = (0, capacity - self.keys.shape[-1])
        leading = [(0, 0)] * (self.keys.ndim - 2)
        return KeyValues(jnp.pad(self.keys, [*leading, (0, 0), added]), jnp.pad(self.values, [*leading, added, (0, 0)]))


class Rotation(NamedTuple):
    """Which rotary positions: a name in `ops.rotary.ROTARIES`, and its settings."""

    name: str = "plain"
    settings: tuple[tuple[str, Setting], ...] = ()

    def of(self, width: int, length: int) -> Rotary:
        """The frequencies for heads of `width` in texts up to `length`."""
        return get_rotary(self.name, width, length, **dict(self.settings))


PLAIN = Rotation()


class LayerPattern(nnx.Variable):
    """What differs between layers that share one program, as arrays: facts of the architecture, never trained."""


class Attention(nnx.Module):
    """H query heads share `num_kv_heads` keys and values; projections are fused into one matmul."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_width: int | None = None,
        rotation: Rotation = PLAIN,
        pattern: Array | None = None,
        use_bias: bool = False,
        use_out_bias: bool = False,
        use_sinks: bool = False,
        qk_norm: QueryKeyNorm = "none",
        norm_epsilon: float = 1e-6,
        clip: float = 0.0,
        scale: float = 0.0,
        far_scale: float = 0.0,
        far_length: int = 8192,
        precision: Precision = "full",
        output_scale: float = 1.0,
        key: Array,
    ):
        """Draws normal weights scaled by the inverse root of their fan-in; biases and sinks start at zero.

        Args:
          width: D.
          num_heads: H, a multiple of `num_kv_heads`.
          num_kv_heads: key and value heads.
          head_width: Dh; None for D / H.
          rotation: the rotary positions.
          pattern: `[3]` int32: how many of the last tokens are seen (0: all), the length of the chunks that attention
            stays within (0: none), and whether queries and keys turn with their position; None for 0, 0, 1.
          use_bias: whether queries, keys and values have a bias.
          use_out_bias: whether the output has one.
          use_sinks: whether every head has a sink; see `ops.attention.attend`.
          qk_norm: what normalises queries and keys: "head" each head (Qwen3), "all" the heads together (OLMoE), both
            with a learned scale and before they turn, "l2" each head that turns, afterwards, without scale (Llama 4).
          norm_epsilon: of that norm.
          clip: bound on queries, keys and values (OLMoE); 0 for none.
          scale: factor on the scores; 0 for `Dh ** -0.5`.
          far_scale: c; layers that do not turn scale the query at position p by `c ln(1 + floor((p + 1) / far_length))
            + 1` (Llama 4, from 2501.19399); 0 for not.
          far_length: see `far_scale`.
          precision: of the factors of the two projections; see `ops.low_precision`.
          output_scale: factor on the output projection.
          key: consumed.

        Raises:
          ValueError: an unknown `qk_norm` or `precision`.
        """
        check_precision(precision)
        if qk_norm not in get_args(QueryKeyNorm):
            raise ValueError(f"unknown qk_norm {qk_norm!r}; known: {', '.join(get_args(QueryKeyNorm))}")
        head_width = head_width or width // num_heads
        self.rotation, self.qk_norm, self.norm_epsilon = rotation, qk_norm, norm_epsilon
        self.clip, self.scale, self.far = clip, scale or None, (far_scale, far_length)
        self.precision = precision
        in_key, out_key = jax.random.split(key)
        heads = num_heads + 2 * num_kv_heads
        self.qkv = nnx.Param(jax.random.normal(in_key, (width, heads, head_width)) * width**-0.5)
        self.out = nnx.Param(
            jax.random.normal(out_key, (num_heads, head_width, width)) * output_scale * (num_heads * head_width) ** -0.5
        )
        self.qkv_bias = nnx.Param(jnp.zeros((heads, head_width))) if use_bias else None
        self.out_bias = nnx.Param(jnp.zeros(width)) if use_out_bias else None
        self.sinks = nnx.Param(jnp.zeros(num_heads)) if use_sinks else None
        shapes = {"head": ((head_width,),) * 2, "all": ((num_heads, head_width), (num_kv_heads, head_width))}
        query_norm, key_norm = shapes.get(qk_norm, (None, None))
        self.query_norm = None if query_norm is None else nnx.Param(jnp.ones(query_norm))
        self.key_norm = None if key_norm is None else nnx.Param(jnp.ones(key_norm))
        self.pattern = None if pattern is None else LayerPattern(pattern)

    def __call__(self, x: Array, token_mask: Array | None = None, length: int | None = None) -> tuple[Array, KeyValues]:
        """Attends within each sequence.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; nobody attends to a masked token.
          length: tokens that the texts may grow to, on which some rotary positions depend; None for S.

        Returns:
          `[B, S, D]`, and what later tokens need of these.
        """
        positions = jnp.arange(x.shape[1])
        query, key, value = self._project(x, positions, length or x.shape[1])
        is_visible = None if token_mask is None else token_mask[:, None, None, :]
        if self.pattern is not None:
            seen = visible_keys(positions[None], positions, *self._limits())
            is_visible = seen if is_visible is None else seen & is_visible
        mixed = attend(
            query, key, value, is_visible, is_causal=self.pattern is None, scale=self.scale, sinks=self._sinks()
        )
        kept = KeyValues(jnp.einsum("bshk->bhks", key), jnp.einsum("bshk->bhsk", value))
        return self._leave(mixed), kept

    def extend(self, x: Array, positions: Array, cache: KeyValues) -> tuple[Array, KeyValues]:
        """Attends from one new token of each sequence to the cached ones and itself.

        Args:
          x: `[B, 1, D]`.
          positions: `[B]` int, where the new tokens stand; the cache holds those before, and what it holds from there
            on is not seen.
          cache: of the tokens at 0 to C - 1.

        Returns:
          `[B, 1, D]` and the cache with the new tokens in it.
        """
        num_kv_heads, head_width, capacity = cache.keys.shape[1:]
        query, key, value = self._project(x, positions[:, None], capacity)
        cache = cache.put(positions, key[:, 0], value[:, 0])
        grouped = query.reshape(len(x), num_kv_heads, -1, head_width)  # (B, 1, H, Dh) -> (B, Hkv, H/Hkv, Dh)
        scores = jnp.einsum("bhgk,bhks->bhgs", grouped, cache.keys, preferred_element_type=jnp.float32)
        scores *= head_width**-0.5 if self.scale is None else self.scale
        is_visible = visible_keys(positions[:, None], jnp.arange(capacity), *self._limits())
        weights = attention_weights(scores.reshape(len(x), -1, 1, capacity), is_visible, self._sinks())
        weights = weights.reshape(scores.shape).astype(value.dtype)
        mixed = jnp.einsum("bhgs,bhsk->bhgk", weights, cache.values)
        return self._leave(mixed.reshape(query.shape)), cache

    def _project(self, x: Array, positions: Array, length: int) -> tuple[Array, Array, Array]:
        """Queries and keys at their positions, and values: `[B, S, H or Hkv, Dh]`."""
        num_heads = self.out.shape[0]
        num_kv_heads = (self.qkv.shape[1] - num_heads) // 2
        qkv = linear(x, self.qkv[...].astype(x.dtype), precision=self.precision)
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...].astype(x.dtype)[None, None]
        query, key, value = jnp.split(qkv, [num_heads, num_heads + num_kv_heads], axis=2)
        if self.query_norm is not None and self.key_norm is not None:
            query = _normalize(query, self.query_norm[...], self.norm_epsilon)
            key = _normalize(key, self.key_norm[...], self.norm_epsilon)
        if self.clip:
            query, key, value = (jnp.clip(part, -self.clip, self.clip) for part in (query, key, value))
        rotary = self.rotation.of(query.shape[-1], length)
        turned = [rotate(part, positions, rotary) for part in (query, key)]
        if self.qk_norm == "l2":
            ones = jnp.ones(query.shape[-1])
            turned = [rms_norm(part, ones, self.norm_epsilon) for part in turned]
        if self.pattern is None:
            return turned[0], turned[1], value
        turns = self.pattern[...][2] > 0
        far_scale, far_length = self.far
        if far_scale:
            scales = far_scale * jnp.log1p(jnp.floor((positions + 1.0) / far_length)) + 1
            scales = scales.reshape(-1, query.shape[1], 1, 1).astype(query.dtype)
            query = query * scales
        return jnp.where(turns, turned[0], query), jnp.where(turns, turned[1], key), value

    def _limits(self) -> tuple[Array, Array]:
        """Window and chunk of this layer."""
        if self.pattern is None:
            return jnp.int32(EVERYTHING), jnp.int32(EVERYTHING)
        limits = self.pattern[...][:2]
        window, chunk = jnp.where(limits > 0, limits, EVERYTHING)
        return window, chunk

    def _sinks(self) -> Array | None:
        return None if self.sinks is None else self.sinks[...]

    def _leave(self, mixed: Array) -> Array:
        """`[B, S, H, Dh]` back to `[B, S, D]`."""
        out = self.out[...].astype(mixed.dtype)
        y = linear(mixed.reshape(*mixed.shape[:2], -1), out.reshape(-1, out.shape[-1]), precision=self.precision)
        return y if self.out_bias is None else y + self.out_bias[...].astype(mixed.dtype)[None, None]


def _normalize(x: Array, scale: Array, epsilon: float) -> Array:
    """RMS norm of `[B, S, H, Dh]` over the axes that `scale`, `[Dh]` or `[H, Dh]`, has."""
    shape = (*x.shape[:2], -1) if scale.ndim == 2 else x.shape
    return rms_norm(x.reshape(shape), scale.reshape(-1), epsilon).reshape(x.shape)
