"""Sinkhorn's balancing of a positive matrix (Sinkhorn & Knopp 1967; entropic optimal transport, Cuturi 1306.0895)."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def sinkhorn_potentials(
    logits: Array, is_open: Array | None = None, *, num_iterations: int = 100, tolerance: float = 1e-4
) -> Array:
    """The shifts v of the columns for which `exp(z_te + u_t + v_e)` is balanced.

    Every row with an open entry sums to 1, and every column with one to an equal share of these rows. Rows and columns
    are normalised in turn, in the log domain; where closed entries leave no such matrix, v after the last iteration is
    returned.

    Args:
      logits: `[T, E]` z, computed in float32, without gradient.
      is_open: `[T, E]` bool, false where the matrix is 0; None for nowhere.
      num_iterations: the most iterations.
      tolerance: stops when no v moved by more, that is when the columns' sums were right to this relative precision.

    Returns:
      `[E]` float32 v, 0 for columns without an open entry. The rows' shifts follow: `u_t = -logsumexp_e(z_te + v_e)`.
    """
    z = jax.lax.stop_gradient(logits.astype(jnp.float32))
    is_open = jnp.ones(z.shape, bool) if is_open is None else is_open
    is_column = is_open.any(0)
    log_share = jnp.log(is_open.any(1).sum() / jnp.maximum(is_column.sum(), 1))

    def is_running(state: tuple[Array, Array, Array]) -> Array:
        _, change, iteration = state
        return (change > tolerance) & (iteration < num_iterations)

    def normalize_both(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, _, iteration = state
        u = -jax.nn.logsumexp(z + v[None, :], axis=1, where=is_open)
        columns = jax.nn.logsumexp(z + u[:, None], axis=0, where=is_open)
        moved = jnp.where(is_column, log_share - columns, 0.0)
        return moved, jnp.abs(moved - v).max(), iteration + 1

    start = (jnp.zeros(z.shape[1]), jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(is_running, normalize_both, start)[0]
