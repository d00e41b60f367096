"""Our layers against blocks of `transformers` with equal weights: outputs and the gradient of the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.attention_experts import AttentionExperts
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers import LinearRouter
from moe_jax.nn.zero_compute import ZeroComputeExperts

E, K, D, F = 6, 2, 12, 10
X = np.random.default_rng(0).normal(size=(2, 9, D)).astype(np.float32)
KEY = jax.random.key(0)

pytestmark = pytest.mark.parity


def drawn(block, scale=0.4):
    """A block of the reference in evaluation, with every parameter drawn from N(0, scale^2)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return block.eval()


def array(tensor):
    return tensor.detach().numpy()


def fill(module, **values):
    """Sets parameters, checking shapes."""
    for name, value in values.items():
        param = getattr(module, name)
        assert param.shape == value.shape, (name, param.shape, value.shape)
        param[...] = jnp.asarray(value)


def assert_equal(layer, block, call=None):
    """Compares outputs, and gradients of the sum of squares for the input."""
    import torch

    inputs = torch.tensor(X, requires_grad=True)
    reference = (call or block)(inputs)
    reference = reference[0] if isinstance(reference, tuple) else reference
    reference.square().sum().backward()

    @jax.jit
    def output_and_grad(layer, x):
        y, vjp = jax.vjp(lambda x: layer(x)[0], x)
        return y, vjp(2 * y)[0]

    y, gradient = output_and_grad(layer, X)
    for ours, theirs in ((y, array(reference).reshape(X.shape)), (gradient, inputs.grad.numpy())):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_gpt_oss_experts():
    """Its gate and up columns alternate; a large scale reaches the clamps."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K, experts_implementation="eager"
    )
    block = drawn(GptOssMLP(config), scale=1.5)
    layer = MoELayer(
        LinearRouter(D, E, use_bias=True, key=KEY),
        ExpertStack(E, D, F, kind="gpt_oss", key=KEY),
        num_choices=K,
        rule="top_k_softmax",
    )
    halves = np.r_[0 : 2 * F : 2, 1 : 2 * F : 2]
    fill(layer.router, kernel=array(block.router.weight).T, bias=array(block.router.bias))
    fill(
        layer.experts,
        w_in=array(block.experts.gate_up_proj)[:, :, halves],
        b_in=array(block.experts.gate_up_proj_bias)[:, halves],
        w_out=array(block.experts.down_proj),
        b_out=array(block.experts.down_proj_bias),
    )
    hidden = np.einsum("bsd,edf->bsef", X, array(block.experts.gate_up_proj))
    assert (np.abs(hidden) > 7).mean() > 0.1
    assert_equal(layer, block)


def test_qwen2_shared_expert_and_its_gate():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=7,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=False,
        experts_implementation="eager",
    )
    block = drawn(Qwen2MoeSparseMoeBlock(config))
    layer = MoELayer(
        LinearRouter(D, E, key=KEY),
        ExpertStack(E, D, F, key=KEY),
        shared=FeedForward(D, 7, is_gated=True, key=KEY),
        num_choices=K,
        rule="softmax_top_k",
    )
    fill(layer.router, kernel=array(block.gate.weight).T)
    fill(
        layer.experts,
        w_in=array(block.experts.gate_up_proj).swapaxes(1, 2),
        w_out=array(block.experts.down_proj).swapaxes(1, 2),
    )
    shared = block.shared_expert
    fill(layer.shared, gate=array(block.shared_expert_gate.weight).T)
    fill(
        layer.shared.experts,
        w_in=np.concatenate([array(shared.gate_proj.weight), array(shared.up_proj.weight)]).T[None],
        w_out=array(shared.down_proj.weight).T[None],
    )
    assert_equal(layer, block)


def test_nemotron_latent_relu_squared_experts():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = NemotronHConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        moe_latent_size=5,
        moe_shared_expert_intermediate_size=7,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        mlp_hidden_act="relu2",
        mlp_bias=False,
        experts_implementation="eager",
    )
    block = drawn(NemotronHMoE(config))
    layer = MoELayer(
        LinearRouter(D, E, key=KEY),
        ExpertStack(E, 5, F, kind="relu2", key=KEY),
        shared=FeedForward(D, 7, kind="relu2", key=KEY),
        latent=Latent(D, 5, key=KEY),
        num_choices=K,
        rule="sigmoid_top_k",
        rule_settings={"scale": 2.5},
    )
    fill(layer.router, kernel=array(block.gate.weight).T)
    fill(layer.latent, down=array(block.fc1_latent_proj.weight).T, up=array(block.fc2_latent_proj.weight).T)
    fill(
        layer.experts,
        w_in=array(block.experts.up_proj).swapaxes(1, 2),
        w_out=array(block.experts.down_proj).swapaxes(1, 2),
    )
    fill(
        layer.shared.experts,
        w_in=array(block.shared_experts.up_proj.weight).T[None],
        w_out=array(block.shared_experts.down_proj.weight).T[None],
    )
    assert_equal(layer, block)


def test_longcat_identity_experts():
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=D,
        expert_ffn_hidden_size=F,
        n_routed_experts=E,
        zero_expert_num=3,
        moe_topk=4,
        routed_scaling_factor=1.5,
    )
    block = drawn(LongcatFlashMoE(config))
    layer = MoELayer(
        LinearRouter(D, E + 3, key=KEY),
        ExpertStack(E, D, F, key=KEY),
        zero_compute=ZeroComputeExperts(("copy",) * 3, D, key=KEY),
        num_choices=4,
        rule="softmax_top_k",
        rule_settings={"scale": 1.5},
    )
    fill(layer.router, kernel=array(block.router.classifier.weight).T)
    fill(
        layer.experts,
        w_in=array(block.experts.gate_up_proj)[:E].swapaxes(1, 2),
        w_out=array(block.experts.down_proj).swapaxes(1, 2),
    )
    assert np.asarray(layer(X)[1].stats.chosen)[E:].min() > 0
    assert_equal(layer, block)


def test_jetmoe_mixture_of_attention_heads():
    import torch
    from transformers import JetMoeConfig
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

    heads, head_width = 2, 4
    config = JetMoeConfig(
        hidden_size=D,
        kv_channels=head_width,
        num_key_value_heads=heads,
        num_local_experts=E,
        num_experts_per_tok=K,
        attn_implementation="eager",
    )
    block = drawn(JetMoeAttention(config, layer_idx=0))
    with torch.no_grad():
        block.experts.bias.zero_()
    layer = MoELayer(
        LinearRouter(D, E, key=KEY),
        AttentionExperts(E, D, heads, head_width, key=KEY),
        num_choices=K,
        rule="top_k_softmax",
    )
    split = (heads, head_width)
    fill(layer.router, kernel=array(block.experts.router.layer.weight).T)
    fill(
        layer.experts,
        query=array(block.experts.input_linear.weight).swapaxes(1, 2).reshape(E, D, *split),
        key_value=array(block.kv_proj.weight).T.reshape(D, 2, *split),
        out=array(block.experts.output_linear.weight).swapaxes(1, 2).reshape(E, *split, D),
    )
    length = X.shape[1]
    future = torch.full((length, length), float("-inf")).triu(1)[None, None]
    positions = JetMoeRotaryEmbedding(config)(torch.tensor(X), torch.arange(length)[None])
    assert_equal(layer, block, lambda x: block(x, attention_mask=future, position_embeddings=positions))
