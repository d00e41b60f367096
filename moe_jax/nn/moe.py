"""The mixture-of-experts layer: a router, a rule, a dispatch backend, a stack of experts."""

from flax import nnx

from moe_jax.dispatch import get_backend
from moe_jax.nn.experts import SwiGLUExperts
from moe_jax.nn.router import LinearRouter
from moe_jax.routing import expert_capacity, get_rule, route
from moe_jax.types import Array, RouterOutput, Topology


class MoELayer(nnx.Module):
    """Sends each token to K of E experts and sums their gated outputs. Owns parameters; the maths is in functions."""

    def __init__(
        self,
        router: LinearRouter,
        experts: SwiGLUExperts,
        *,
        num_choices: int,
        rule: str = "softmax_top_k_renormalized",
        backend: str = "blocked",
        capacity_factor: float | None = None,
    ):
        """Joins the parts; every name is an entry of its table and checked here.

        Args:
          router: gives `[T, E]` logits.
          experts: the stacked experts.
          num_choices: K.
          rule: a name in `routing.RULES`.
          backend: a name in `dispatch.BACKENDS`.
          capacity_factor: rows per expert relative to perfect balance, or None to drop nothing.
        """
        self.router, self.experts = router, experts
        self.num_choices, self.capacity_factor = num_choices, capacity_factor
        get_rule(rule), get_backend(backend)  # an unknown name fails here, not in the first step
        self.rule, self.backend = rule, backend

    def __call__(
        self,
        x: Array,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
    ) -> tuple[Array, RouterOutput]:
        """Routes, dispatches, combines.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; masked tokens get zeros and leave no trace in the statistics.
          topology: this layer's topology (`keep [G, E]`, `num_choices [G]`), or None.
          token_groups: `[B, S]` int32 group of each token, or None for one group.

        Returns:
          `[B, S, D]` and what the router did, over `T = B*S` tokens.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (B, S, D) -> (T, D)
        logits = self.router(tokens)
        num_tokens, num_experts = logits.shape
        capacity = None
        if self.capacity_factor is not None:
            capacity = expert_capacity(num_tokens, num_experts, self.num_choices, self.capacity_factor)
        output = route(
            logits,
            get_rule(self.rule),
            num_choices=self.num_choices,
            bias=self.router.bias[...],
            topology=topology,
            token_groups=None if token_groups is None else token_groups.reshape(-1),
            token_mask=None if token_mask is None else token_mask.reshape(-1),
            capacity=capacity,
        )
        assert output.plan is not None  # route always makes one; only keep_trace drops it
        dispatch = get_backend(self.backend)
        mixed = dispatch(tokens, output.plan, self.experts.expert, self.experts.parameters(x.dtype))
        return mixed.reshape(x.shape), output
