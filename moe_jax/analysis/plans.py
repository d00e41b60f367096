"""Recorded plans as files: what a model routed, to be edited and forced on this or another model.

Record with `model(tokens, trace="topk")[1].plan`, edit with `dataclasses.replace`, replay with `model(tokens,
forced=plan, force="ids")`.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax.types import RoutingPlan


def save_plan(path: str | os.PathLike[str], plan: RoutingPlan) -> None:
    """Writes a plan as a compressed `.npz`, atomically: a reader sees the old file or the whole new one.

    Args:
      path: the file.
      plan: of any leading axes, `[..., T, K]`.

    Raises:
      ValueError: the plan is none: see `check_plan`.
    """
    check_plan(plan)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            expert_ids=np.asarray(plan.expert_ids, np.int32),
            gates=np.asarray(plan.gates, np.float32),
            num_experts=plan.num_experts,
            capacity=-1 if plan.capacity is None else plan.capacity,
        )
    partial.replace(path)


def load_plan(path: str | os.PathLike[str]) -> RoutingPlan:
    """Reads a plan that `save_plan` wrote.

    Raises:
      ValueError: the file is none, or holds no valid plan.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, gates = jnp.asarray(arrays["expert_ids"]), jnp.asarray(arrays["gates"])
            num_experts, capacity = int(arrays["num_experts"]), int(arrays["capacity"])
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no recorded plan: {error}") from None
    plan = RoutingPlan(ids, gates, num_experts, None if capacity < 0 else capacity)
    check_plan(plan)
    return plan


def check_plan(plan: RoutingPlan) -> None:
    """Refuses what dispatch would silently get wrong.

    Raises:
      ValueError: ids and gates of different shape, an id outside of `[0, E]`, an expert named twice by one token, or a
        gate in an empty slot.
    """
    ids, gates = np.asarray(plan.expert_ids), np.asarray(plan.gates)
    if ids.shape != gates.shape or ids.ndim < 2:
        raise ValueError(f"expert ids {ids.shape} and gates {gates.shape} must have the same shape [..., T, K]")
    if ids.min(initial=0) < 0 or ids.max(initial=0) > plan.num_experts:
        raise ValueError(f"expert ids must lie in [0, {plan.num_experts}], got {ids.min()} to {ids.max()}")
    ordered = np.sort(ids, axis=-1)
    is_repeat = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < plan.num_experts)
    if is_repeat.any():
        where = tuple(int(i) for i in np.argwhere(is_repeat)[0])
        raise ValueError(f"token {where[:-1]} names expert {ordered[..., 1:][where]} twice")
    if (gates[ids == plan.num_experts] != 0).any():
        raise ValueError("gates of empty slots must be 0")
