"""The two-level router: first a group of experts, then an expert of the group.

    p(e) = p(g) p(e | g), g the group of e     z_e = log p(g) + log p(e | g)

This is the hierarchical mixture of Jordan & Jacobs (1994) and of Shazeer (1701.06538, appendix B). The logits are log
probabilities, so softmax over all experts is exactly the product and any rule can follow. Shazeer keeps the best K at
either level; here the rule chooses among all experts at once, or by groups if it is a group-limited one.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.types import Array


class HierarchicalRouter(nnx.Module):
    """Log probabilities of two levels: 2 D (E + groups) FLOPs a token."""

    def __init__(self, width: int, num_experts: int, *, num_groups: int = 2, key: Array):
        """Draws `group_kernel [D, groups]` and `kernel [D, E]` from N(0, 1/D).

        Args:
          width: D.
          num_experts: E.
          num_groups: a divisor of E; a group is a run of E / groups neighbouring experts.
          key: consumed.

        Raises:
          ValueError: the experts cannot be cut into groups of one size.
        """
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        group_key, expert_key = jax.random.split(key)
        self.group_kernel = nnx.Param(draw_kernel(group_key, width, num_groups))
        self.kernel = nnx.Param(draw_kernel(expert_key, width, num_experts))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself; arguments as `Router`."""
        del token_mask, key
        x = x.astype(jnp.float32)
        group = jax.nn.log_softmax(x @ self.group_kernel[...])
        within = (x @ self.kernel[...]).reshape(*group.shape, -1)  # (B, S, E) -> (B, S, groups, E / groups)
        logits = group[..., None] + jax.nn.log_softmax(within)
        return RouterLogits(logits.reshape(*x.shape[:2], -1))
