"""How a model's program runs, as opposed to what it computes: on which devices, and what it keeps for the gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch import get_backend
from moe_jax.dispatch.expert_parallel import RECEIVED, RETURNED, ExpertParallel
from moe_jax.types import Array, DispatchFn

Remat = Literal["none", "layer", "dispatch", "dots"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Given to a model when it is built; hashable, as a part of its structure, and without effect on its parameters.

    Attributes:
      mesh: devices along the axes "data", "expert" and "tensor"; None for one device. Tokens are split over the first
        two, and travel to their experts by `ExpertParallel`.
      remat: what of a layer the backward pass does not compute once more. "none" recomputes nothing. "layer" keeps a
        layer's input alone. "dispatch" keeps besides what other devices sent, so that tokens do not travel again; on
        one device it is "layer". "dots" keeps the results of matrix products with weights, routed experts excepted.
    """

    mesh: Mesh | None = None
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Refuses an unknown policy."""
        if self.remat not in get_args(Remat):
            raise ValueError(f"unknown remat {self.remat!r}; known: {', '.join(get_args(Remat))}")

    def dispatch(self, backend: str) -> str | DispatchFn:
        """The backend of that name, or what runs it on every device of the mesh."""
        if self.mesh is None:
            return backend
        tensor_axis = "tensor" if self.mesh.shape["tensor"] > 1 else None
        return ExpertParallel(self.mesh, backend=get_backend(backend), tensor_axis=tensor_axis)

    def split_batch(self, x: Array) -> Array:
        """Keeps `[B, ...]` split over the batch, so that XLA gathers a layer's weights and not the tokens."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(("data", "expert"))))

    def rematerialize(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the body of a scan over layers."""
        if self.remat == "none":
            return layer
        policies = jax.checkpoint_policies
        policy = {
            "layer": policies.nothing_saveable,
            "dispatch": policies.save_only_these_names(RECEIVED, RETURNED),
            "dots": policies.dots_with_no_batch_dims_saveable,
        }[self.remat]
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


ONE_DEVICE = Execution()
