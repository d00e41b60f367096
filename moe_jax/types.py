"""The nouns of moe_jax: frozen pytrees and function aliases shared by every layer.

Axis legend, used in every docstring and einsum of the project:

    B batch · S sequence · T tokens (B*S) · D model width · F expert hidden width
    E experts · K choices per token · C capacity (rows per expert) · L layers
    H heads · V vocabulary · P population · G token groups

Routing and dispatch meet only in `RoutingPlan`: any rule works with any backend, and a plan can be
recorded, edited and replayed. "No expert" is the sentinel id `E` (`plan.num_experts`), never -1.
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
class RouterStats:
    """Sums over tokens, all float32: they add over micro-batches, sequences and devices.

    Every loss and metric is one formula applied after the addition. Masked tokens contribute to `num_masked` only.

    Attributes:
      chosen: `[E]` assignments the rule asked for, before capacity.
      kept: `[E]` assignments that reach an expert.
      prob_sums: `[E]` sum of the router's probabilities (the only field the balance loss differentiates).
      entropy_sum: `[]` sum of the probabilities' entropies, nats.
      z_sum: `[]` sum of squared logsumexp of the logits.
      dropped_capacity: `[]` assignments lost because the expert was full.
      dropped_topology: `[]` assignments lost because the topology leaves fewer experts than choices.
      num_tokens: `[]` tokens routed.
      num_masked: `[]` tokens masked out.
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


@_pytree
class RouterOutput:
    """What a router returns; a model returns one with a leading `[L]`, over its MoE layers.

    Attributes:
      plan: the assignment, or None below trace level "topk".
      logits: `[T, E]` float32 router logits, or None below trace level "full".
      stats: sum-form statistics, or None at trace level "off".
    """

    plan: RoutingPlan | None
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

    `outer(params, inner(params, rows))` with rows `[C, D]` gives `[C, D]`; both see one expert's slice of the
    parameters.
    A backend with its own VJP stores only `inner`'s output and recomputes the cheap rest, so cut behind the first
    matmul: then neither half repeats a matmul in the backward pass.

    `grouped(params, rows, matmul, spread)` is the same network for all experts at once, from the stacked parameters and
    rows `[N, D]` in expert order to `[N, D]`. It multiplies with `matmul(rows [N, D], weights [E, D, F])`, `[N, F]`;
    what is not a matrix, say a bias, it takes by `spread(values [E, ...])`, `[N, ...]`, the value of each row's expert.
    Backends made of grouped matmuls refuse an expert without it.
    """

    inner: Callable[[ArrayTree, Array], ArrayTree]
    outer: Callable[[ArrayTree, ArrayTree], Array]
    grouped: Callable[[ArrayTree, Array, Callable, Callable], Array] | None = None


# (tokens [T, D], plan, expert, stacked parameters with leading [E]) -> [T, D], in the dtype of tokens.
DispatchFn = Callable[[Array, RoutingPlan, Expert, ArrayTree], Array]
