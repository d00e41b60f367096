"""The two programs of generation: one reads prompts, the other makes tokens without leaving the device.

A token's place in the cache is its position. Prompts of different lengths are padded on the right, so what padding
leaves in the cache stands at positions that no query sees before the text itself reaches and overwrites them. No row
depends on another, and neither does what is drawn for it: keys come from the sequence's own and the position. So a
batch gives what its prompts give one at a time, up to rounding.

Layers are unrolled. A loop over stacked layers would write a copy of every layer's weights before using them.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.models.decoder import Decoder
from moe_jax.models.sampling import next_tokens
from moe_jax.nn.attention import KeyValues
from moe_jax.nn.block import Block
from moe_jax.types import Array, RoutingPlan, Topology


class Weights(NamedTuple):
    """A decoder without its layers, and these."""

    stem: Decoder
    blocks: Sequence[Block]


class Request(NamedTuple):
    """What stays the same from token to token.

    Attributes:
      limits: `[B]` int32, the length at which a text ends.
      stop_tokens: `[N]` int32, -1 where there is none.
      settings: `Sampling.settings`, as arrays.
      keys: `[B]` PRNG keys.
      topology: over the L MoE layers, or None.
      token_groups: `[B]` int32, or None.
    """

    limits: Array
    stop_tokens: Array
    settings: dict[str, Array]
    keys: Array
    topology: Topology | None
    token_groups: Array | None


class Progress(NamedTuple):
    """What changes.

    Attributes:
      tokens: `[B, C]` int32, prompt and text.
      lengths: `[B]` int32, how much of it there is; its last token has not been read yet.
      is_done: `[B]` bool.
      cache: of each layer.
      is_present: `[B, V]` bool, the tokens in the text; None without a repetition penalty.
      expert_ids: `[L, B, C, K]` int32 choices for the tokens read; None unless asked for.
    """

    tokens: Array
    lengths: Array
    is_done: Array
    cache: tuple[KeyValues, ...]
    is_present: Array | None
    expert_ids: Array | None


@partial(jax.jit, static_argnames=("capacity", "with_routing"))
def prefill(
    weights: Weights, prompts: Array, lengths: Array, request: Request, capacity: int, with_routing: bool
) -> Progress:
    """Reads prompts and draws the first token of every text.

    Args:
      weights: the model.
      prompts: `[B, S]` int32, padded on the right.
      lengths: `[B]` int32, of the prompts, at least 1.
      request: what is asked for.
      capacity: C, at least S and every limit.
      with_routing: whether to keep the experts' ids.
    """
    stem, blocks = weights
    rows = jnp.arange(len(prompts))
    token_mask = jnp.arange(prompts.shape[1])[None, :] < lengths[:, None]
    fed, fed_mask = prompts, token_mask
    x, cache, chosen = stem.embed(prompts, token_mask), [], []
    for i, (block, topology) in enumerate(zip(blocks, _by_layer(stem, request.topology), strict=True)):
        x, kept = block.attend(x, token_mask, capacity)
        cache.append(kept.grow(capacity))
        if i == len(blocks) - 1 and not with_routing:  # what the last layer makes of other tokens is not asked for
            x, fed, fed_mask = (part[rows, lengths - 1][:, None] for part in (x, fed, fed_mask))
        x, ids = _feed(block, x, fed_mask, topology, request.token_groups, fed)
        chosen += [] if ids is None else [ids]
    logits = stem.logits(x[rows, lengths - 1][:, None] if with_routing else x)[:, 0]
    is_present, expert_ids = None, None
    if "repetition_penalty" in request.settings:
        seen = jnp.where(token_mask, prompts, stem.config.vocab_size)
        is_present = jnp.zeros(logits.shape, bool).at[rows[:, None], seen].set(True, mode="drop")
    unread = capacity - prompts.shape[1]
    if with_routing:
        expert_ids = jnp.pad(jnp.stack(chosen), ((0, 0), (0, 0), (0, unread), (0, 0)))
    tokens = jnp.pad(prompts, ((0, 0), (0, unread)))
    is_done = jnp.zeros(len(prompts), bool)
    return _append(Progress(tokens, lengths, is_done, tuple(cache), is_present, expert_ids), logits, request)


@partial(jax.jit, donate_argnames="progress")
def decode(weights: Weights, progress: Progress, request: Request, num_steps: Array) -> Progress:
    """Makes tokens until every text is done, but at most `num_steps` of each."""

    def is_going(carry: tuple[Array, Progress]) -> Array:
        return (carry[0] < num_steps) & ~carry[1].is_done.all()

    def step(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        return carry[0] + 1, _step(weights, carry[1], request)

    return jax.lax.while_loop(is_going, step, (jnp.int32(0), progress))[1]


def _step(weights: Weights, progress: Progress, request: Request) -> Progress:
    """Reads the last token of every text and draws the next."""
    stem, blocks = weights
    rows, positions = jnp.arange(len(progress.lengths)), progress.lengths - 1
    places = positions[:, None] + jnp.arange(-stem.config.context, 1)[None, :]
    window = progress.tokens[rows[:, None], jnp.maximum(places, 0)]
    token, is_going = window[:, -1:], ~progress.is_done[:, None]
    x, cache, chosen = stem.embed(window, places >= 0)[:, -1:], [], []
    for block, kept, topology in zip(blocks, progress.cache, _by_layer(stem, request.topology), strict=True):
        x, kept = block.extend(x, positions, kept)
        cache.append(kept)
        x, ids = _feed(block, x, is_going, topology, request.token_groups, token)
        chosen += [] if ids is None else [ids]
    expert_ids = progress.expert_ids
    if expert_ids is not None:
        expert_ids = expert_ids.at[:, rows, positions].set(jnp.stack(chosen)[:, :, 0])
    return _append(progress._replace(cache=tuple(cache), expert_ids=expert_ids), stem.logits(x)[:, 0], request)


def _append(progress: Progress, logits: Array, request: Request) -> Progress:
    """Draws the next token of every text that goes on, from logits `[B, V]`."""
    tokens, lengths, is_done = progress.tokens, progress.lengths, progress.is_done
    rows, is_present = jnp.arange(len(lengths)), progress.is_present
    keys = jax.vmap(jax.random.fold_in)(request.keys, lengths)
    drawn = next_tokens(logits, request.settings, keys, is_present)
    if is_present is not None:
        is_present = is_present.at[rows, drawn].set(True)
    tokens = tokens.at[rows, jnp.where(is_done, tokens.shape[1], lengths)].set(drawn, mode="drop")
    lengths = jnp.where(is_done, lengths, lengths + 1)
    is_stop = (drawn[:, None] == request.stop_tokens[None, :]).any(1)
    is_done = is_done | is_stop | (lengths >= request.limits)
    return progress._replace(tokens=tokens, lengths=lengths, is_done=is_done, is_present=is_present)


def _feed(
    block: Block,
    x: Array,
    token_mask: Array,
    topology: Topology | None,
    token_groups: Array | None,
    token_ids: Array,
) -> tuple[Array, Array | None]:
    """A block's second half, and the experts that it chose `[B, S, K]`; None for a dense layer."""
    if token_groups is not None:
        token_groups = jnp.broadcast_to(token_groups[:, None], x.shape[:2])
    x, routed = block.feed(x, token_mask, topology, token_groups, token_ids=token_ids)
    if routed is None:
        return x, None
    assert isinstance(routed.plan, RoutingPlan)  # Soft MoE does not generate
    return x, routed.plan.expert_ids.reshape(*x.shape[:2], -1)


def _by_layer(stem: Decoder, topology: Topology | None) -> list[Topology | None]:
    """Each layer's part of a topology over the MoE layers."""
    parts, num_moe = [], 0
    for kind in stem.config.layers:
        parts.append(jax.tree.map(lambda leaf, i=num_moe: leaf[i], topology) if kind == "moe" else None)
        num_moe += kind == "moe"
    return parts
