"""Our MoE layer against the Mixtral block of `transformers`: outputs, gradients and chosen experts, equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.experts import SWIGLU
from moe_jax.routing import RULES, route

NUM_TOKENS, WIDTH, HIDDEN, NUM_EXPERTS = 23, 12, 10, 6


def random_weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * shape[-2] ** -0.5  # noqa: E731
    params = {"w_in": draw(NUM_EXPERTS, WIDTH, 2 * HIDDEN), "w_out": draw(NUM_EXPERTS, HIDDEN, WIDTH)}
    return rng.normal(size=(NUM_TOKENS, WIDTH)).astype(np.float32), draw(WIDTH, NUM_EXPERTS), params


def mixtral_block(router, params):
    """The reference block with our weights: it stores every matrix transposed."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(router.T))
        block.experts.gate_up_proj.copy_(torch.tensor(params["w_in"]).transpose(1, 2))
        block.experts.down_proj.copy_(torch.tensor(params["w_out"]).transpose(1, 2))
    return block


@pytest.mark.parity
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("rule", ["softmax_top_k_renormalized", "top_k_softmax"])
def test_layer_equals_mixtral_block(rule, backend):
    import torch

    tokens, router, params = random_weights()
    block = mixtral_block(router, params)
    inputs = torch.tensor(tokens[None], requires_grad=True)
    expected = block(inputs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected.square().sum().backward()

    def layer(tokens, router, params):
        plan = route(tokens @ router, RULES[rule], num_choices=2).plan
        return BACKENDS[backend](tokens, plan, SWIGLU, params)

    np.testing.assert_allclose(jax.jit(layer)(tokens, router, params), expected[0].detach().numpy(), atol=2e-5)
    gradients = jax.jit(jax.grad(lambda *args: jnp.square(layer(*args)).sum(), argnums=(0, 1, 2)))(
        tokens, router, params
    )
    references = (
        inputs.grad[0],
        block.gate.weight.grad.T,
        {
            "w_in": block.experts.gate_up_proj.grad.transpose(1, 2),
            "w_out": block.experts.down_proj.grad.transpose(1, 2),
        },
    )
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5), gradients, references
    )
