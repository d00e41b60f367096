"""Generation: texts continued in batches, whole or as they come; the programs are in `models.decoding`.

Lengths are rounded up to a few sizes, so that few programs compile. Nothing is dropped for capacity, which is of
training. Rotary positions that depend on the length of the text (`longrope`) go by the capacity of the cache.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.models.decoder import Decoder
from moe_jax.models.decoding import Progress, Request, Weights, decode, prefill
from moe_jax.models.sampling import GREEDY, Sampling
from moe_jax.nn.attention_experts import AttentionExperts
from moe_jax.nn.block import Block
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers import REMEMBERING_ROUTERS
from moe_jax.nn.separate_experts import SeparateExperts
from moe_jax.routing import get_rule
from moe_jax.trees import cut
from moe_jax.types import Topology

SHORTEST = 16  # the least length that a program is compiled for
COUNTING_RULES = ("random", "forced_uniform", "forced_zipf", "forced_skewed")  # a token's number decides
MOST_BRANCHES = 512  # experts of all layers up to which each gets a branch in the program of decoding
SLOTS_PER_EXPERT = 4  # choices of a batch, for each expert, up to which branches are the faster way


class Chunk(NamedTuple):
    """What came in one call of a program.

    Attributes:
      tokens: new tokens of each sequence, none of a finished one.
      seconds: that it took until the tokens were on the host, compilation included if it was due.
      expert_ids: for each sequence `[L, N, K]` int32, the choices for the N tokens read to make these: the prompt, then
        the last new token of the chunk before and these but their last; None unless asked for.
    """

    tokens: list[list[int]]
    seconds: float
    expert_ids: list[np.ndarray] | None = None


class Generation(NamedTuple):
    """Texts, and how fast they came.

    Attributes:
      tokens: of each sequence, without its prompt; a stop token is the last one.
      prefill_tokens_per_second: prompt tokens over the time to the first new tokens.
      decode_tokens_per_second: new tokens after the first of each sequence, over their time; 0 if there are none.
      expert_ids: for each sequence `[L, N, K]` int32, the choices for prompt and text but its last token, which no
        layer has read; None unless asked for.
    """

    tokens: list[list[int]]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    expert_ids: list[np.ndarray] | None = None


class Generator:
    """A decoder with its layers laid out for generating."""

    def __init__(self, model: Decoder, *, capacity: int | None = None):
        """Cuts the layers out of their stacks, on CPU without a copy; the model may be dropped afterwards.

        Args:
          model: with weights in the dtype in which they should be read.
          capacity: tokens of prompt and text that every cache is made for; None makes it for each request.

        Raises:
          ValueError: a model whose routing of a token depends on more than the cache keeps.
        """
        _check_model(model)
        self.config, self.capacity = model.config, capacity
        stem = jax.tree.map(lambda leaf: leaf, model)
        stem.stacks = nnx.List()
        blocks = []
        for stack, (_, run) in zip(model.stacks, model.config.runs, strict=True):
            blocks += [jax.tree.map(lambda leaf, i=i: cut(leaf, i), stack) for i in range(len(run))]
        for block in blocks:
            if isinstance(block.feed_forward, MoELayer):
                block.feed_forward.capacity = None
        self._weights = self._weights_for_few = Weights(stem, blocks)
        is_on_cpu = {device.platform for device in jax.tree.leaves(model)[0].devices()} == {"cpu"}
        if is_on_cpu and model.config.num_moe_layers * model.config.num_experts <= MOST_BRANCHES:
            self._weights_for_few = Weights(stem, [_with_separate_experts(block) for block in blocks])

    def generate(self, prompts: Sequence[Sequence[int]], **request: Any) -> Generation:
        """Continues texts, each until a stop token or its last allowed token.

        Args:
          prompts: token ids.
          **request: as in `stream`; `chunk` is None unless given.

        Returns:
          The texts.

        Raises:
          ValueError: see `stream`.
        """
        chunks = list(self.stream(prompts, **({"chunk": None} | request)))
        tokens = [list(itertools.chain(*parts)) for parts in zip(*(chunk.tokens for chunk in chunks), strict=True)]
        num_decoded = sum(len(text) - 1 for text in tokens)
        routing = [chunk.expert_ids for chunk in chunks if chunk.expert_ids is not None]
        return Generation(
            tokens,
            sum(map(len, prompts)) / chunks[0].seconds,
            num_decoded / sum(chunk.seconds for chunk in chunks[1:]) if num_decoded else 0.0,
            [np.concatenate(parts, axis=1) for parts in zip(*routing, strict=True)] if routing else None,
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
          sequence_ids: numbers from 0 to 2^32 - 1 that tell the texts' random numbers apart; None counts them from 0. A
            prompt with the same seed and id gives the same text in any batch.
          topology: `keep [L, G, E]`, `num_choices [L, G]` over the MoE layers, or None.
          token_groups: the topology's group of each text; needed when G > 1.
          with_routing: whether to return the chosen experts too.
          chunk: tokens of each text between two chunks; None for all at once.

        Yields:
          The first token of every text, then up to `chunk` of each at a time.

        Raises:
          ValueError: no prompts, an empty one, one with ids outside of the vocabulary or longer than the capacity
            allows, counts below 1 or that do not fit the prompts, or routing asked of a model that does not route.
        """
        _check_counts(len(prompts), max_tokens, chunk, {"sequence_ids": sequence_ids, "token_groups": token_groups})
        self._check_prompts(prompts, max_tokens)
        if with_routing and not self.config.num_moe_layers:
            raise ValueError("with_routing=True, but the model has no layer that routes")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ids = range(len(prompts)) if sequence_ids is None else sequence_ids
        asked = Request(
            limits=jnp.asarray(lengths + max_tokens),
            stop_tokens=jnp.asarray([*stop_tokens, *[-1] * (bucket(len(stop_tokens)) - len(stop_tokens))], jnp.int32),
            settings=jax.tree.map(jnp.asarray, sampling.settings),
            keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(ids, jnp.uint32)),
            topology=topology,
            token_groups=None if token_groups is None else jnp.asarray(token_groups, jnp.int32),
        )
        capacity = self.capacity or bucket(lengths.max() + max_tokens)
        padded = np.zeros((len(prompts), min(bucket(lengths.max()), capacity)), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        weights = self._weights
        if len(prompts) * self.config.num_choices <= SLOTS_PER_EXPERT * self.config.num_experts:
            weights = self._weights_for_few
        start, seen, read = time.perf_counter(), lengths, np.zeros_like(lengths)
        progress = prefill(self._weights, padded, lengths, asked, capacity, with_routing)
        while True:
            chunk_made, seen, read = _fetch(progress, start, seen, read)
            yield chunk_made
            if np.array(progress.is_done).all():
                return
            start = time.perf_counter()
            progress = decode(weights, progress, asked, np.int32(chunk or max_tokens))

    def _check_prompts(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Refuses prompts that cannot be continued."""
        vocab_size = self.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: give at least one token, such as the beginning-of-text token")
            wrong = [token for token in prompt if not 0 <= token < vocab_size]
            if wrong:
                raise ValueError(f"prompt {i} has token {wrong[0]}, outside of the vocabulary [0, {vocab_size})")
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


def _fetch(
    progress: Progress, start: float, seen: np.ndarray, read: np.ndarray
) -> tuple[Chunk, np.ndarray, np.ndarray]:
    """The chunk between `seen [B]` and the present lengths, these, and how many tokens have been read.

    Everything is copied: what comes of a donated array must not be held.
    """
    lengths, tokens = np.array(progress.lengths), np.array(progress.tokens)
    new = [row[a:b].tolist() for row, a, b in zip(tokens, seen, lengths, strict=True)]
    seconds, routing = time.perf_counter() - start, None
    if progress.expert_ids is not None:
        expert_ids = np.array(progress.expert_ids)
        routing = [expert_ids[:, i, a : b - 1] for i, (a, b) in enumerate(zip(read, lengths, strict=True))]
    return Chunk(new, seconds, routing), lengths, lengths - 1


def _check_counts(num_prompts: int, max_tokens: int, chunk: int | None, one_each: dict[str, Sequence | None]) -> None:
    """Refuses numbers that cannot be meant."""
    if not num_prompts:
        raise ValueError("there are no prompts: give at least one list of token ids")
    if max_tokens < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"max_tokens={max_tokens} and chunk={chunk} must be at least 1")
    for name, values in one_each.items():
        if values is not None and len(values) != num_prompts:
            raise ValueError(f"{name} has {len(values)} values for {num_prompts} prompts: give one for each")


def _check_model(model: Decoder) -> None:
    """Refuses a model whose routing of a token depends on more than the cache keeps."""
    config = model.config
    if not config.num_moe_layers:
        return
    if config.is_soft or not get_rule(config.rule, **config.rule_settings).is_causal:
        raise ValueError(
            f"rule={config.rule!r} routes a token by later tokens or other sequences, which do not exist yet when it "
            "is generated; only models with a causal rule can generate"
        )
    if config.rule in COUNTING_RULES:
        raise ValueError(
            f"rule={config.rule!r} routes a token by its number in the sequence, which a token that is decoded alone "
            "does not have; of the rules without learning, 'hash' can generate"
        )
    if config.router in REMEMBERING_ROUTERS:
        raise ValueError(
            f"router={config.router!r} keeps a state along the sequence, which the cache does not hold; only routers "
            "that score every token by itself can generate"
        )
    feed_forwards = [stack.feed_forward for stack in model.stacks]
    if any(isinstance(one, MoELayer) and isinstance(one.experts, AttentionExperts) for one in feed_forwards):
        raise ValueError("attention experts attend to keys and values of earlier tokens, which the cache does not hold")


def _with_separate_experts(block: Block) -> Block:
    """The block with experts that a few tokens read without copying."""
    layer = block.feed_forward
    if not isinstance(layer, MoELayer) or not isinstance(layer.experts, ExpertStack):
        return block
    block = jax.tree.map(lambda leaf: leaf, block)
    block.feed_forward.experts = SeparateExperts(layer.experts)
    return block
