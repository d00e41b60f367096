"""Dispatch backends: run each token through the experts its plan names. One signature (`types.DispatchFn`), one table.

All backends give the same output and gradients for the same plan; they differ in speed and memory:

    dense    every expert on every token; the oracle, and good for tiny E
    einsum   one-hot tensors and matmuls only; `[T, E, C]` memory
    gather   capacity buffers by index; work grows with the capacity, or with E when there is none
    blocked  dropless and exact in work: loops over the filled blocks; the fast path on CPU
    grouped  dropless: grouped matmuls over rows in expert order, for GPU and TPU; experts must offer `grouped`
    switched one slot at a time, by a branch for each expert: for the few tokens of a decoding step on CPU

`expert_parallel.ExpertParallel` runs any of them over a mesh of devices; it needs the mesh, so it is not in the table.
`soft.dispatch_soft` runs Soft MoE's plan, which names no experts.

Gates apply in float32. An empty slot (expert id E) gives nothing and gets no gradient.
"""

from __future__ import annotations

from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.dense import dispatch_dense
from moe_jax.dispatch.einsum import dispatch_einsum
from moe_jax.dispatch.gather import dispatch_gather
from moe_jax.dispatch.grouped import dispatch_grouped
from moe_jax.dispatch.switched import dispatch_switched
from moe_jax.types import DispatchFn


def get_backend(name: str) -> DispatchFn:
    """Looks a backend up by name.

    Args:
      name: a key of `BACKENDS`.

    Returns:
      The dispatch function.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown dispatch backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


BACKENDS: dict[str, DispatchFn] = {
    "dense": dispatch_dense,
    "einsum": dispatch_einsum,
    "gather": dispatch_gather,
    "blocked": dispatch_blocked,
    "grouped": dispatch_grouped,
    "switched": dispatch_switched,
}
