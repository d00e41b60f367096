"""Generation: a prompt is read in one program, tokens follow one at a time in another that stays on the device.

A token's place in the cache is its position. Prompts of different lengths are padded on the right, so what padding
leaves in the cache stands at positions that no query sees before the text itself reaches and overwrites them. A row
depends on no other row, and neither does what is drawn for it: keys come from the sequence's id and the position. So a
batch gives what its prompts give one at a time, up to rounding.

Lengths are rounded up to a few sizes, so that few programs compile. Layers are cut out of their stacks once, when the
generator is built: a program that scans over stacked layers copies every layer's weights before it uses them. Nothing
is dropped for capacity: `capacity_factor` is of training.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.sampling import GREEDY, Sampling, next_tokens
from moe_jax.nn.attention import KeyValues
from moe_jax.nn.attention_experts import AttentionExperts
from moe_jax.nn.block import Block
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.separate_experts import SeparateExperts
from moe_jax.routing import get_rule
from moe_jax.types import Array, RoutingPlan, Topology

SHORTEST = 16  # the least length that a program is compiled for
REMEMBERING_ROUTERS = ("recurrent", "load_aware")  # a token's logits depend on a state of the tokens before it
COUNTING_RULES = ("random", "forced_uniform", "forced_zipf", "forced_skewed")  # a token's number decides


class Chunk(NamedTuple):
    """What came in one call of a program.

    Attributes:
      tokens: new tokens of each sequence, none of a finished one.
      seconds: that it took, until the tokens were on the host.
      expert_ids: for each sequence `[L, N, K]` int32, the routing of the N tokens that were read to make these: the
        prompt in the first chunk, then the tokens made so far but the last; None unless asked for.
    """

    tokens: list[list[int]]
    seconds: float
    expert_ids: list[np.ndarray] | None = None


class Generation(NamedTuple):
    """Texts, and how fast they came.

    Attributes:
      tokens: of each sequence, without its prompt; a stop token is the last one.
      prefill_tokens_per_second: prompt tokens over the time to the first new token, compilation included if it was due.
      decode_tokens_per_second: new tokens after the first of each sequence, over their time; 0 if there are none.
      expert_ids: for each sequence `[L, N, K]` int32 chosen experts of prompt and text but its last token, which no
        layer has seen; None unless asked for.
    """

    tokens: list[list[int]]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    expert_ids: list[np.ndarray] | None = None


class Request(NamedTuple):
    """What stays the same from token to token, as arrays.

    Attributes:
      limits: `[B]` int32, the length at which a text ends.
      stop_tokens: `[N]` int32, -1 where there is none.
      settings: `Sampling.settings`.
      keys: `[B]` PRNG keys of the sequences.
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
      lengths: `[B]` int32, how much of it there is; the last token has not been read yet.
      is_done: `[B]` bool.
      cache: of each layer.
      is_present: `[B, V]` bool, the tokens in the text; None without a repetition penalty.
      expert_ids: `[L, B, C, K]` int32 choices of the tokens read; None unless asked for.
    """

    tokens: Array
    lengths: Array
    is_done: Array
    cache: tuple[KeyValues, ...]
    is_present: Array | None
    expert_ids: Array | None


class Generator:
    """A decoder with its layers laid out for generating."""

    def __init__(self, model: Decoder, *, capacity: int | None = None):
        """Copies the layers out of their stacks, so that the model may be dropped afterwards.

        Args:
          model: weights in the dtype they should be read in.
          capacity: tokens of prompt and text that the cache is made for; None makes it for each request.

        Raises:
          ValueError: a model whose routing of a token depends on more than the cache keeps.
        """
        _check_model(model)
        self.config, self.capacity = model.config, capacity
        self._blocks = [
            jax.tree.map(lambda leaf, i=i: _cut(leaf, i), stack) for stack in model.stacks for i in range(_depth(stack))
        ]
        for block in self._blocks:
            if isinstance(block.feed_forward, MoELayer):
                block.feed_forward.capacity = None
        self._separate = [_with_separate_experts(block) for block in self._blocks]
        self._stem = jax.tree.map(lambda leaf: leaf, model)  # embedding and read-out, without the layers
        self._stem.stacks = nnx.List()

    def generate(self, prompts: Sequence[Sequence[int]], **request: Any) -> Generation:
        """Continues texts, each until a stop token or its last allowed token.

        Args:
          prompts: token ids.
          **request: as in `stream`.

        Returns:
          The texts.

        Raises:
          ValueError: see `stream`.
        """
        chunks = list(self.stream(prompts, **({"chunk": None} | request)))
        tokens = [list(itertools.chain(*parts)) for parts in zip(*(chunk.tokens for chunk in chunks), strict=True)]
        seconds = sum(chunk.seconds for chunk in chunks[1:])
        num_decoded = sum(len(text) - 1 for text in tokens)
        expert_ids = None
        if chunks[0].expert_ids is not None:
            parts = [[] if chunk.expert_ids is None else chunk.expert_ids for chunk in chunks]
            expert_ids = [np.concatenate(of_one, axis=1) for of_one in zip(*parts, strict=True)]
        return Generation(
            tokens,
            sum(map(len, prompts)) / chunks[0].seconds,
            num_decoded / seconds if num_decoded else 0.0,
            expert_ids,
        )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        sequence_ids: Sequence[int] | None = None,
        topology: Topology | None = None,
        token_groups: Sequence[int] | None = None,
        with_routing: bool = False,
        chunk: int | None = 16,
    ) -> Iterator[Chunk]:
        """Continues texts and hands out new tokens as they come.

        Args:
          prompts: token ids.
          max_tokens: new tokens of each text at most.
          sampling: how tokens are drawn.
          stop_tokens: a text ends behind any of these.
          seed: of what is drawn.
          sequence_ids: non-negative numbers that tell the texts' random numbers apart; None counts them from 0. A
            prompt with the same seed and id gives the same text in any batch.
          topology: `keep [L, G, E]`, `num_choices [L, G]` over the MoE layers, or None.
          token_groups: the topology's group of each text; needed when G > 1.
          with_routing: whether to return the chosen experts too.
          chunk: tokens of each text between two chunks; None for all at once.

        Yields:
          The first token of every text, then up to `chunk` of each at a time.

        Raises:
          ValueError: no prompts, an empty one, one with ids outside of the vocabulary or longer than the capacity
            allows, or counts below 1.
        """
        self._check_request(prompts, max_tokens, chunk)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        capacity = self.capacity or bucket(max(lengths) + max_tokens)
        padded = np.zeros((len(prompts), min(bucket(max(lengths)), capacity)), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        ids = np.arange(len(prompts)) if sequence_ids is None else np.array(sequence_ids)
        request = Request(
            limits=jnp.asarray(lengths + max_tokens),
            stop_tokens=jnp.asarray([*stop_tokens, *[-1] * (bucket(len(stop_tokens)) - len(stop_tokens))], jnp.int32),
            settings=jax.tree.map(jnp.asarray, sampling.settings),
            keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(ids, jnp.uint32)),
            topology=topology,
            token_groups=None if token_groups is None else jnp.asarray(token_groups, jnp.int32),
        )
        weights = (self._stem, self._blocks)
        start, seen, read = time.perf_counter(), lengths, np.zeros_like(lengths)
        progress = _prefill(weights, padded, lengths, request, capacity, with_routing)
        while True:
            is_done, now = np.asarray(progress.is_done), np.asarray(progress.lengths)
            tokens = np.asarray(progress.tokens)
            new = [row[a:b].tolist() for row, a, b in zip(tokens, seen, now, strict=True)]
            seconds, routing = time.perf_counter() - start, None
            if progress.expert_ids is not None:
                expert_ids = np.asarray(progress.expert_ids)
                routing = [expert_ids[:, i, a : b - 1] for i, (a, b) in enumerate(zip(read, now, strict=True))]
            yield Chunk(new, seconds, routing)
            if is_done.all():
                return
            start, seen, read = time.perf_counter(), now, now - 1
            progress = _decode((self._stem, self._separate), progress, request, np.int32(chunk or max_tokens))

    def _check_request(self, prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int | None) -> None:
        """Refuses what cannot be generated."""
        if max_tokens < 1 or (chunk is not None and chunk < 1):
            raise ValueError(f"max_tokens={max_tokens} and chunk={chunk} must be at least 1")
        if not prompts:
            raise ValueError("there are no prompts: give at least one list of token ids")
        vocab_size = self.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: give at least one token, such as the beginning-of-text token")
            if not all(0 <= token < vocab_size for token in prompt):
                wrong = next(token for token in prompt if not 0 <= token < vocab_size)
                raise ValueError(f"prompt {i} has token {wrong}, outside of the vocabulary [0, {vocab_size})")
            if self.capacity is not None and len(prompt) + max_tokens > self.capacity:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, which with max_tokens={max_tokens} is more than the cache's "
                    f"capacity={self.capacity}: shorten it, or build the Generator with a larger capacity"
                )


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, … that is not below a length: a third of it is padding at most."""
    power = SHORTEST
    while power < length:
        power *= 2
    return 3 * power // 4 if power > SHORTEST and length <= 3 * power // 4 else power


def _check_model(model: Decoder) -> None:
    """Refuses a model whose routing of a token depends on more than the cache keeps."""
    config: DecoderConfig = model.config
    if not config.num_moe_layers:
        return
    if config.is_soft or not get_rule(config.rule, **config.rule_settings).is_causal:
        raise ValueError(
            f"rule={config.rule!r} routes a token by later tokens or other sequences, which do not exist yet when "
            "it is generated; a causal rule is needed"
        )
    if config.rule in COUNTING_RULES:
        raise ValueError(
            f"rule={config.rule!r} routes a token by its number in the sequence, which decoding one token at a time "
            "does not tell it; for a rule without learning that generates, take 'hash'"
        )
    if config.router in REMEMBERING_ROUTERS:
        raise ValueError(
            f"router={config.router!r} keeps a state along the sequence, which the cache does not hold; routers that "
            "score every token by itself can generate"
        )
    for stack in model.stacks:
        if isinstance(stack.feed_forward, MoELayer) and isinstance(stack.feed_forward.experts, AttentionExperts):
            raise ValueError("attention experts read earlier tokens' keys and values, which the cache does not hold")


def _depth(stack: Block) -> int:
    return len(jax.tree.leaves(stack)[0])


def _cut(array: Array, index: int | slice) -> Array:
    """A part of an array; on CPU a view of it."""
    if next(iter(array.devices())).platform != "cpu" or len(array.devices()) > 1:
        return array[index]
    return jax.device_put(np.asarray(array)[index], array.sharding, may_alias=True)


def _with_separate_experts(block: Block) -> Block:
    if not isinstance(block.feed_forward, MoELayer) or not isinstance(block.feed_forward.experts, ExpertStack):
        return block
    block = jax.tree.map(lambda leaf: leaf, block)
    block.feed_forward.experts = SeparateExperts(block.feed_forward.experts, _cut)
    return block


Weights = tuple[Decoder, list[Block]]


@partial(jax.jit, static_argnames=("capacity", "with_routing"))
def _prefill(
    weights: Weights, prompts: Array, lengths: Array, request: Request, capacity: int, with_routing: bool
) -> Progress:
    """Reads prompts `[B, S]` and draws the first token of every text."""
    stem, blocks = weights
    token_mask = jnp.arange(prompts.shape[1])[None, :] < lengths[:, None]
    x, cache, chosen = stem.embed(prompts, token_mask), [], []
    for block, topology in zip(blocks, _per_layer(stem.config, request.topology), strict=True):
        x, kept = block.attend(x, token_mask, capacity)
        cache.append(kept.grow(capacity))
        x, ids = _feed(block, x, token_mask, topology, request.token_groups, prompts)
        chosen += [] if ids is None else [ids]
    rows = jnp.arange(len(prompts))
    logits = stem.logits(x[rows, lengths - 1][:, None])[:, 0]
    is_present, expert_ids = None, None
    if "repetition_penalty" in request.settings:
        places = jnp.where(token_mask, prompts, stem.config.vocab_size)
        is_present = jnp.zeros(logits.shape, bool).at[rows[:, None], places].set(True, mode="drop")
    if with_routing and chosen:
        expert_ids = _pad(jnp.stack(chosen), axis=2, length=capacity)
    progress = Progress(
        tokens=_pad(prompts, axis=1, length=capacity),
        lengths=lengths,
        is_done=jnp.zeros(len(prompts), bool),
        cache=tuple(cache),
        is_present=is_present,
        expert_ids=expert_ids,
    )
    return _append(progress, logits, request)


@partial(jax.jit, donate_argnames="progress")
def _decode(weights: Weights, progress: Progress, request: Request, num_steps: Array) -> Progress:
    """Makes tokens until every text is done, at most so many of each."""

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
    for block, kept, topology in zip(blocks, progress.cache, _per_layer(stem.config, request.topology), strict=True):
        x, kept = block.extend(x, positions, kept)
        cache.append(kept)
        x, ids = _feed(block, x, is_going, topology, request.token_groups, token)
        chosen += [] if ids is None else [ids]
    expert_ids = progress.expert_ids
    if expert_ids is not None:
        expert_ids = expert_ids.at[:, rows, positions].set(jnp.stack(chosen)[:, :, 0])
    progress = progress._replace(cache=tuple(cache), expert_ids=expert_ids)
    return _append(progress, stem.logits(x)[:, 0], request)


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
    return progress._replace(
        tokens=tokens,
        lengths=lengths,
        is_done=is_done | is_stop | (lengths >= request.limits),
        is_present=is_present,
    )


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
    assert isinstance(routed.plan, RoutingPlan)  # Soft MoE is refused
    return x, routed.plan.expert_ids.reshape(*x.shape[:2], -1)


def _per_layer(config: DecoderConfig, topology: Topology | None) -> list[Topology | None]:
    """Each layer's part of a topology over the MoE layers."""
    before = np.cumsum([0] + [kind == "moe" for kind in config.layers])
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i], topology) if kind == "moe" else None
        for kind, i in zip(config.layers, before, strict=False)
    ]


def _pad(x: Array, axis: int, length: int) -> Array:
    """Zeros behind an axis up to a length."""
    return jnp.pad(x, [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)])
