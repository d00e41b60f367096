"""The nouns of moe_jax: frozen pytrees and function aliases shared by every layer.

Axis legend, used in every docstring and einsum of the project:

    B batch · S sequence · T tokens (B*S) · D model width · F expert hidden width
    E experts · K choices per token · C capacity (rows per expert) · L layers
    H heads · V vocabulary · P population · G token groups

Routing and dispatch meet only in `RoutingPlan`: any rule works with any backend, and a plan can be
recorded, edited and replayed. "No expert" is the sentinel id `E` (`plan.num_experts`), never -1.
Soft MoE, which chooses nothing, has a `SoftPlan` and one way to run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

import jax

Array = jax.Array
ArrayTree = Any
TraceLevel = Literal["off", "stats", "topk", "full"]  # how much of the routing a compiled program returns
_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def _pytree(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass and a JAX pytree; `static()` fields are part of its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static() -> Any:
    """A dataclass field that is compile-time structure, not data."""
    return dataclasses.field(metadata={"static": True})


@_pytree
class RoutingInputs:
    """All that a routing rule may look at; `logits` is always there, the rest where the caller has it.

    Attributes:
      logits: `[T, E]` float32 router logits.
      is_open: `[T, E]` bool, false for experts closed to a token, and on the whole row of a masked token; None means
        that everything is open.
      limit: `[T]` int32, the most experts that a token may use; None means no limit but the rule's own.
      bias: `[E]` or `[T, E]` float32 that moves the selection and never the gates (2408.15664); None means zero.
      level: `[]` float32, the number that the rule's controller steers, such as a threshold; None means its start.
      noise_scale: `[T, E]` float32 standard deviation of the logits' noise, if the router module gives one.
      token_ids: `[T]` int32 vocabulary ids of the tokens.
      key: a PRNG key, consumed; None means evaluation: what is random in training is off.
      num_sequences: B; the T tokens are B sequences of equal length, one after the other.
    """

    logits: Array
    is_open: Array | None = None
    limit: Array | None = None
    bias: Array | None = None
    level: Array | None = None
    noise_scale: Array | None = None
    token_ids: Array | None = None
    key: Array | None = None
    num_sequences: int = dataclasses.field(default=1, metadata={"static": True})


@_pytree
class Choice:
    """A routing rule's answer, before capacity.

    Attributes:
      expert_ids: `[T, K]` int32 in `[0, E]`, `E` in empty slots; K may be larger than the choices asked for where a
        rule gives tokens different numbers of experts.
      gates: `[T, K]` float32; 0 in empty slots.
      probabilities: `[T, E]` float32, each row a distribution over the token's open experts, or 0 for masked tokens.
      load: `[T, E]` differentiable estimate that a token is sent to an expert, for the rules that have one.
      priority: `[T]` float32; a higher one is served earlier when capacity is short. None serves by position.
      capacity: the most tokens of any expert, if the rule itself promises one.
      scores: `[T, E]` float32 what the selection bias is added to; None from rules that do not simply take the best of
        scores plus bias.
      num_null: the last columns of E that are null experts. Their ids may be chosen, with gate 0, and are counted, but
        nothing is dispatched: their slots are empty in the plan.
      redistribute: whether a token's gates still sum to what they did when capacity has dropped some of them.
    """

    expert_ids: Array
    gates: Array
    probabilities: Array
    load: Array | None = None
    priority: Array | None = None
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})
    scores: Array | None = None
    num_null: int = dataclasses.field(default=0, metadata={"static": True})
    redistribute: bool = dataclasses.field(default=False, metadata={"static": True})


@_pytree
class RoutingPlan:
    """Which experts process which token, and with what weight.

    Attributes:
      expert_ids: `[T, K]` int32 in `[0, E]`; `E` marks an empty slot (padding token, dropped, forbidden). A token names
        an expert at most once.
      gates: `[T, K]` float32 combine weights; exactly 0 in empty slots.
      num_experts: E.
      capacity: the most tokens that any expert receives, if the rule promises one; None means up to T.
    """

    expert_ids: Array
    gates: Array
    num_experts: int = static()
    capacity: int | None = static()


@_pytree
class SoftPlan:
    """Soft MoE's assignment: every slot of an expert is a mixture of tokens, every output a mixture of slots.

    Attributes:
      dispatch: `[T, E, C]` float32, token t's share of slot c of expert e in its own sequence. Over a sequence's tokens
        the shares of a slot sum to 1, or are all 0 if the expert is open to none of them.
      combine: `[T, E, C]` float32, the slot's share in token t's output; sums to 1 over all slots, 0 for masked tokens.
      num_sequences: B; the T tokens are B sequences of equal length, and an expert has C slots for each.
    """

    dispatch: Array
    combine: Array
    num_sequences: int = static()


@_pytree
class RouterStats:
    """Sums over tokens, all float32: they add over micro-batches, sequences and devices.

    Every loss and metric is one formula applied after the addition. Masked tokens contribute to `num_masked` only.

    Attributes:
      chosen: `[E]` assignments the rule asked for, before capacity; those to null experts are shared evenly among them,
        since it does not matter which was chosen.
      kept: `[E]` assignments that reach an expert.
      prob_sums: `[E]` sum of the router's probabilities (what the load-balancing loss differentiates).
      entropy_sum: `[]` sum of the probabilities' entropies, nats.
      z_sum: `[]` sum of squared logsumexp of the logits.
      dropped_capacity: `[]` assignments lost because the expert was full.
      dropped_topology: `[]` assignments that a rule of fixed K lost since the topology leaves fewer experts open.
      num_tokens: `[]` tokens routed.
      num_masked: `[]` tokens masked out.
      gate_sums: `[E]` sum of the gates before capacity: the importance of 1701.06538, eq. 6.
      load_sums: `[E]` the rule's differentiable estimate of `chosen`, or `chosen` itself if it has none.
      bias_histogram: `[E, N]` tokens by the selection bias that the expert would have needed to be chosen, in the bins
        of `routing.required_bias`; None unless asked for.
    """

    chosen: Array
    kept: Array
    prob_sums: Array
    entropy_sum: Array
    z_sum: Array
    dropped_capacity: Array
    dropped_topology: Array
    num_tokens: Array
    num_masked: Array
    gate_sums: Array
    load_sums: Array
    bias_histogram: Array | None = None


@_pytree
class RouterOutput:
    """What a router returns; a model returns one with a leading `[L]`, over its MoE layers.

    Attributes:
      plan: the assignment, or None below trace level "topk".
      logits: `[T, E]` float32 router logits, or None below trace level "full".
      stats: sum-form statistics, or None at trace level "off".
    """

    plan: RoutingPlan | SoftPlan | None
    logits: Array | None
    stats: RouterStats | None


@_pytree
class Topology:
    """The evolvable part of routing, as arrays, so that changing it recompiles nothing.

    Token groups carry everything that differs between tokens: one group for a single topology, one group a
    candidate for a population that shares weights, one group a token class for content-dependent connectivity.

    Attributes:
      keep: `[L, G, E]` bool; expert `e` of layer `l` is open to tokens of group `g`.
      num_choices: `[L, G]` int32 in `[1, K]`; experts a token of the group may use.

    Scanning over layers peels the leading `[L]`; a router sees `[G, E]` and `[G]`.
    """

    keep: Array
    num_choices: Array


class Expert(NamedTuple):
    """An expert network for rows of one expert, cut in two where its activations are worth saving.

    `outer(params, inner(params, rows))` with rows `[C, D]` gives `[C, D]`, or `[C, D']` for a network that changes the
    width; both see one expert's slice of the parameters. Rows are independent of each other, and what the network gives
    for a row of padding is discarded.
    A backend with its own VJP stores only `inner`'s output and recomputes the cheap rest, so cut behind the first
    matmul: then neither half repeats a matmul in the backward pass.

    `grouped(params, rows, matmul, spread)` is the same network for all experts at once, from the stacked parameters and
    rows `[N, D]` in expert order to `[N, D]`. It multiplies with `matmul(rows [N, D], weights [E, D, F])`, `[N, F]`;
    what is not a matrix, say a bias, it takes by `spread(values [E, ...])`, `[N, ...]`, the value of each row's expert.
    Backends made of grouped matmuls refuse an expert without it.

    `split(params, parts)` cuts the network into `parts` whose outputs add up to its own: from the stacked parameters to
    the same with leading `[E, parts]`, each part with its share of the hidden units. Only a network that is a sum over
    hidden units has it; without it an expert is not split over devices.
    """

    inner: Callable[[ArrayTree, Array], ArrayTree]
    outer: Callable[[ArrayTree, ArrayTree], Array]
    grouped: Callable[[ArrayTree, Array, Callable, Callable], Array] | None = None
    split: Callable[[ArrayTree, int], ArrayTree] | None = None


# (tokens [T, D], plan, expert, stacked parameters with leading [E]) -> [T, D] (or D' of the expert), in tokens' dtype.
DispatchFn = Callable[[Array, RoutingPlan, Expert, ArrayTree], Array]
