"""The experts of a stack with arrays of their own, so that a decoded token reads its experts and copies nothing."""

from functools import partial

import jax
from flax import nnx

from moe_jax.dispatch.switched import run_slots
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.trees import cut
from moe_jax.types import Array, DispatchFn, RoutingPlan


class SeparateExperts(nnx.Module):
    """E stacks of one expert; takes the place of the stack in a `MoELayer` that runs few tokens."""

    def __init__(self, stack: ExpertStack):
        """Cuts the stack up, on CPU without a copy."""
        self.experts = nnx.List(_one_of(stack, index) for index in range(stack.num_experts))

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def mix(self, x: Array, plan: RoutingPlan, dispatch: DispatchFn, token_mask: Array | None = None) -> Array:
        """As `ExpertStack`, but always with the backend `switched`."""
        del dispatch, token_mask
        tokens = x.reshape(-1, x.shape[-1])
        return run_slots(tokens, plan, [partial(_run, one) for one in self.experts]).reshape(x.shape)


def _one_of(stack: ExpertStack, index: int) -> ExpertStack:
    """A stack of one of the experts."""
    chosen = slice(index, index + 1)
    one = jax.tree.map(lambda leaf: cut(leaf, chosen), stack)
    one.hidden_sizes = stack.hidden_sizes[chosen]
    return one


def _run(stack: ExpertStack, row: Array) -> Array:
    """The only expert of a stack on a row `[1, D]`."""
    params = {name: value[0] for name, value in stack.parameters(row.dtype).items()}
    return stack.expert.outer(params, stack.expert.inner(params, row))
