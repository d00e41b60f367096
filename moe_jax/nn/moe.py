"""The mixture-of-experts layer: a router, a rule, a dispatch backend, a stack of experts."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch import get_backend
from moe_jax.nn.experts import SwiGLUExperts
from moe_jax.nn.router import Balance, LinearRouter
from moe_jax.routing import Balancer, Force, Rule, check_rule, expert_capacity, get_rule, route
from moe_jax.types import Array, RouterOutput, RouterStats, RoutingPlan, Topology

StatsLevel = Literal["batch", "sequence", "token"]
Setting = bool | int | float | str


class MoELayer(nnx.Module):
    """Sends each token to some of E experts and sums their gated outputs. Owns parameters; functions do the maths."""

    def __init__(
        self,
        router: LinearRouter,
        experts: SwiGLUExperts,
        *,
        num_choices: int,
        rule: str = "softmax_top_k_renormalized",
        rule_settings: Mapping[str, Setting] | None = None,
        backend: str = "blocked",
        capacity_factor: float | None = None,
        stats_level: StatsLevel = "batch",
        bias_bins: int = 0,
    ):
        """Joins the parts; every name is an entry of its table and checked here.

        Args:
          router: gives `[B, S, E]` logits.
          experts: the stacked experts.
          num_choices: K.
          rule: a name in `routing.RULES`.
          rule_settings: settings of the rule.
          backend: a name in `dispatch.BACKENDS`.
          capacity_factor: rows per expert relative to perfect balance, or None to drop nothing.
          stats_level: what statistics are summed over; below "batch" they have a leading axis of sequences or tokens.
          bias_bins: bins of the statistics' histogram for the balancer "quantile", or 0; see `routing.route`.
        """
        self.router, self.experts = router, experts
        self.num_choices, self.capacity_factor = num_choices, capacity_factor
        self.rule, self.rule_settings = rule, tuple(sorted((rule_settings or {}).items()))
        get_backend(backend)  # an unknown name fails here, not in the first step
        self.backend, self.stats_level, self.bias_bins = backend, stats_level, bias_bins
        num_experts = experts.num_experts
        check_rule(self.routing_rule, num_choices, num_experts, rule, bias_bins=bias_bins)
        controller = self.routing_rule.controller
        self.bias = Balance(jnp.zeros(num_experts))
        self.level = Balance(jnp.float32(0 if controller is None else controller.start))
        self.integral = Balance(jnp.float32(0))

    @property
    def routing_rule(self) -> Rule:
        """The rule with its settings."""
        return get_rule(self.rule, **dict(self.rule_settings))

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
        """Routes, dispatches, combines.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; masked tokens get zeros and leave no trace in the statistics.
          topology: this layer's topology (`keep [G, E]`, `num_choices [G]`), or None.
          token_groups: `[B, S]` int32 group of each token, or None for one group.
          token_ids: `[B, S]` int32 vocabulary ids, for rules that need them.
          key: for what is random in training; None means evaluation.
          forced: a plan `[T, K]` that decides instead of the rule.
          force: what of it holds; see `routing.route`.

        Returns:
          `[B, S, D]` and what the router did, over `T = B*S` tokens.
        """
        num_sequences, length = x.shape[:2]
        num_tokens, num_experts = num_sequences * length, self.experts.num_experts
        router_key, rule_key = (None, None) if key is None else jax.random.split(key)
        scored = self.router(x, token_mask, router_key)
        capacity = None
        if self.capacity_factor is not None:
            capacity = expert_capacity(num_tokens, num_experts, self.num_choices, self.capacity_factor)

        def flat(array: Array | None) -> Array | None:  # (B, S, ...) -> (T, ...)
            return None if array is None else array.reshape(num_tokens, *array.shape[2:])

        output = route(
            scored.logits.reshape(num_tokens, num_experts),
            self.routing_rule,
            num_choices=self.num_choices,
            bias=self.bias[...],
            level=self.level[...],
            noise_scale=flat(scored.noise_scale),
            topology=topology,
            token_groups=flat(token_groups),
            token_mask=flat(token_mask),
            token_ids=flat(token_ids),
            num_sequences=num_sequences,
            key=rule_key,
            capacity=capacity,
            forced=forced,
            force=force,
            stats_groups={"batch": None, "sequence": num_sequences, "token": num_tokens}[self.stats_level],
            bias_bins=self.bias_bins,
        )
        assert output.plan is not None  # route always makes one; only keep_trace drops it
        dispatch = get_backend(self.backend)
        params = self.experts.parameters(x.dtype)
        mixed = dispatch(x.reshape(num_tokens, -1), output.plan, self.experts.expert, params)
        return mixed.reshape(x.shape), output

    def next_balance(self, stats: RouterStats, total: RouterStats, balancer: Balancer) -> dict[str, Array]:
        """The balance state after an optimizer step, by the names of its variables.

        Args:
          stats: sums over the whole optimizer step, without leading axes.
          total: the same, summed over the layers of the model.
          balancer: moves the selection bias; see `routing.BALANCERS`.
        """
        level, integral = self.level[...], self.integral[...]
        if (controller := self.routing_rule.controller) is not None:
            seen = total if controller.over_layers else stats
            level, integral = controller.update(level, integral, seen, self.num_choices)
        return {"bias": balancer(self.bias[...], stats), "level": level, "integral": integral}

    def penalty(self, stats: RouterStats) -> Array:
        """The loss `[]` that the rule itself asks for; 0 for most."""
        controller = self.routing_rule.controller
        if controller is None or controller.penalty is None:
            return jnp.float32(0)
        return controller.penalty(self.level[...], stats, self.num_choices)
