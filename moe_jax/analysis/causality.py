"""Does a router look where it must not? An audit by intervention: change the future, see whether the past moves.

A rule that compares tokens with each other (expert choice, 2202.09368; any capacity limit) lets a token's routing
depend on later tokens, which do not exist when a language model generates, or on other sequences of the batch, which
makes its output depend on its company. Neither shows in a training loss: the leak even lowers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from moe_jax.types import Array, ArrayTree


class Leak(NamedTuple):
    """What moved that should not have.

    Attributes:
      share: of the outputs that had to stay, the share that moved.
      largest: the largest change; infinite where a number became, or ceased to be, NaN.
    """

    share: float
    largest: float


class CausalityAudit(NamedTuple):
    """The verdict. Finding nothing is no proof: it says that these inputs and cuts showed no leak.

    Attributes:
      future: changes at or before a cut when only later positions were replaced.
      batch: changes in a sequence when only the other sequences were replaced.
    """

    future: Leak
    batch: Leak

    @property
    def is_causal(self) -> bool:
        """No position felt a later one."""
        return self.future.share == 0

    @property
    def is_independent(self) -> bool:
        """No sequence felt another one."""
        return self.batch.share == 0


def audit_causality(
    function: Callable[[Array], ArrayTree],
    inputs: ArrayLike,
    replacements: ArrayLike,
    *,
    cuts: Sequence[int] | None = None,
    tolerance: float = 1e-5,
) -> CausalityAudit:
    """Replaces parts of the input and compares what must not notice.

    Args:
      function: of `[B, S, ...]`, to a pytree of arrays with leading `[B, S]`: expert ids and gates of a router, or the
        logits of a whole model.
      inputs: `[B, S, ...]`.
      replacements: like `inputs`, other values; where they agree nothing is tested.
      cuts: positions t; what comes after t is replaced, in all sequences. None tries every t.
      tolerance: the largest difference that passes for rounding; integers and booleans must not move at all.

    Returns:
      The audit.

    Raises:
      ValueError: shapes differ, fewer than two positions or no sequence, or a cut outside of `[0, S - 2]`.
    """
    inputs, replacements = np.asarray(inputs), np.asarray(replacements)
    if inputs.shape != replacements.shape or inputs.ndim < 2 or inputs.shape[0] < 1 or inputs.shape[1] < 2:
        raise ValueError(
            f"inputs {inputs.shape} and replacements {replacements.shape} must both be [B, S, ...] with S of 2 or more"
        )
    num_sequences, length = inputs.shape[:2]
    cuts = range(length - 1) if cuts is None else cuts
    if outside := [cut for cut in cuts if not 0 <= cut <= length - 2]:
        raise ValueError(f"cuts must lie in [0, {length - 2}] for sequences of {length}, got {outside}")
    compiled = jax.jit(function)
    before = _leaves(compiled(inputs), inputs.shape[:2])

    future = []
    for cut in cuts:
        changed = inputs.copy()
        changed[:, cut + 1 :] = replacements[:, cut + 1 :]
        after = _leaves(compiled(changed), inputs.shape[:2])
        future += [_distance(a[:, : cut + 1], b[:, : cut + 1]) for a, b in zip(before, after, strict=True)]
    batch = []
    for sequence in range(num_sequences):
        changed = replacements.copy()
        changed[sequence] = inputs[sequence]
        after = _leaves(compiled(changed), inputs.shape[:2])
        batch += [_distance(a[sequence], b[sequence]) for a, b in zip(before, after, strict=True)]
    return CausalityAudit(_leak(future, tolerance), _leak(batch, tolerance))


def _leaves(outputs: ArrayTree, leading: tuple[int, ...]) -> list[np.ndarray]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    if wrong := [leaf.shape for leaf in leaves if leaf.shape[:2] != leading]:
        raise ValueError(f"the function must return arrays with leading {leading}, got {wrong}")
    return leaves


def _distance(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Elementwise change, flat; integers and booleans move by at least 1, a NaN on one side only is infinite."""
    before, after = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
    both_nan = np.isnan(before) & np.isnan(after)
    same = (before == after) | both_nan
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(np.abs(before - after), nan=np.inf))


def _leak(distances: list[np.ndarray], tolerance: float) -> Leak:
    together = np.concatenate(distances)
    return Leak(float(np.mean(together > tolerance)), float(together.max(initial=0.0)))
