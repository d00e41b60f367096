"""The mixture-of-experts layer: a router, a rule, a dispatch backend, a stack of experts, and what may join them.

    y = (sum_e g_e(x) f_e(x A)) B + sum_z g_z(x) c_z(x) + s(x)

with f_e the experts, A and B the projections of latent experts (absent: identity), c_z zero-compute experts, which the
router scores beside the others, and s the shared experts, which take every token.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch import get_backend
from moe_jax.nn.attention_experts import AttentionExperts
from moe_jax.nn.expert_stack import ExpertStack, Setting
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent import Latent
from moe_jax.nn.routers import Router
from moe_jax.nn.separate_experts import SeparateExperts
from moe_jax.nn.zero_compute import ZeroComputeExperts, without_zero_compute
from moe_jax.routing import Balancer, Capacity, Force, Rule, check_rule, get_rule, route, rule_settings
from moe_jax.types import Array, DispatchFn, RouterOutput, RouterStats, RoutingPlan, Topology

StatsLevel = Literal["batch", "sequence", "token"]


class Balance(nnx.Variable):
    """State of a balance rule: carried by the model, updated once per optimizer step, never trained."""


class MoELayer(nnx.Module):
    """Sends each token to some of E experts and sums their gated outputs. Owns parameters; functions do the maths."""

    def __init__(
        self,
        router: Router,
        experts: ExpertStack | AttentionExperts | SeparateExperts,
        *,
        shared: FeedForward | None = None,
        latent: Latent | None = None,
        zero_compute: ZeroComputeExperts | None = None,
        num_choices: int,
        rule: str = "softmax_top_k_renormalized",
        rule_settings: Mapping[str, Setting] | None = None,
        backend: str | DispatchFn = "blocked",
        capacity_factor: float | None = None,
        capacity: Capacity | None = None,
        gates_on_input: bool = False,
        stats_level: StatsLevel = "batch",
        bias_bins: int = 0,
    ):
        """Joins the parts; every name is an entry of its table and checked here.

        Args:
          router: gives `[B, S, E]` logits; see `nn.routers`. E counts zero-compute experts too, here and in plans and
            statistics.
          experts: the stacked experts, of width d if they are latent.
          shared: what every token passes besides; masked tokens get zeros from it too.
          latent: projects tokens before and outputs after the dispatch.
          zero_compute: the experts that are the router's last columns. A capacity counts them like the others.
          num_choices: K.
          rule: a name in `routing.RULES`.
          rule_settings: settings of the rule.
          backend: a name in `dispatch.BACKENDS`, or a hashable function such as an `ExpertParallel`.
          capacity_factor: rows per expert relative to perfect balance, or None to drop nothing.
          capacity: the same in any unit, over the batch or each sequence.
          gates_on_input: whether a gate multiplies what enters an expert, as in Llama 4, and not what leaves it.
          stats_level: what statistics are summed over; below "batch" they have a leading axis of sequences or tokens.
          bias_bins: bins of the statistics' histogram for the balancer "quantile", or 0; see `routing.route`.
        """
        self.router, self.experts = router, experts
        self.shared, self.latent, self.zero_compute = shared, latent, zero_compute
        if capacity_factor is not None:
            if capacity is not None:
                raise ValueError(f"give capacity_factor={capacity_factor} or capacity={capacity}, not both")
            capacity = Capacity(capacity_factor)
        self.num_choices, self.capacity, self.gates_on_input = num_choices, capacity, gates_on_input
        self.rule, self.rule_settings = rule, tuple(sorted((rule_settings or {}).items()))
        if isinstance(backend, str):
            get_backend(backend)  # an unknown name fails here, not in the first step
        if backend == "grouped" and isinstance(experts, ExpertStack) and experts.expert.grouped is None:
            raise ValueError(
                f"expert kind {experts.kind!r} does not name its matmuls (Expert.grouped), which backend='grouped' "
                "needs; take backend='blocked'"
            )
        self.backend, self.stats_level, self.bias_bins = backend, stats_level, bias_bins
        num_experts = self.num_experts
        check_rule(self.routing_rule, num_choices, num_experts, rule, bias_bins=bias_bins)
        _check_null_experts(self.routing_rule, zero_compute, rule)
        controller = self.routing_rule.controller
        self.bias = Balance(jnp.zeros(num_experts))
        self.level = Balance(jnp.float32(0 if controller is None else controller.start))
        self.integral = Balance(jnp.float32(0))

    @property
    def num_experts(self) -> int:
        """E, zero-compute experts included."""
        return self.experts.num_experts + (0 if self.zero_compute is None else self.zero_compute.num_experts)

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
        num_tokens, num_experts = num_sequences * length, self.num_experts
        router_key, rule_key = (None, None) if key is None else jax.random.split(key)
        scored = self.router(x, token_mask, router_key)
        capacity, capacity_groups = None, 1
        if self.capacity is not None:
            capacity_groups = num_sequences if self.capacity.per_sequence else 1
            capacity = self.capacity.rows(num_tokens // capacity_groups, num_experts, self.num_choices)

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
            capacity_groups=capacity_groups,
            forced=forced,
            force=force,
            stats_groups={"batch": None, "sequence": num_sequences, "token": num_tokens}[self.stats_level],
            bias_bins=self.bias_bins,
        )
        assert isinstance(output.plan, RoutingPlan)  # route always makes one; only keep_trace drops it
        return self._mix(x, output.plan, token_mask), output

    def _mix(self, x: Array, plan: RoutingPlan, token_mask: Array | None) -> Array:
        """Sums what routed, zero-compute and shared experts give for `[B, S, D]`."""
        dispatched = plan if self.zero_compute is None else without_zero_compute(plan, self.experts.num_experts)
        rows = x if self.latent is None else self.latent.enter(x)
        dispatch = get_backend(self.backend) if isinstance(self.backend, str) else self.backend
        if self.gates_on_input:
            y = _mix_weighed(self.experts, rows, dispatched, dispatch, token_mask)
        else:
            y = self.experts.mix(rows, dispatched, dispatch, token_mask)
        if self.latent is not None:
            y = self.latent.leave(y)
        if self.zero_compute is not None:
            y += self.zero_compute(x, plan)
        if self.shared is not None:
            always = self.shared(x)
            y += always if token_mask is None else jnp.where(token_mask[:, :, None], always, 0)
        return y

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


def _mix_weighed(
    experts: ExpertStack | AttentionExperts | SeparateExperts,
    x: Array,
    plan: RoutingPlan,
    dispatch: DispatchFn,
    token_mask: Array | None,
) -> Array:
    """Sums `f_e(g_e x)`, one slot of the plan at a time, since each slot weighs the token differently."""
    y = jnp.zeros_like(x)
    for slot in range(plan.expert_ids.shape[1]):
        ids, gates = plan.expert_ids[:, slot : slot + 1], plan.gates[:, slot : slot + 1]
        ones = (ids < plan.num_experts).astype(gates.dtype)
        weighed = x * gates.reshape(*x.shape[:2], 1).astype(x.dtype)
        y += experts.mix(weighed, RoutingPlan(ids, ones, plan.num_experts, plan.capacity), dispatch, token_mask)
    return y


def _check_null_experts(rule: Rule, zero_compute: ZeroComputeExperts | None, name: str) -> None:
    """Refuses zero-compute experts that a rule with null experts of its own would never let speak."""
    num_null = rule_settings(rule).get("num_null", 0)
    kinds = () if zero_compute is None else zero_compute.kinds
    if set(kinds[::-1][:num_null]) - {"zero"}:
        raise ValueError(f"rule {name!r} ignores the last {num_null} columns, so these of {kinds} must be 'zero'")
