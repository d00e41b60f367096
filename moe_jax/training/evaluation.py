"""Held-out loss, sequence by sequence, so that intervals can be taken over documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.data import Sequences
from moe_jax.losses import cross_entropy
from moe_jax.types import Array, Topology


def make_evaluator(
    graphdef: nnx.GraphDef, batch_size: int
) -> Callable[[nnx.State, Sequences, Topology | None], tuple[np.ndarray, np.ndarray]]:
    """A function of `(state, sequences, topology)` with one compiled program for every number of sequences.

    Args:
      graphdef: structure of a decoder.
      batch_size: sequences per call of the program; the last call is filled up with masked rows.

    Returns:
      A function that gives `nll [N]` (nats, summed over a sequence's scored targets) and `targets [N]` (their number).
      The topology (`keep [L, 1, E]`) may be None.
    """

    @jax.jit
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
