"""The Soft MoE layer (Puigcerver et al. 2308.00951): experts that work on mixtures of a sequence's tokens.

It has D E C + 1 parameters beside its experts', for C slots per expert, and does E C rows of expert work a sequence,
however long the sequence. For a given number of slots the paper does best with one per expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch.soft import dispatch_soft
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import StatsLevel
from moe_jax.nn.routers.router import draw_kernel
from moe_jax.ops.norms import l2_normalize
from moe_jax.routing import Force
from moe_jax.routing.rule import check_settings, settings_of
from moe_jax.routing.soft import route_soft
from moe_jax.types import Array, RouterOutput, RoutingPlan, SoftPlan, Topology


class SoftRouter(nnx.Module):
    """Logits of tokens and slots, `scale * cos(x, phi)`: 2 D E C FLOPs a token.

    Without unit length, logits grow with the width and the softmaxes become one-hot (section 2.3).
    """

    def __init__(self, width: int, num_experts: int, *, slots_per_expert: int = 1, normalize: bool = True, key: Array):
        """Draws `phi [D, E C]` from N(0, 1/D), the slots of an expert side by side; `scale []` starts at 1.

        Args:
          width: D.
          num_experts: E.
          slots_per_expert: C.
          normalize: whether tokens and slots are brought to unit length; if not, logits are `x phi`, without a scale.
          key: consumed.

        Raises:
          ValueError: less than one slot.
        """
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts = num_experts
        self.phi = nnx.Param(draw_kernel(key, width, num_experts * slots_per_expert))
        self.scale = nnx.Param(jnp.float32(1)) if normalize else None

    def __call__(self, x: Array) -> Array:
        """`[B, S, D]` to `[B, S, E, C]` float32."""
        x, phi = x.astype(jnp.float32), self.phi[...]
        if self.scale is not None:
            x, phi = l2_normalize(x), self.scale[...] * l2_normalize(phi, axis=0)
        return (x @ phi).reshape(*x.shape[:2], self.num_experts, -1)


def get_soft_router(**settings: Any) -> Callable[..., SoftRouter]:
    """The router with its settings, as `nn.routers.get_router`; ValueError with the known ones for an unknown one."""
    check_settings(settings, settings_of(SoftRouter.__init__).keys() - {"key"}, "rule 'soft'")
    return partial(SoftRouter, **settings)


class SoftMoELayer(nnx.Module):
    """Mixes the tokens of each sequence into slots, and the experts' outputs on these back into tokens."""

    def __init__(self, router: SoftRouter, experts: ExpertStack, *, stats_level: StatsLevel = "batch"):
        """Joins the parts.

        Args:
          router: gives `[B, S, E, C]` logits.
          experts: the stacked experts.
          stats_level: as in `MoELayer`.
        """
        self.router, self.experts, self.stats_level = router, experts, stats_level

    def __call__(
        self,
        x: Array,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        *,
        token_ids: Array | None = None,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
    ) -> tuple[Array, RouterOutput]:
        """Called like `MoELayer`; ids and key have no effect, and the topology's number of choices has none.

        Returns:
          `[B, S, D]` and what the router did, with a `SoftPlan`; see `routing.soft`.

        Raises:
          ValueError: a plan to be forced, since there are no choices.
        """
        del token_ids, key, force
        if forced is not None:
            raise ValueError("Soft MoE chooses no experts, so no plan can be forced on it")
        num_sequences, length = x.shape[:2]
        num_tokens = num_sequences * length
        output = route_soft(
            self.router(x).reshape(num_tokens, self.experts.num_experts, -1),
            topology=topology,
            token_groups=None if token_groups is None else token_groups.reshape(num_tokens),
            token_mask=None if token_mask is None else token_mask.reshape(num_tokens),
            num_sequences=num_sequences,
            stats_groups={"batch": None, "sequence": num_sequences, "token": num_tokens}[self.stats_level],
        )
        assert isinstance(output.plan, SoftPlan)  # route_soft always makes one; only keep_trace drops it
        params = self.experts.parameters(x.dtype)
        mixed = dispatch_soft(x.reshape(num_tokens, -1), output.plan, self.experts.expert, params)
        return mixed.reshape(x.shape), output
