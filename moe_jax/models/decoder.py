"""A decoder-only language model with any mix of dense and mixture-of-experts layers.

Embedding, blocks (RMSNorm, grouped-query attention with rotary positions, SwiGLU or MoE), norm, linear read-out: the
architecture of Llama (2302.13971) and, with MoE layers, Mixtral (2401.04088). Neighbouring layers of one kind are
stacked in one set of arrays with a leading axis and scanned, so compile time does not grow with depth.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.blocks import init_block
from moe_jax.models.config import DecoderConfig
from moe_jax.models.execution import ONE_DEVICE, Execution
from moe_jax.nn.block import Block
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.norms import NORMS
from moe_jax.nn.routers import REMEMBERING_ROUTERS
from moe_jax.ops.linear import linear
from moe_jax.routing import Balancer, Force, keep_trace
from moe_jax.types import Array, RouterOutput, RouterStats, RoutingPlan, Topology, TraceLevel


class Decoder(nnx.Module):
    """The language model. Called on tokens it gives logits and what every router did."""

    def __init__(self, config: DecoderConfig, *, key: Array, execution: Execution = ONE_DEVICE):
        """Initialises all parameters in float32.

        Args:
          config: the architecture.
          key: consumed; `jax.vmap` over keys makes a population.
          execution: over which devices the model runs, and what it keeps for the gradient.
        """
        self.config, self.execution = config, execution
        embed_key, read_key, *layer_keys = jax.random.split(key, 2 + len(config.layers))
        self.embedding = nnx.Param(jax.random.normal(embed_key, (1 + config.context, config.vocab_size, config.width)))
        patterns = config.patterns
        self.stacks = nnx.List(
            jax.vmap(lambda pattern, layer_key, kind=kind: init_block(config, kind, pattern, layer_key, execution))(
                None if patterns is None else jnp.asarray(patterns[run.start : run.stop]),
                jnp.stack([layer_keys[i] for i in run]),
            )
            for kind, run in config.runs
        )
        self.norm = NORMS[config.norm](config.width, config.norm_epsilon)
        read_out = jax.random.normal(read_key, (config.width, config.vocab_size)) * config.width**-0.5
        self.read_out = None if config.tie_embeddings else nnx.Param(read_out)
        self.read_out_bias = nnx.Param(jnp.zeros(config.vocab_size)) if config.read_out_bias else None

    def __call__(
        self,
        tokens: Array,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
        segments: Array | None = None,
    ) -> tuple[Array, RouterOutput]:
        """Next-token logits.

        Args:
          tokens: `[B, S]` int token ids.
          token_mask: `[B, S]` bool, false for padding: not attended to, not routed, not counted.
          topology: `keep [L, G, E]`, `num_choices [L, G]` over the MoE layers, or None.
          token_groups: `[B]` or `[B, S]` int32 group of each sequence or token; needed when G > 1.
          trace: how much of the routing to return.
          key: consumed by routers that draw in training; None means evaluation.
          forced: a plan `[L, T, K]` that routes instead of the rules, such as one recorded at trace level "topk".
          force: "exact" takes the plan's experts and gates, "ids" its experts, with gates from this model's logits.
          segments: `[B, S]` int32; each run of equal ids is a text of its own: it sees nothing of the others and its
            positions begin at 0. None where a sequence is one text. Rules whose groups are sequences still see one.

        Returns:
          `[B, S, V]` float32 logits, and the router output with a leading `[L]` over the MoE layers.

        Raises:
          ValueError: segments, and a router whose memory would run on from one to the next.
        """
        if segments is not None and self.config.router in REMEMBERING_ROUTERS and "moe" in self.config.layers:
            raise ValueError(
                f"router={self.config.router!r} keeps a state along the sequence, which would run on from one text of "
                "a packed row to the next; train it with data.packing='crop'"
            )
        x, routed = self.run_layers(
            self.embed(tokens, token_mask, segments),
            0,
            len(self.config.layers),
            token_mask,
            topology,
            token_groups,
            trace,
            token_ids=tokens,
            key=key,
            forced=forced,
            force=force,
            segments=segments,
        )
        return self.logits(x), routed

    def embed(self, tokens: Array, token_mask: Array | None = None, segments: Array | None = None) -> Array:
        """`[B, S]` ids to `[B, S, D]` in the compute dtype; masked tokens and what precedes a text add no context."""
        tables, dtype = self.embedding[...], self.config.compute_dtype
        is_token = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
        x = tables[0, tokens].astype(dtype)
        for distance in range(1, len(tables)):
            shift = ((0, 0), (distance, 0))
            earlier = tables[distance, jnp.pad(tokens, shift)[:, :-distance]].astype(dtype)
            adds = jnp.pad(is_token, shift)[:, :-distance, None]
            if segments is not None:
                adds &= (jnp.pad(segments, shift)[:, :-distance] == segments)[..., None]
            x += earlier * adds
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def layer(self, index: int) -> Block:
        """The block of layer `index`, cut out of its stack."""
        for stack, (_, run) in zip(self.stacks, self.config.runs, strict=True):
            if index in run:
                position = index - run.start
                return jax.tree.map(lambda leaf, position=position: leaf[position], stack)
        raise IndexError(f"layer {index} of {len(self.config.layers)}")

    def logits(self, x: Array) -> Array:
        """`[B, S, D]` after the last layer to `[B, S, V]` float32."""
        read_out = self.embedding[...][0].T if self.read_out is None else self.read_out[...]
        x = self.norm(x)
        if x.dtype != read_out.dtype:
            x, read_out = x.astype(jnp.float32), read_out.astype(jnp.float32)
        logits = linear(x, read_out, dtype=jnp.float32)
        if self.read_out_bias is not None:
            logits += self.read_out_bias[...].astype(jnp.float32)[None, None]
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def run_layers(
        self,
        x: Array,
        start: int,
        stop: int,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        token_ids: Array | None = None,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
        segments: Array | None = None,
    ) -> tuple[Array, RouterOutput]:
        """Layers `start` to `stop` alone, so that what several candidates share is computed once.

        Args:
          x: `[B, S, D]` entering layer `start`.
          start: first layer, static, counted over dense and MoE layers.
          stop: one past the last.
          token_mask: as in `__call__`.
          topology: over all L MoE layers of the model, as in `__call__`.
          token_groups: as in `__call__`.
          trace: as in `__call__`.
          token_ids: `[B, S]` int, what `x` began as; needed by rules that route by vocabulary id.
          key: as in `__call__`.
          forced: as in `__call__`, over all L MoE layers of the model.
          force: as in `__call__`.
          segments: as in `__call__`.

        Returns:
          `[B, S, D]` and the router output of the MoE layers passed, with a leading axis; fields are None if none was.
        """
        if token_groups is not None and token_groups.ndim == 1:
            token_groups = jnp.broadcast_to(token_groups[:, None], x.shape[:2])
        outputs = []
        for stack, (kind, run) in zip(self.stacks, self.config.runs, strict=True):
            first = run.start
            low, high = max(start - first, 0), min(stop - first, len(run))
            if low >= high:
                continue
            part = jax.tree.map(lambda leaf, low=low, high=high: leaf[low:high], stack)
            routed_before = self.config.layers[: first + low].count("moe")
            routing = None  # this part's share of what is given per MoE layer
            if kind == "moe":
                routing = jax.tree.map(
                    lambda leaf, a=routed_before, b=routed_before + high - low: leaf[a:b], (topology, forced)
                )
            keys = None
            if key is not None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first + low, first + high))

            def body(
                x: Array, layer: tuple[Block, tuple[Topology | None, RoutingPlan | None] | None, Array | None]
            ) -> tuple[Array, RouterOutput | None]:
                block, routing, layer_key = layer
                topology, forced = routing or (None, None)
                x, routed = block(
                    self.execution.split_batch(x),
                    token_mask,
                    topology,
                    token_groups,
                    token_ids=token_ids,
                    key=layer_key,
                    forced=forced,
                    force=force,
                    segments=segments,
                )
                return x, None if routed is None else keep_trace(routed, trace)

            x, routed = jax.lax.scan(self.execution.rematerialize(body), x, (part, routing, keys))
            if routed is not None:
                outputs.append(routed)
        if not outputs:
            return x, RouterOutput(None, None, None)
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)

    def update_balance(self, stats: RouterStats, balancer: Balancer) -> None:
        """Moves the routers' balance state after an optimizer step, in place.

        Args:
          stats: sums over the whole optimizer step, with a leading `[L]`.
          balancer: moves the selection biases; see `routing.BALANCERS`.
        """
        total = jax.tree.map(lambda leaf: leaf.sum(0), stats)
        for layers, part in self._routed_stacks(stats):
            moved = jax.vmap(lambda layer, sums: layer.next_balance(sums, total, balancer))(layers, part)
            for name, value in moved.items():
                getattr(layers, name)[...] = value

    def router_penalty(self, stats: RouterStats) -> Array:
        """`[L]` losses that the rules themselves ask for, from stats `[L, ...]`; 0 for most rules."""
        penalties = [
            jax.vmap(lambda layer, sums: layer.penalty(sums))(layers, part)
            for layers, part in self._routed_stacks(stats)
        ]
        return jnp.concatenate(penalties) if penalties else jnp.zeros(self.config.num_moe_layers)

    def _routed_stacks(self, stats: RouterStats) -> Iterator[tuple[MoELayer, RouterStats]]:
        """Each stack of layers that follow a rule, with their part of the stats."""
        start = 0
        for stack, (_, run) in zip(self.stacks, self.config.runs, strict=True):
            if isinstance(stack.feed_forward, MoELayer):
                stop = start + len(run)
                yield stack.feed_forward, jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], stats)
                start = stop
