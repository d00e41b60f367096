"""Cost counts against values by hand, real parameters, published sizes, enumeration and XLA's own count."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import Part, active_expert_flops, model_cost, part_cost
from moe_jax.models.decoder import Decoder
from tests.tiny_model import TINY

LLAMA_7B = DecoderConfig(
    vocab_size=32_000, width=4096, layers=("dense",) * 32, num_heads=32, num_kv_heads=32, dense_hidden=11_008
)
MIXTRAL = DecoderConfig(
    vocab_size=32_000,
    width=4096,
    layers=("moe",) * 32,
    num_heads=32,
    num_kv_heads=8,
    num_experts=8,
    expert_hidden=14_336,
    num_choices=2,
)
WIDE = DecoderConfig(
    vocab_size=2048,
    width=512,
    layers=("dense", "moe"),
    num_heads=8,
    dense_hidden=1024,
    expert_hidden=512,
    num_experts=4,
)


def test_layers_by_hand():
    dense, moe, _ = model_cost(TINY, sequence_length=5).layers
    # 16 x (2 + 1 + 1 heads of 8) in and 2 x 8 x 16 out; two operations each.
    assert dense.attention == moe.attention == Part(768, 1536)
    # Scores and values: 2 heads x 8 x 2 operations x 2 matmuls, on (1 + 2 + 3 + 4 + 5) / 5 = 3 keys.
    assert dense.mixing_flops == 192
    assert dense.norms == Part(32, 0)
    assert dense.feed_forward == Part(3 * 16 * 12, 2 * 3 * 16 * 12)
    assert (dense.router, dense.expert, dense.num_experts, dense.choices) == (Part(0, 0), Part(0, 0), 0, 0)
    assert moe.router == Part(16 * 4, 2 * 16 * 4)
    assert moe.expert == Part(3 * 16 * 6, 2 * 3 * 16 * 6)
    assert (moe.feed_forward, moe.num_experts, moe.choices) == (Part(0, 0), 4, 2)
    assert moe.parameters == 768 + 32 + 64 + 4 * 288
    assert moe.active_parameters == 768 + 32 + 64 + 2 * 288
    assert moe.flops == 1536 + 192 + 128 + 2 * 576
    assert moe.cache_bytes("bfloat16") == 2 * 8 * 2  # one key and one value head of 8


JOINED = dataclasses.replace(
    TINY,
    expert="mlp",
    expert_settings={"use_bias": True},
    shared_hidden=5,
    shared_gate=True,
    latent_width=8,
    zero_compute=("copy", "constant", "constant", "zero"),
)


def test_joined_experts_by_hand():
    dense, moe, _ = model_cost(JOINED, sequence_length=5).layers
    assert dense.feed_forward == Part(2 * 16 * 12 + 12 + 16, 2 * 2 * 16 * 12)  # two matrices and their biases
    assert moe.router == Part(16 * 8, 2 * 16 * 8)  # four experts that compute and four that do not
    assert moe.expert == Part(2 * 8 * 6 + 6 + 8, 2 * 2 * 8 * 6)
    shared, gate, latent = 2 * 16 * 5, 16, 2 * 16 * 8
    constants = 2 * (16 + 16 * 2)  # v and W of two
    assert moe.feed_forward == Part(
        shared + 5 + 16 + gate + latent + constants, 2 * (shared + gate + latent + constants)
    )
    assert (moe.num_experts, moe.choices) == (4, 1)  # evenly, half of the two choices fall on experts that compute
    assert model_cost(JOINED, 5, [2, 0.5]).flops_by_part["experts"] == 2.5 * 2 * 2 * 8 * 6


def test_model_by_hand():
    cost = model_cost(TINY, sequence_length=5)
    assert cost.flops_by_part == {
        "attention": 3 * 1536,
        "mixing": 3 * 192,
        "router": 2 * 128,
        "feed_forward": 1152,
        "experts": 2 * 2 * 576,
        "read_out": 2 * 16 * 19,
    }
    assert cost.flops == 9504
    assert cost.training_flops == 28_512
    assert all(isinstance(flops, int) for flops in cost.flops_by_part.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": ("dense",)},
        {"layers": ("moe", "dense", "dense", "moe")},
        {"context": 3, "num_heads": 4, "num_kv_heads": 2, "num_experts": 7, "num_choices": 1},
    ],
)
def test_parameters_are_those_of_the_model(changes):
    config = dataclasses.replace(TINY, **changes)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(Decoder(config, key=jax.random.key(0)), nnx.Param)))
    cost = model_cost(config, 4)
    assert cost.parameters == sum(leaf.size for leaf in leaves)
    unused = config.num_moe_layers * (config.num_experts - config.num_choices) * 3 * 16 * 6
    assert cost.active_parameters == cost.parameters - unused


@pytest.mark.parametrize(
    "changes",
    [
        {"expert": "gpt_oss"},
        {"expert": "deep", "expert_settings": {"num_layers": 3}},
        {"expert_hidden_sizes": (1, 6, 3, 3), "shared_hidden": 5},
        dataclasses.asdict(JOINED),
    ],
)
def test_parameters_are_those_of_the_model_with_other_experts(changes):
    config = dataclasses.replace(TINY, **changes)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(Decoder(config, key=jax.random.key(0)), nnx.Param)))
    assert model_cost(config, 4).parameters == sum(leaf.size for leaf in leaves)


def test_published_sizes():
    # Llama (2302.13971), table 2: 6.7B. Mixtral (2401.04088): 47B, of which 13B active.
    assert round(model_cost(LLAMA_7B, 1).parameters, -8) == 6_700_000_000
    mixtral = model_cost(MIXTRAL, 1)
    assert round(mixtral.parameters, -9) == 47_000_000_000
    assert round(mixtral.active_parameters, -9) == 13_000_000_000


def test_full_square_is_the_formula_of_palm():
    # PaLM (2204.02311), appendix B: 6 N + 12 L H Q S training FLOPs per token, with N the parameters of matmuls.
    cost = model_cost(LLAMA_7B, 2048, causal_half=False)
    vectors = cost.norm.parameters + sum(layer.norms.parameters for layer in cost.layers)
    matrices = cost.parameters - cost.embedding.parameters - vectors
    assert cost.training_flops == 6 * matrices + 12 * 32 * 32 * 128 * 2048


def test_mean_choices_count_in_their_layer():
    cost = model_cost(TINY, 5, [0.5, 1.75])
    assert [layer.choices for layer in cost.layers] == [0, 0.5, 1.75]
    assert cost.flops_by_part["experts"] == 2.25 * 576
    assert model_cost(TINY, 5).flops - cost.flops == 1.75 * 576
    assert model_cost(TINY, 5).active_parameters - cost.active_parameters == 1.75 * 288
    assert cost.parameters == model_cost(TINY, 5).parameters


def test_active_expert_flops_by_hand():
    # Two layers, one expert 3 matmuls of 16 x 6, two operations each.
    mean_choices = jnp.array([[2.0, 2.0], [0.5, 1.0]])
    expected = [4 * 576, 1.5 * 576]
    np.testing.assert_array_equal(active_expert_flops(TINY, mean_choices), expected)
    np.testing.assert_array_equal(jax.jit(active_expert_flops, static_argnums=0)(TINY, mean_choices), expected)


def test_part_counts_matrices_whatever_their_names():
    stacked = {"up": np.zeros((5, 4, 6)), "up_bias": np.zeros((5, 6)), "deep": np.zeros((5, 2, 6, 6))}
    assert part_cost({"experts": stacked}) == Part(5 * (24 + 6 + 72), 2 * 5 * (24 + 72))
    assert part_cost({"down": np.zeros((4, 3)), "scale": np.zeros(4)}) == Part(16, 24)
    assert part_cost({}) == Part(0, 0)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_expected_bytes_against_all_routings(num_tokens):
    moe = model_cost(TINY, 5).layers[1]
    choices = list(itertools.combinations(range(4), 2))
    routings = list(itertools.product(choices, repeat=num_tokens))
    touched = [len(set().union(*routing)) for routing in routings]
    read = moe.bytes_read(num_tokens, "float32")
    assert read.expected == pytest.approx(4 * (864 + 288 * np.mean(touched)), rel=1e-12)
    assert read.most == 4 * (864 + 288 * max(touched))


def test_bytes_between_one_token_and_many():
    dense, moe, _ = model_cost(TINY, 5).layers
    assert moe.bytes_read(1, "bfloat16") == (2 * moe.active_parameters, 2 * moe.active_parameters)
    assert moe.bytes_read(10_000, "bfloat16") == (2 * moe.parameters, 2 * moe.parameters)
    assert moe.bytes_read(0, "bfloat16") == (2 * moe.shared_parameters, 2 * moe.shared_parameters)
    assert dense.bytes_read(3, "float32") == (4 * dense.parameters, 4 * dense.parameters)


def xla_flops(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def wide_parts(backend, config=WIDE):
    """Shapes of the model, of its two layers and of 128 tokens entering one."""
    config = dataclasses.replace(config, backend=backend)

    def build():
        model = Decoder(config, key=jax.random.key(0))
        return model, model.layer(0), model.layer(1), jnp.zeros((1, 128, config.width))

    return jax.eval_shape(build)


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_cost_what_xla_counts(layer):
    # The dense backend runs all E experts and the whole square of attention, and XLA also counts what is no matmul: a
    # few operations per activation, where a matmul does 2 D of them. Its combine is one more matmul, 2 E D per token.
    cost = model_cost(WIDE, 128, [WIDE.num_experts], causal_half=False).layers[layer]
    _, *blocks, x = wide_parts("dense")
    forward = xla_flops(lambda block, x: block(x)[0], blocks[layer], x)
    assert 1 < forward / (128 * cost.flops) < 1.01

    def squares(block, x):
        return jnp.sum(block(x)[0] ** 2)

    training = xla_flops(jax.grad(squares, argnums=(0, 1)), blocks[layer], x)
    assert 1 < training / (3 * 128 * cost.flops) < 1.01


def test_joined_experts_cost_what_xla_counts():
    joined = dataclasses.replace(
        WIDE, expert="deep", shared_hidden=256, shared_gate=True, latent_width=256, zero_compute=("copy", "constant")
    )
    cost = model_cost(joined, 128, [joined.num_experts], causal_half=False).layers[1]
    _, _, moe, x = wide_parts("dense", joined)
    assert 1 < xla_flops(lambda block, x: block(x)[0], moe, x) / (128 * cost.flops) < 1.02


def test_parts_cost_what_xla_counts():
    cost = model_cost(WIDE, 128, causal_half=False)
    model, _, moe, x = wide_parts("dense")
    attention = cost.layers[1].attention.flops + cost.layers[1].mixing_flops
    assert 1 < xla_flops(lambda block, x: block.attention(x), moe, x) / (128 * attention) < 1.01
    assert xla_flops(lambda block, x: block.feed_forward.router(x), moe, x) == 128 * cost.layers[1].router.flops
    assert 1 < xla_flops(lambda model, x: model.logits(x), model, x) / (128 * cost.read_out.flops) < 1.01


def test_refuses():
    with pytest.raises(ValueError, match="sequence_length=0 must be at least 1"):
        model_cost(TINY, 0)
    for mean_choices in ([1, 2, 2], [2, 4.5], [2, -1]):
        with pytest.raises(ValueError, match=r"must be one number in \[0, num_experts=4\] for each of 2 MoE layers"):
            model_cost(TINY, 5, mean_choices)
