"""Dominance, non-dominated ranks, crowding distance and hypervolume; all objectives are minimised.

`a` dominates `b` if it is no worse in every objective and better in one. Ranks and crowding follow NSGA-II (Deb et
al. 2002, IEEE TEC 6(2), section III) and run inside a jitted search; the filter and the hypervolume run on the host,
on fronts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array


def non_dominated_ranks(objectives: Array, is_eligible: Array) -> Array:
    """Front number of each point, 0 for the non-dominated ones, by peeling one front at a time.

    Args:
      objectives: `[P, M]` float32.
      is_eligible: `[P]` bool; other points dominate nobody and get rank P, behind every front.

    Returns:
      `[P]` int32.
    """
    num_points = objectives.shape[0]
    no_worse = jnp.all(objectives[:, None, :] <= objectives[None, :, :], axis=2)
    better = jnp.any(objectives[:, None, :] < objectives[None, :, :], axis=2)
    dominates = no_worse & better & is_eligible[:, None]

    def peel(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        front, ranks, is_left = carry
        is_front = is_left & ~jnp.any(dominates & is_left[:, None], axis=0)
        return front + 1, jnp.where(is_front, front, ranks), is_left & ~is_front

    start = (jnp.int32(0), jnp.full(num_points, num_points, jnp.int32), is_eligible)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), peel, start)[1]


def crowding_distance(objectives: Array, ranks: Array) -> Array:
    """Crowding distance of each point within its own front.

    The sum over objectives of the gap between the two neighbours, over the front's extent in that objective (0 where
    the extent is 0). The ends of a front get +inf.

    Args:
      objectives: `[P, M]` float32, finite where `ranks < P`.
      ranks: `[P]` int32; points of rank P (not eligible) get distance 0.

    Returns:
      `[P]` float32, non-negative.
    """
    num_points = objectives.shape[0]
    is_eligible = ranks < num_points

    def along_one(values: Array) -> Array:
        order = jnp.lexsort((values, ranks))
        value, rank = values[order], ranks[order]
        is_first = jnp.concatenate([jnp.ones(1, bool), rank[1:] != rank[:-1]])
        is_last = jnp.concatenate([rank[1:] != rank[:-1], jnp.ones(1, bool)])
        gap = jnp.roll(value, -1) - jnp.roll(value, 1)
        extent = jax.ops.segment_max(value, rank, num_points + 1) - jax.ops.segment_min(value, rank, num_points + 1)
        share = jnp.where(extent[rank] > 0, gap / jnp.where(extent[rank] > 0, extent[rank], 1.0), 0.0)
        return jnp.zeros(num_points).at[order].set(jnp.where(is_first | is_last, jnp.inf, share))

    distances = jax.vmap(along_one, in_axes=1)(jnp.where(is_eligible[:, None], objectives, 0.0))
    return jnp.where(is_eligible, jnp.sum(distances, axis=0), 0.0)


def is_non_dominated(objectives: np.ndarray) -> np.ndarray:
    """`[P]` bool: which of `[P, M]` points no other point dominates; equal points stand or fall together."""
    objectives = np.asarray(objectives)
    no_worse = np.all(objectives[:, None] <= objectives[None], axis=2)
    better = np.any(objectives[:, None] < objectives[None], axis=2)
    return ~np.any(no_worse & better, axis=0)


def hypervolume(objectives: np.ndarray, reference: np.ndarray) -> float:
    """Volume that a set of points dominates, bounded by a reference point; exact, for 2 or 3 objectives.

    Args:
      objectives: `[P, M]` points, dominated ones allowed. A point that is not strictly better than the reference in
        every objective (or is NaN) bounds no volume and is ignored.
      reference: `[M]` the worst corner; fix it once for everything that is compared.

    Returns:
      The volume in float64; 0 without a point inside.

    Raises:
      ValueError: M is neither 2 nor 3, or the shapes disagree.
    """
    points, reference = np.asarray(objectives, np.float64), np.asarray(reference, np.float64)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or reference.shape != (points.shape[1],):
        raise ValueError(f"need points [P, 2] or [P, 3] and a reference [M], got {points.shape} and {reference.shape}")
    points = points[np.all(points < reference, axis=1)]
    if points.shape[1] == 2:
        return _dominated_area(points, reference)
    # Sweep the last objective: between two neighbouring heights the cut is the area of the points below.
    points = points[np.argsort(points[:, 2], kind="stable")]
    heights = np.append(points[:, 2], reference[2])
    areas = np.array([_dominated_area(points[: i + 1, :2], reference[:2]) for i in range(len(points))])
    return float(np.sum(areas * np.diff(heights)))


def _dominated_area(points: np.ndarray, reference: np.ndarray) -> float:
    """The two-dimensional case, as a staircase from left to right; all points lie inside the reference."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    ceilings = np.minimum.accumulate(np.append(reference[1], points[:, 1]))
    widths = reference[0] - points[:, 0]
    return float(np.sum(widths * (ceilings[:-1] - ceilings[1:])))
