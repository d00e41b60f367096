"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values come from one small latent.

    c = norm(x W_c),  k_h = [c U_h, rot(x W_r)],  v_h = c V_h,  q_h = [q'_h, rot(q''_h)]

Only c and the one turned key that all heads share are cached. A decoded token scores `(q'_h U_h^T) . c`, so that keys
and values of the past are never made again.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.attention import EVERYTHING, PLAIN, KeyValues, Rotation
from moe_jax.ops.attention import attend, attention_weights, segment_positions, usable_keys, visible_keys
from moe_jax.ops.linear import linear
from moe_jax.ops.norms import rms_norm
from moe_jax.ops.rotary import Rotary, rotate
from moe_jax.types import Array


class LatentAttention(nnx.Module):
    """H heads over a latent of `latent_width` and a shared turned key; called like `Attention`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        latent_width: int,
        content_width: int,
        rotary_width: int,
        value_width: int,
        query_width: int = 0,
        rotation: Rotation = PLAIN,
        norm_epsilon: float = 1e-6,
        scale: float = 0.0,
        output_scale: float = 1.0,
        key: Array,
    ):
        """Draws normal weights scaled by the inverse root of their fan-in.

        Args:
          width: D.
          num_heads: H.
          latent_width: R of keys and values.
          content_width: coordinates of a head's query and key that do not turn.
          rotary_width: coordinates that turn.
          value_width: Dv of a head.
          query_width: R of queries, which then have a latent too; 0 for none (DeepSeek-V2-Lite).
          rotation: the rotary positions.
          norm_epsilon: of the latents' norms.
          scale: factor on the scores; 0 for the inverse root of a query's width.
          output_scale: factor on the output projection.
          key: consumed.

        Raises:
          ValueError: an odd `rotary_width`.
        """
        if rotary_width % 2:
            raise ValueError(f"rotary_width={rotary_width} must be even: its coordinates turn in pairs")
        self.rotation, self.norm_epsilon, self.scale = rotation, norm_epsilon, scale or None
        keys = jax.random.split(key, 5)

        def draw(key: Array, *shape: int, fan_in: int, factor: float = 1.0) -> nnx.Param:
            return nnx.Param(jax.random.normal(key, shape) * factor * fan_in**-0.5)

        head = (num_heads, content_width + rotary_width)
        self.query_down = draw(keys[0], width, query_width, fan_in=width) if query_width else None
        self.query_norm = nnx.Param(jnp.ones(query_width)) if query_width else None
        self.query = draw(keys[1], query_width or width, *head, fan_in=query_width or width)
        self.down = draw(keys[2], width, latent_width + rotary_width, fan_in=width)
        self.norm = nnx.Param(jnp.ones(latent_width))
        self.up = draw(keys[3], latent_width, num_heads, content_width + value_width, fan_in=latent_width)
        self.out = draw(keys[4], num_heads, value_width, width, fan_in=num_heads * value_width, factor=output_scale)

    def __call__(
        self,
        x: Array,
        token_mask: Array | None = None,
        length: int | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """As `Attention`; kept are the shared turned keys `[B, rotary, S]`, and the latents `[B, S, R]` as values."""
        positions = jnp.arange(x.shape[1]) if segments is None else segment_positions(segments)
        length = length or x.shape[1]
        query = self._query(x, positions, length)
        latent, turned = self._latent(x, positions, length)
        up = self.up[...].astype(x.dtype)
        key, value = jnp.split(jnp.einsum("bsr,rhk->bshk", latent, up), [self._content_width], axis=-1)
        shared = jnp.broadcast_to(turned[:, :, None, :], (*key.shape[:3], turned.shape[-1]))
        key = jnp.concatenate([key, shared], axis=-1)
        is_visible = usable_keys(token_mask, segments)
        mixed = attend(query, key, value, is_visible, is_causal=True, scale=self.scale)
        return self._leave(mixed), KeyValues(turned.swapaxes(1, 2), latent)

    def extend(self, x: Array, positions: Array, cache: KeyValues) -> tuple[Array, KeyValues]:
        """As `Attention`."""
        capacity = cache.keys.shape[-1]
        query = self._query(x, positions[:, None], capacity)[:, 0]
        latent, turned = self._latent(x, positions[:, None], capacity)
        cache = cache.put(positions, turned[:, 0], latent[:, 0])
        to_key, to_value = jnp.split(self.up[...].astype(x.dtype), [self._content_width], axis=-1)
        content, rotary = jnp.split(query, [self._content_width], axis=-1)
        content = jnp.einsum("bhk,rhk->bhr", content, to_key)  # into the latents' space
        scores = jnp.einsum("bhr,bsr->bhs", content, cache.values, preferred_element_type=jnp.float32)
        scores += jnp.einsum("bhk,bks->bhs", rotary, cache.keys, preferred_element_type=jnp.float32)
        scores *= self.scale or self.query.shape[-1] ** -0.5
        everything = jnp.int32(EVERYTHING)
        is_visible = visible_keys(positions[:, None], jnp.arange(capacity), everything, everything)
        weights = attention_weights(scores[:, :, None], is_visible)[:, :, 0].astype(x.dtype)
        mixed = jnp.einsum("bhs,bsr->bhr", weights, cache.values)
        return self._leave(jnp.einsum("bhr,rhv->bhv", mixed, to_value)[:, None]), cache

    @property
    def _content_width(self) -> int:
        return self.up.shape[-1] - self.out.shape[1]

    def _query(self, x: Array, positions: Array, length: int) -> Array:
        """`[B, S, H, content + rotary]`, the rotary part turned."""
        if self.query_down is not None and self.query_norm is not None:
            x = rms_norm(linear(x, self.query_down[...].astype(x.dtype)), self.query_norm[...], self.norm_epsilon)
        query = linear(x, self.query[...].astype(x.dtype))
        content, rotary = jnp.split(query, [self._content_width], axis=-1)
        return jnp.concatenate([content, rotate(rotary, positions, self._rotary(length))], axis=-1)

    def _latent(self, x: Array, positions: Array, length: int) -> tuple[Array, Array]:
        """Normed latents `[B, S, R]` and turned shared keys `[B, S, rotary]`."""
        latent, rotary = jnp.split(linear(x, self.down[...].astype(x.dtype)), [self.norm.shape[0]], axis=-1)
        turned = rotate(rotary[:, :, None, :], positions, self._rotary(length))[:, :, 0]
        return rms_norm(latent, self.norm[...], self.norm_epsilon), turned

    def _rotary(self, length: int) -> Rotary:
        return self.rotation.of(self.query.shape[-1] - self._content_width, length)

    def _leave(self, mixed: Array) -> Array:
        """`[B, S, H, Dv]` back to `[B, S, D]`."""
        out = self.out[...].astype(mixed.dtype)
        return linear(mixed.reshape(*mixed.shape[:2], -1), out.reshape(-1, out.shape[-1]))
