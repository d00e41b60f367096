"""Experts with arrays of their own give what their stack gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.separate_experts import SeparateExperts
from moe_jax.types import RoutingPlan

STACKS = {
    "swiglu": {},
    "biases": {"kind": "gpt_oss"},
    "deep": {"kind": "deep", "settings": {"num_layers": 3}},
    "sizes": {"hidden_sizes": (6, 1, 3, 5)},
}


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("name", STACKS)
def test_mix_equals_the_stack(name, num_tokens, rng):
    """Some slots are empty, some experts unused, and a token without slots holds NaN."""
    stack = ExpertStack(4, 8, 6, key=jax.random.key(0), **STACKS[name])
    leaves, structure = jax.tree.flatten(stack)
    stack = jax.tree.unflatten(structure, [leaf + 0.1 for leaf in leaves])  # biases that are not zero
    ids = np.array([[2, 4], [0, 2], [4, 4], [2, 0], [4, 3], [0, 3], [3, 2]])[:num_tokens]
    gates = np.where(ids < 4, rng.random(ids.shape), 0)
    x = rng.normal(size=(num_tokens, 1, 8))
    x[2:3] = np.nan
    plan = RoutingPlan(jnp.asarray(ids, jnp.int32), jnp.asarray(gates, jnp.float32), 4, None)
    x = jnp.asarray(x, jnp.float32)
    separate = SeparateExperts(stack)
    y = jax.jit(lambda experts: experts.mix(x, plan, BACKENDS["dense"]))(separate)
    assert separate.num_experts == 4
    np.testing.assert_allclose(y, stack.mix(x, plan, BACKENDS["dense"]), atol=1e-5)
