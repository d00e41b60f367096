"""Held-out loss, sequence by sequence, so that intervals and paired comparisons can be taken over documents."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_jax.analysis import Interval, document_mean, paired_permutation_test, verdict, win_rate
from moe_jax.data import Sequences
from moe_jax.losses import cross_entropy
from moe_jax.training.mesh import batch_parts, replicated
from moe_jax.types import Array, Topology

LOG2 = float(np.log(2))  # nats per bit


def make_evaluator(
    graphdef: nnx.GraphDef, batch_size: int, mesh: Mesh | None = None
) -> Callable[[nnx.State, Sequences, Topology | None], tuple[np.ndarray, np.ndarray]]:
    """A function of `(state, sequences, topology)` with one compiled program for every number of sequences.

    Args:
      graphdef: structure of a decoder.
      batch_size: sequences per call of the program; the last call is filled up with masked rows.
      mesh: over which the model's state lies; the batch size is rounded up to what divides over it.

    Returns:
      A function that gives `nll [N]` (nats, summed over a sequence's scored targets) and `targets [N]` (their number).
      The topology (`keep [L, 1, E]`) may be None.
    """
    if mesh is not None:
        batch_size += -batch_size % batch_parts(mesh)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def nll_of(state: nnx.State, tokens: Array, mask: Array, is_scored: Array, topology: Topology | None) -> Array:
        logits, _ = nnx.merge(graphdef, state)(tokens[:, :-1], mask[:, :-1], topology, trace="off")
        return jnp.sum(cross_entropy(logits, tokens[:, 1:]) * is_scored, axis=1)

    def evaluate(
        state: nnx.State, sequences: Sequences, topology: Topology | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        fill = ((0, -len(sequences) % batch_size), (0, 0))
        arrays = [np.pad(x, fill) for x in (sequences.tokens.astype(np.int32), sequences.mask, sequences.is_scored)]
        nll = [
            np.asarray(nll_of(state, *(x[i : i + batch_size] for x in arrays), topology))
            for i in range(0, len(arrays[0]), batch_size)
        ]
        return np.concatenate(nll)[: len(sequences)], sequences.is_scored.sum(1)

    return evaluate


def bits_per_byte(sequences: Sequences, nll: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Sums per sequence, as the evaluator gives them, to bits per byte.

    Args:
      sequences: the text, one token a byte.
      nll: `[N]` nats.
      targets: `[N]` scored bytes.

    Returns:
      `all`, one entry per domain, and `interval`: the ends of a 95 % interval over documents.
    """
    rows: dict[str, Any] = {"all": float(nll.sum() / targets.sum() / LOG2)}
    for index, name in enumerate(sequences.domain_names):
        chosen = sequences.domain == index
        rows[name] = float(nll[chosen].sum() / targets[chosen].sum() / LOG2)
    rows["interval"] = list(document_interval(sequences, nll, targets)[1:])
    return rows


def document_interval(sequences: Sequences, nll: np.ndarray, targets: np.ndarray) -> Interval:
    """Mean bits per byte with an interval over documents; a sequence's sum is spread evenly over its bytes."""
    per_byte = np.repeat(nll / np.maximum(targets, 1) / LOG2, targets)
    return document_mean(per_byte, np.repeat(sequences.document, targets))


def compare_losses(sequences: Sequences, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Two sets of summed losses `[N]` of the same text, paired by document; lower is better.

    Returns:
      `difference` of ours from theirs in bits per byte, its 95 % `interval`, the `p_value` of a paired permutation
      test, our `win_rate` over documents, and the `verdict`.
    """
    interval = document_interval(sequences, ours - theirs, targets)
    size = np.bincount(sequences.document, targets)
    mine, other = (np.bincount(sequences.document, nll)[size > 0] / size[size > 0] for nll in (ours, theirs))
    return {
        "difference": interval.estimate,
        "interval": [interval.low, interval.high],
        "p_value": paired_permutation_test(mine - other),
        "win_rate": win_rate(mine, other),
        "verdict": verdict(interval),
    }
