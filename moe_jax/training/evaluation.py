"""Held-out loss, sequence by sequence, so that intervals can be taken over documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.losses import cross_entropy
from moe_jax.types import Array, Topology


def make_evaluator(
    graphdef: nnx.GraphDef, batch_size: int
) -> Callable[[nnx.State, np.ndarray, np.ndarray, Topology | None], tuple[np.ndarray, np.ndarray]]:
    """A function of `(state, tokens [N, S+1], mask [N, S+1], topology)` with one compiled program for every N.

    Args:
      graphdef: structure of a decoder.
      batch_size: sequences per call of the program; the last call is filled up with masked rows.

    Returns:
      A function that gives `nll [N]` (nats, summed over a sequence's targets) and `targets [N]` (their number).
      The topology (`keep [L, 1, E]`) may be None.
    """

    @jax.jit
    def nll_of(state: nnx.State, tokens: Array, mask: Array, topology: Topology | None) -> tuple[Array, Array]:
        logits, _ = nnx.merge(graphdef, state)(tokens[:, :-1], mask[:, :-1], topology, trace="off")
        is_target = mask[:, :-1] & mask[:, 1:]
        return jnp.sum(cross_entropy(logits, tokens[:, 1:]) * is_target, axis=1), is_target.sum(1)

    def evaluate(
        state: nnx.State, tokens: np.ndarray, mask: np.ndarray, topology: Topology | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        count = len(tokens)
        rows = -(-count // batch_size) * batch_size
        padded = np.zeros((rows, tokens.shape[1]), np.int32), np.zeros((rows, tokens.shape[1]), bool)
        padded[0][:count], padded[1][:count] = tokens, mask
        parts = [
            nll_of(state, padded[0][i : i + batch_size], padded[1][i : i + batch_size], topology)
            for i in range(0, rows, batch_size)
        ]
        nll, targets = (np.concatenate([np.asarray(part[side]) for part in parts])[:count] for side in (0, 1))
        return nll, targets

    return evaluate
