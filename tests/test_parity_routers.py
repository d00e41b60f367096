"""Our rules against the routers of `transformers`: chosen experts, gates and, where they are unusual, gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import get_rule, route
from moe_jax.routing.rules.sparse_mixer import Draws, sparse_mixer_of_draws
from moe_jax.types import RoutingInputs

NUM_TOKENS, WIDTH, NUM_EXPERTS = 40, 32, 12


def random_logits():
    """Hidden states and router weights for modules that multiply them themselves, and the logits."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(NUM_TOKENS, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(NUM_EXPERTS, WIDTH)).astype(np.float32) * WIDTH**-0.5
    return hidden, weights, hidden @ weights.T


def assert_same_gates(plan, ids, gates, atol=2e-6):
    """Compares as `[T, E]`, since the order of the slots is free."""
    ours, theirs = np.zeros((2, NUM_TOKENS, NUM_EXPERTS + 1), np.float32)
    np.put_along_axis(ours, np.asarray(plan.expert_ids), np.asarray(plan.gates), axis=-1)
    np.put_along_axis(theirs, ids.numpy(), gates.detach().numpy(), axis=-1)
    np.testing.assert_allclose(ours, theirs, atol=atol)


GROUPS = {"n_group": 4, "topk_group": 2}
DEEPSEEK = {  # version: router class, what its configuration needs, our rule and its settings
    2: ("TopkRouter", GROUPS | {"topk_method": "group_limited_greedy"}, "group_limited_softmax_top_k"),
    3: ("TopkRouter", GROUPS, "group_limited_sigmoid_top_k"),
    4: ("TopKRouter", {}, "sqrt_softplus_top_k"),
}


@pytest.mark.parity
@pytest.mark.parametrize("version", DEEPSEEK)
def test_rule_equals_the_deepseek_router(version):
    import torch
    import transformers

    router_class, needed, name = DEEPSEEK[version]
    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=WIDTH, n_routed_experts=NUM_EXPERTS, num_experts_per_tok=3, routed_scaling_factor=2.5, **needed
    )
    module = importlib.import_module(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}")
    router = getattr(module, f"DeepseekV{version}{router_class}")(config)
    hidden, weights, logits = random_logits()
    bias = np.zeros(NUM_EXPERTS, np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weights))
        if version > 2:
            bias = np.random.default_rng(1).normal(size=NUM_EXPERTS).astype(np.float32) * 0.2
            router.e_score_correction_bias.copy_(torch.tensor(bias))
        _, gates, ids = router(torch.tensor(hidden))
    settings = {"num_groups": 4, "open_groups": 2} if "n_group" in needed else {}
    plan = route(logits, get_rule(name, scale=2.5, **settings), num_choices=3, bias=jnp.asarray(bias)).plan
    assert_same_gates(plan, ids, gates)


@pytest.mark.parity
def test_gshard_with_every_second_expert_equals_the_nllb_router():
    import torch
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    config = NllbMoeConfig(
        d_model=WIDTH, num_experts=NUM_EXPERTS, expert_capacity=NUM_TOKENS, second_expert_policy="all"
    )
    _, _, logits = random_logits()
    _, gates = NllbMoeTop2Router(config).route_tokens(torch.tensor(logits))
    plan = route(logits, get_rule("gshard_top_2"), num_choices=2).plan
    assert_same_gates(plan, torch.arange(NUM_EXPERTS).expand(NUM_TOKENS, -1), gates)


@pytest.mark.parity
def test_sparse_mixer_in_evaluation_equals_phimoe():
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    _, _, logits = random_logits()
    for jitter in (0.01, 0.3):
        gates, ids = sparsemixer(torch.tensor(logits), jitter_eps=jitter, training=False, top_k=2)
        plan = route(logits, get_rule("sparse_mixer", jitter=jitter), num_choices=2).plan
        np.testing.assert_array_equal(plan.expert_ids, ids)
        np.testing.assert_allclose(plan.gates, gates, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("jitter", [0.01, 0.3, 10.0])
def test_sparse_mixer_in_training_has_the_draws_gates_and_gradient_of_phimoe(jitter):
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    _, _, logits = random_logits()
    weights = np.random.default_rng(2).normal(size=(NUM_TOKENS, 2)).astype(np.float32)
    torch.manual_seed(0)
    theirs = torch.tensor(logits, requires_grad=True)
    gates, ids = sparsemixer(theirs, jitter_eps=jitter, training=True, top_k=2)
    (gates * torch.tensor(weights)).sum().backward()

    torch.manual_seed(0)  # the same draws again, in the order in which `sparsemixer` makes them
    draws = []
    for slot in range(2):
        gumbel = -torch.empty(NUM_TOKENS, NUM_EXPERTS).exponential_().log()
        uniform = torch.rand(NUM_TOKENS, 1)
        if slot == 1:  # there it draws with rand_like and again with uniform_
            uniform = uniform.uniform_()
        draws.append((gumbel.numpy(), uniform[:, 0].numpy()))
    gumbel, uniform = (jnp.asarray(np.stack(x)) for x in zip(*draws, strict=True))

    def value(logits):
        choice = sparse_mixer_of_draws(RoutingInputs(logits), 2, Draws(gumbel, uniform), jitter=jitter)
        return jnp.sum(weights * choice.gates), choice

    gradient, choice = jax.grad(value, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_array_equal(choice.expert_ids, ids)
    np.testing.assert_allclose(choice.gates, gates.detach(), atol=4e-5)  # it writes a third as 0.3333
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)
    assert jitter < 0.1 or len(set(np.asarray(choice.expert_ids[:, 0] == logits.argmax(-1)))) == 2  # it did explore
