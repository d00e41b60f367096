"""The four saliencies against a loop over tokens and experts, and uniform pruning by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.evolution.saliency import SALIENCIES, measure_saliency, prune_uniformly
from moe_jax.models.decoder import Decoder
from tests.tiny_model import TINY

CONFIG = dataclasses.replace(TINY, layers=("dense", "moe", "dense", "moe"))
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, CONFIG.vocab_size)
MASK = jnp.arange(7)[None, :] < jnp.array([7, 4, 6])[:, None]  # 17 of 21 positions


def leaf(array):
    return np.asarray(array, np.float64)


def slow_saliency(model):
    """`[L, E]` for each name, token by token; only what enters each MoE layer comes from the model."""
    rows = {name: [] for name in SALIENCIES}
    for index in [i for i, kind in enumerate(CONFIG.layers) if kind == "moe"]:
        hidden, _ = model.run_layers(model.embed(TOKENS), 0, index, MASK, trace="off")
        block = model.layer(index)
        normed = leaf(block.feed_forward_norm(block.attend(hidden, MASK)[0]))
        kernel = leaf(block.feed_forward.router.kernel[...])
        bias = leaf(block.feed_forward.bias[...])
        w_in, w_out = (leaf(part[...]) for part in (block.feed_forward.experts.w_in, block.feed_forward.experts.w_out))
        for values in rows.values():
            values.append(np.zeros(CONFIG.num_experts))
        for token in normed[np.asarray(MASK)]:
            p = np.exp(token @ kernel)
            best = np.argsort(-(p / p.sum() + bias))[: CONFIG.num_choices]
            for expert in best:
                gate_half, up = np.split(token @ w_in[expert], 2)
                norm = np.sqrt(np.sum(((gate_half / (1 + np.exp(-gate_half)) * up) @ w_out[expert]) ** 2))
                gate = p[expert] / p[best].sum()
                rows["frequency"][-1][expert] += 1
                rows["gate_sum"][-1][expert] += gate
                rows["gate_norm"][-1][expert] += gate * norm
        rows["reap"][-1] = rows["gate_norm"][-1] / np.maximum(rows["frequency"][-1], 1)
    return {name: np.stack(values) for name, values in rows.items()}


@pytest.fixture(scope="module")
def model():
    """A model whose first MoE layer never chooses expert 3."""
    model = Decoder(CONFIG, key=jax.random.key(0))
    bias = model.stacks[1].feed_forward.bias
    bias[...] = bias[...].at[0, 3].set(-10.0)
    return model


def measure(model, tokens=TOKENS):
    return measure_saliency(*nnx.split(model), tokens, MASK)


def test_saliencies_equal_the_loop(model):
    measured, expected = measure(model), slow_saliency(model)
    assert set(measured) == set(SALIENCIES)
    for name in SALIENCIES:
        assert measured[name].dtype == np.float32
        np.testing.assert_allclose(measured[name], expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
        assert measured[name][0, 3] == 0  # no token, no saliency, and no 0 / 0
    np.testing.assert_array_equal(measured["frequency"].sum(axis=1), [2 * 17, 2 * 17])
    np.testing.assert_allclose(measured["gate_sum"].sum(axis=1), [17, 17], rtol=1e-5)


def test_latent_experts_are_measured_on_the_way_out_and_zero_compute_ones_not_at_all():
    config = dataclasses.replace(
        TINY, layers=("moe",), latent_width=6, zero_compute=("copy", "zero"), expert_hidden_sizes=(2, 6, 4, 1)
    )
    model = Decoder(config, key=jax.random.key(0))
    block = model.layer(0)
    layer = block.feed_forward
    normed = block.feed_forward_norm(block.attend(model.embed(TOKENS, MASK), MASK)[0])
    plan = layer(normed, MASK)[1].plan
    tokens, params = leaf(normed).reshape(-1, config.width), layer.experts.parameters(jnp.float32)
    expected = np.zeros((1, 4))
    for t, k in np.argwhere(np.asarray(plan.expert_ids) < 4):
        e = int(plan.expert_ids[t, k])
        gate, up = np.split(tokens[t] @ leaf(layer.latent.down[...]) @ leaf(params["w_in"][e]), 2)
        output = (gate / (1 + np.exp(-gate)) * up) @ leaf(params["w_out"][e]) @ leaf(layer.latent.up[...])
        expected[0, e] += float(plan.gates[t, k]) * np.linalg.norm(output)
    np.testing.assert_allclose(measure(model)["gate_norm"], expected, rtol=2e-4, atol=1e-5)


def test_masked_tokens_have_no_saliency(model):
    jax.tree.map(np.testing.assert_array_equal, measure(model, jnp.where(MASK, TOKENS, 5)), measure(model))


def test_uniform_pruning_by_hand():
    saliency = np.array([[3.0, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
    # 8 experts over 3 layers: 3 + 3 + 2. Layer 0 keeps 5, 4, 3; layer 1 keeps 9, 6, 5; layer 2 its two nines.
    topology = prune_uniformly(saliency, total=8, num_choices=2)
    np.testing.assert_array_equal(topology.keep, [[1, 0, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(topology.num_choices, [2, 2, 2])
    assert topology.keep.dtype == bool and topology.num_choices.dtype == jnp.int32
    # Among equals the first expert stays: layer 2 of 6 = 2 + 2 + 2, with two nines, then of 9 = 3 + 3 + 3 the 8.
    np.testing.assert_array_equal(prune_uniformly(saliency, 9, 1).keep[2], [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(prune_uniformly(np.ones((2, 4)), 3, 1).keep, [[1, 1, 0, 0], [1, 0, 0, 0]])
    assert prune_uniformly(saliency, 15, 2).keep.all()
