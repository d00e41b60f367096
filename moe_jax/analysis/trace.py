"""Recorded routing: what each token asked for, as arrays that live in one `.npz` file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.analysis.confidence import boundary_margin, router_entropy, top_probability
from moe_jax.types import RouterOutput, RoutingPlan

_BY_LAYER = ("expert_ids", "gates", "entropy", "margin", "top_probability")  # [L, T, ...]
_BY_TOKEN = ("token_ids", "token_mask", "position", "domain", "document")  # [T]


@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """Routing of T tokens through L MoE layers, NumPy arrays.

    Attributes:
      expert_ids: `[L, T, K]` int16 in `[0, E]`; `E` marks an empty slot.
      gates: `[L, T, K]` float32 combine weights.
      entropy: `[L, T]` float32 nats.
      margin: `[L, T]` float32 boundary margin in logit units; inf if K = E.
      top_probability: `[L, T]` float32.
      token_ids: `[T]` int32 input tokens (bytes).
      token_mask: `[T]` bool; False is padding.
      position: `[T]` int32 position in the sequence.
      domain: `[T]` int32 index into `domain_names`.
      document: `[T]` int32.
      num_experts: E.
      domain_names: names of the domains.
    """

    expert_ids: np.ndarray
    gates: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray
    top_probability: np.ndarray
    token_ids: np.ndarray
    token_mask: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    document: np.ndarray
    num_experts: int
    domain_names: tuple[str, ...]


def trace_routing(
    output: RouterOutput,
    *,
    token_ids: ArrayLike,
    token_mask: ArrayLike,
    position: ArrayLike,
    domain: ArrayLike,
    document: ArrayLike,
    domain_names: Sequence[str],
) -> RoutingTrace:
    """Keeps of a model's full trace what the statistics need.

    Args:
      output: router output with leading `[L]` at trace level "full" (plan and logits present).
      token_ids: `[T]` input tokens; this and the following in the order of the output's tokens.
      token_mask: `[T]` bool.
      position: `[T]` position in the sequence.
      domain: `[T]` index into `domain_names`.
      document: `[T]` document index.
      domain_names: names of the domains.

    Returns:
      The trace.

    Raises:
      ValueError: the output carries no plan or no logits, or is of Soft MoE, which names no experts.
    """
    if not isinstance(output.plan, RoutingPlan) or output.logits is None:
        raise ValueError('a routing trace needs plan and logits: run the model at trace level "full"')
    num_choices = output.plan.expert_ids.shape[-1]
    return RoutingTrace(
        expert_ids=np.asarray(output.plan.expert_ids, np.int16),
        gates=np.asarray(output.plan.gates, np.float32),
        entropy=np.asarray(router_entropy(output.logits)),
        margin=np.asarray(boundary_margin(output.logits, num_choices)),
        top_probability=np.asarray(top_probability(output.logits)),
        token_ids=np.asarray(token_ids, np.int32).ravel(),
        token_mask=np.asarray(token_mask, bool).ravel(),
        position=np.asarray(position, np.int32).ravel(),
        domain=np.asarray(domain, np.int32).ravel(),
        document=np.asarray(document, np.int32).ravel(),
        num_experts=output.plan.num_experts,
        domain_names=tuple(domain_names),
    )


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Joins traces of several batches along their tokens; experts, layers and domain names must agree."""
    first = traces[0]
    if any((t.num_experts, t.domain_names) != (first.num_experts, first.domain_names) for t in traces):
        raise ValueError("traces to join differ in num_experts or domain_names")
    joined: dict[str, Any] = {name: np.concatenate([getattr(t, name) for t in traces], axis=1) for name in _BY_LAYER}
    joined |= {name: np.concatenate([getattr(t, name) for t in traces]) for name in _BY_TOKEN}
    return dataclasses.replace(first, **joined)


def without_masked_tokens(trace: RoutingTrace) -> RoutingTrace:
    """Keeps only the tokens whose `token_mask` is True."""
    keep = trace.token_mask
    kept: dict[str, Any] = {name: getattr(trace, name)[:, keep] for name in _BY_LAYER}
    kept |= {name: getattr(trace, name)[keep] for name in _BY_TOKEN}
    return dataclasses.replace(trace, **kept)


def save_trace(path: str | os.PathLike[str], trace: RoutingTrace) -> None:
    """Writes the trace as a compressed `.npz`, atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **dataclasses.asdict(trace))
    partial.replace(path)


def load_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Reads a trace that `save_trace` wrote.

    Raises:
      ValueError: fields are missing; the message names them.
    """
    with np.load(path, allow_pickle=False) as arrays:
        fields = [field.name for field in dataclasses.fields(RoutingTrace)]
        if missing := [name for name in fields if name not in arrays]:
            raise ValueError(f"{path} is no routing trace: it lacks {', '.join(missing)}")
        values = {name: arrays[name] for name in fields}
    return RoutingTrace(
        **values
        | {"num_experts": int(values["num_experts"]), "domain_names": tuple(str(n) for n in values["domain_names"])}
    )
