"""Attention heads as experts (mixture of attention heads, MoA 2210.05144; with several heads each, JetMoE 2404.07413).

An expert owns a query and an output projection; keys and values are projected once, for all experts. A token is given
the queries of its K experts, each query attends to the shared keys and values, and each result leaves by the output
projection of its expert:

    y_t = sum_e g_e(x_t) sum_h softmax_{s <= t}(q_eh(x_t) . k_h(x_s) / sqrt(Dh)) v_h(x_s) W_eh

As the experts of a `MoELayer` they are routed by any rule and run by any dispatch backend.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.experts import lift
from moe_jax.ops.rotary import rotate
from moe_jax.types import Array, DispatchFn, RoutingPlan


def _project(weights: Array, rows: Array) -> Array:
    return rows @ weights


def _project_all(weights: Array, rows: Array, matmul: Callable, spread: Callable) -> Array:
    del spread
    return matmul(rows, weights)


PROJECTION = lift(_project)._replace(grouped=_project_all)


class AttentionExperts(nnx.Module):
    """`query [E, D, H, Dh]`, `out [E, H, Dh, D]`, and for all experts `key_value [D, 2, H, Dh]`."""

    def __init__(
        self, num_experts: int, width: int, num_heads: int, head_width: int, *, output_scale: float = 1.0, key: Array
    ):
        """Draws normal weights scaled by the inverse root of their fan-in.

        Args:
          num_experts: E.
          width: D.
          num_heads: H, the heads of one expert, each with its own keys and values; 1 in MoA.
          head_width: Dh, even.
          output_scale: factor on the output projections.
          key: consumed.
        """
        query_key, shared_key, out_key = jax.random.split(key, 3)
        heads = (num_heads, head_width)
        fan_in = num_heads * head_width
        self.query = nnx.Param(jax.random.normal(query_key, (num_experts, width, *heads)) * width**-0.5)
        self.key_value = nnx.Param(jax.random.normal(shared_key, (width, 2, *heads)) * width**-0.5)
        self.out = nnx.Param(jax.random.normal(out_key, (num_experts, *heads, width)) * output_scale * fan_in**-0.5)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.query.shape[0]

    def mix(self, x: Array, plan: RoutingPlan, dispatch: DispatchFn, token_mask: Array | None = None) -> Array:
        """Attends within each sequence, causally, by the heads of each token's experts.

        Args:
          x: `[B, S, D]`.
          plan: of the `T = B*S` tokens.
          dispatch: the backend, for the projections of experts.
          token_mask: `[B, S]` bool; nobody attends to a masked token.

        Returns:
          `[B, S, D]`.
        """
        num_experts, width, *heads = self.query.shape
        num_choices = plan.expert_ids.shape[1]
        into, out_of = _slot_by_slot(plan)
        rows = jnp.repeat(x.reshape(-1, width), num_choices, axis=0)  # [T, D] -> [T*K, D]
        query = dispatch(rows, into, PROJECTION, self.query[...].astype(x.dtype).reshape(num_experts, width, -1))
        query = query.reshape(*x.shape[:2], num_choices, *heads)  # (T*K, H*Dh) -> (B, S, K, H, Dh)
        key, value = jnp.moveaxis(jnp.einsum("bsd,dahk->bsahk", x, self.key_value[...].astype(x.dtype)), 2, 0)
        mixed = _attend(query, key, value, token_mask).reshape(len(rows), -1)  # -> (T*K, H*Dh)
        y = dispatch(mixed, out_of, PROJECTION, self.out[...].astype(x.dtype).reshape(num_experts, -1, width))
        return y.reshape(*x.shape[:2], num_choices, width).sum(2, dtype=jnp.float32).astype(x.dtype)


def _attend(query: Array, key: Array, value: Array, token_mask: Array | None) -> Array:
    """Causal, with rotary positions: query `[B, S, K, H, Dh]`, key and value `[B, S, H, Dh]`, to query's shape."""
    num_sequences, length, num_choices, num_heads, head_width = query.shape
    # (B, S, K, H, Dh) -> (B, S, H*K, Dh): query heads that share a key stand together
    grouped = query.swapaxes(2, 3).reshape(num_sequences, length, num_heads * num_choices, head_width)
    positions = jnp.arange(length)
    mixed = jax.nn.dot_product_attention(
        rotate(grouped, positions),
        rotate(key, positions),
        value,
        mask=None if token_mask is None else token_mask[:, None, None, :],
        is_causal=True,
    )
    return mixed.reshape(num_sequences, length, num_heads, num_choices, head_width).swapaxes(2, 3)


def _slot_by_slot(plan: RoutingPlan) -> tuple[RoutingPlan, RoutingPlan]:
    """Plans for `T*K` rows, one for each slot: weighing nothing, for what goes in, and by gates, for what comes out."""
    ids, gates = plan.expert_ids.reshape(-1, 1), plan.gates.reshape(-1, 1)
    capacity = len(plan.expert_ids) if plan.capacity is None else plan.capacity  # a token names an expert once
    ones = (ids < plan.num_experts).astype(gates.dtype)
    return (
        RoutingPlan(ids, ones, plan.num_experts, capacity),
        RoutingPlan(ids, gates, plan.num_experts, capacity),
    )
