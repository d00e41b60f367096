"""Fitness of routing topologies over one trained model: a population is a batch, not a vmap.

All candidates share the weights and differ only in their topology, so the candidates' sequences are put side by side
and the topology becomes a matter of token groups: P candidates cost one forward pass of P times the tokens, on the fast
path. Layers before the first one that any candidate changes are computed once for all, ahead of the search.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.evolution.genomes import Genome, LayerTopology
from moe_jax.losses import kl_divergence
from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import active_expert_flops
from moe_jax.models.decoder import Decoder
from moe_jax.routing import count_assignments, get_rule, population_topology
from moe_jax.types import Array, RoutingPlan

OBJECTIVES = (
    "KL to the full model (nats per byte)",
    "active expert FLOPs per token",
    "max/mean load over kept experts",
)


class PopulationData(NamedTuple):
    """What the evaluation reads besides genomes; handed to the compiled search as an argument.

    Attributes:
      state: the model's parameters and balance state.
      tokens: `[N, S]` int token ids.
      hidden: `[N, S, D]` activations entering the first layer that a candidate may change.
      token_mask: `[N, S]` bool.
      reference: `[N, S, V]` float32 logits of the untouched model.
      frozen_load: `[L - L']` float32 max/mean expert load of the MoE layers that no candidate changes.
    """

    state: nnx.State
    tokens: Array
    hidden: Array
    token_mask: Array
    reference: Array
    frozen_load: Array


@dataclasses.dataclass(frozen=True, eq=False)
class PopulationEvaluator:
    """How to evaluate one genome kind. Compared by identity: keep the object, its compiled programs hang on it.

    Attributes:
      graphdef: structure of the decoder.
      config: its architecture.
      genome: decodes to `keep [L', E]`, `num_choices [L']` over the last L' MoE layers; earlier ones stay whole.
      frozen_layers: leading MoE layers that no candidate changes, L - L'.
      micro_batch: the most candidates evaluated at once; see `candidates_that_fit`.
    """

    graphdef: nnx.GraphDef
    config: DecoderConfig
    genome: Genome
    micro_batch: int
    frozen_layers: int = 0

    def __post_init__(self) -> None:
        """Refuses what would give wrong values instead of an error."""
        if self.config.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={self.config.capacity_factor} limits the rows of all candidates together, so they "
                "would push each other out; evaluate topologies of a model with capacity_factor=None"
            )
        if self.config.is_soft:
            raise ValueError("Soft MoE (rule='soft') makes no choices, so there are none to count; use another rule")
        if not get_rule(self.config.rule).is_causal:
            raise ValueError(
                f"rule={self.config.rule!r} lets tokens compete across sequences, so candidates would change each "
                "other's routing; evaluate topologies of a model with a causal rule"
            )
        if not 0 <= self.frozen_layers < self.config.num_moe_layers:
            raise ValueError(
                f"frozen_layers={self.frozen_layers} must leave at least one of the {self.config.num_moe_layers} MoE "
                "layers to the search"
            )

    @property
    def first_layer(self) -> int:
        """The first layer, dense ones counted, that a candidate may change."""
        routed = [index for index, kind in enumerate(self.config.layers) if kind == "moe"]
        return routed[self.frozen_layers]

    def prepare(self, state: nnx.State, tokens: Array, token_mask: Array) -> PopulationData:
        """Computes what all candidates share.

        Args:
          state: the model's parameters and balance state.
          tokens: `[N, S]` int token ids of the split to evaluate on.
          token_mask: `[N, S]` bool.
        """
        return PopulationData(state, tokens, *_shared(self.graphdef, self.first_layer, state, tokens, token_mask))

    def objectives(self, genomes: Array, data: PopulationData) -> Array:
        """All three objectives, each to be minimised, named in `OBJECTIVES`.

        Args:
          genomes: `[P, N]` int32 valid genomes.
          data: from `prepare`.

        Returns:
          `[P, 3]` float32: mean KL(full || candidate) over unmasked positions; the FLOPs of the experts that a token
          really uses, summed over layers; the fullest expert's load over the mean load of the kept ones, averaged over
          layers. Layers that stay whole count in both.
        """
        topologies = jax.vmap(self.genome.decode)(genomes)
        size = genomes.shape[0]
        rounds = -(-size // self.micro_batch)
        batch = -(-size // rounds)  # as even as possible; what is missing in the last round is filled with repeats
        rows = jnp.arange(rounds * batch).reshape(rounds, batch) % size
        parts = jax.tree.map(lambda x: x[rows], topologies)
        values = jax.lax.map(lambda part: self._evaluate_batch(part, data), parts)
        return values.reshape(rounds * batch, -1)[:size]

    def divergence(self, genomes: Array, data: PopulationData) -> Array:
        """The first objective alone, `[P]`: for searches at a fixed number of experts."""
        return self.objectives(genomes, data)[:, 0]

    def _evaluate_batch(self, topologies: LayerTopology, data: PopulationData) -> Array:
        """`keep [c, L', E]`, `num_choices [c, L']` of a few candidates to `[c, 3]`."""
        config, (count, num_layers, num_experts) = self.config, topologies.keep.shape
        model: Decoder = nnx.merge(self.graphdef, data.state)
        frozen = ((0, 0), (self.frozen_layers, 0))
        x, routed = model.run_layers(
            _side_by_side(data.hidden, count),
            self.first_layer,
            len(config.layers),
            _side_by_side(data.token_mask, count),
            population_topology(
                jnp.pad(topologies.keep, (*frozen, (0, 0)), constant_values=True),
                jnp.pad(topologies.num_choices, frozen, constant_values=config.num_choices),
            ),
            jnp.repeat(jnp.arange(count), data.hidden.shape[0]),
            trace="topk",
            token_ids=_side_by_side(data.tokens, count),
        )
        assert isinstance(routed.plan, RoutingPlan)  # the trace level keeps it
        ids = routed.plan.expert_ids.reshape(num_layers, count, -1)  # (L', c*N*S, K) -> (L', c, N*S*K)
        counts = jax.vmap(jax.vmap(partial(count_assignments, num_experts=num_experts)))(jnp.swapaxes(ids, 0, 1))
        frozen_choices = jnp.full((count, self.frozen_layers), float(config.num_choices))
        frozen_load = jnp.broadcast_to(data.frozen_load, (count, self.frozen_layers))
        tokens = jnp.maximum(data.token_mask.sum(dtype=jnp.float32), 1.0)
        logits = model.logits(x).reshape(count, *data.reference.shape)
        divergence = jnp.where(data.token_mask[None], kl_divergence(data.reference[None], logits), 0.0)
        choices = jnp.concatenate([frozen_choices, counts.sum(-1) / tokens], axis=1)
        load = jnp.concatenate([frozen_load, _relative_load(counts, topologies.keep.sum(-1))], axis=1)
        return jnp.stack(
            [divergence.sum((1, 2)) / tokens, active_expert_flops(config, choices), load.mean(axis=1)], axis=1
        )


def _relative_load(counts: Array, num_kept: Array) -> Array:
    """Assignments `[..., E]` to the fullest expert's load over the mean of the `[...]` kept ones."""
    return counts.max(-1) * num_kept / counts.sum(-1)


def _side_by_side(x: Array, count: int) -> Array:
    """`(N, ...) -> (count * N, ...)`, one copy per candidate."""
    return jnp.tile(x, (count,) + (1,) * (x.ndim - 1))


def candidates_that_fit(config: DecoderConfig, num_sequences: int, length: int, memory_limit: float) -> int:
    """Candidates whose evaluation stays below a memory limit, at least 1.

    Counts, per token, the live activations in float32: residual stream, norm, fused attention and expert rows of one
    layer, one layer's attention scores (`H S`), and four arrays of logits (model, reference and their log-softmaxes).
    The compiler shares buffers between them, so about half of the limit is really used. On a CPU more is not faster:
    past some 8,000 tokens at once, activations leave the caches.

    Args:
      config: the model.
      num_sequences: N evaluated per candidate.
      length: S.
      memory_limit: bytes.
    """
    rows = config.num_choices * (2 * config.width + 3 * config.expert_hidden)
    per_token = 8 * config.width + rows + 2 * config.num_heads * length + 4 * config.vocab_size
    return max(1, int(memory_limit // (4 * per_token * num_sequences * length)))


@jax.jit(static_argnames=("graphdef", "first_layer"))
def _shared(
    graphdef: nnx.GraphDef, first_layer: int, state: nnx.State, tokens: Array, token_mask: Array
) -> tuple[Array, Array, Array, Array]:
    """The fields of `PopulationData` after `tokens`."""
    model: Decoder = nnx.merge(graphdef, state)
    embedded, last = model.embed(tokens, token_mask), len(model.config.layers)
    hidden, routed = model.run_layers(embedded, 0, first_layer, token_mask, token_ids=tokens)
    rest, _ = model.run_layers(hidden, first_layer, last, token_mask, trace="off", token_ids=tokens)
    load = jnp.zeros(0)
    if routed.stats is not None:
        load = _relative_load(routed.stats.kept, jnp.float32(model.config.num_experts))
    return hidden, token_mask, model.logits(rest), load
