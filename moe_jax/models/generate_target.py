"""Generation with an encoder-decoder: one program that reads the source and writes the target, token by token."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.encoder_decoder import DecodingCache, EncoderDecoder
from moe_jax.types import Array

Sample = Callable[[Array, Any], Array]  # (logits [B, V], key of this step or None) -> token ids [B]


class Target(NamedTuple):
    """Generated text: `tokens [B, N]` int32, given ones first, and `lengths [B]` int32 with given and stop tokens."""

    tokens: Array
    lengths: Array


def greedy(logits: Array, key: Array | None = None) -> Array:
    """The likeliest token of each row; ties go to the lower id."""
    del key
    return jnp.argmax(logits, axis=-1)


def generate_target(
    model: EncoderDecoder,
    source: Array,
    source_mask: Array | None = None,
    *,
    max_tokens: int,
    given: Array | None = None,
    stop_ids: Sequence[int] | None = None,
    sample: Sample = greedy,
    key: Array | None = None,
) -> Target:
    """Writes until every sequence has a stop token, or `max_tokens` new tokens.

    Compiles once for each shape of `source` and `given`, each `max_tokens` and each `sample`: pad sources to few
    lengths and pass the same function each time. A sequence that has ended takes no more part in routing.

    Args:
      model: the model.
      source: `[B, S]` int token ids.
      source_mask: `[B, S]` bool, false for padding.
      max_tokens: the most tokens after the given ones.
      given: `[B, P]` int, how each target begins, such as start token and language; None for the start token.
      stop_ids: tokens that end a target, where they are not given; None for the config's.
      sample: chooses the next tokens.
      key: folded with the position for `sample`; None for samplers that do not draw.

    Returns:
      The targets, `N = P + max_tokens`; after its end a target is filled with `pad_id`.

    Raises:
      ValueError: `max_tokens` below 1, or given tokens of another shape.
    """
    if given is None:
        given = jnp.full((len(source), 1), model.config.start_id)
    if max_tokens < 1 or given.ndim != 2 or len(given) != len(source) or not given.shape[1]:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least 1, and given [B, P] hold at least one token for each of "
            f"{len(source)} sources, got shape {given.shape}"
        )
    graphdef, state = nnx.split(model)
    stop = jnp.array(model.config.stop_ids if stop_ids is None else stop_ids, jnp.int32)
    return _generate(graphdef, state, source, source_mask, given, stop, key, max_tokens=max_tokens, sample=sample)


class _Progress(NamedTuple):
    target: Target
    is_done: Array  # [B]
    cache: DecodingCache


@partial(jax.jit, static_argnames=("graphdef", "max_tokens", "sample"))
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    source: Array,
    source_mask: Array | None,
    given: Array,
    stop_ids: Array,
    key: Array | None,
    *,
    max_tokens: int,
    sample: Sample,
) -> Target:
    model = nnx.merge(graphdef, state)
    pad_id = model.config.pad_id
    num_sequences, num_given = given.shape
    last = num_given + max_tokens - 1

    def step(now: _Progress) -> _Progress:
        (tokens, lengths), is_done, cache = now
        place = cache.length
        logits, cache, _ = model.decode(tokens[:, place][:, None], cache, ~is_done[:, None], "off")
        chosen = sample(logits[:, 0], None if key is None else jax.random.fold_in(key, place))
        is_free = place + 1 >= num_given
        chosen = jnp.where(is_free, jnp.where(is_done, pad_id, chosen), tokens[:, place + 1]).astype(jnp.int32)
        lengths = lengths + (is_free & ~is_done)
        is_done |= is_free & (chosen[:, None] == stop_ids[None, :]).any(1)
        return _Progress(Target(tokens.at[:, place + 1].set(chosen), lengths), is_done, cache)

    encoded, _ = model.encode(source, source_mask, "off")
    tokens = jnp.full((num_sequences, last + 1), pad_id, jnp.int32).at[:, :num_given].set(given)
    start = _Progress(
        Target(tokens, jnp.full(num_sequences, num_given, jnp.int32)),
        jnp.zeros(num_sequences, bool),
        model.start_cache(encoded, source_mask, last),
    )
    return jax.lax.while_loop(lambda now: (now.cache.length < last) & ~now.is_done.all(), step, start).target
