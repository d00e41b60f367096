"""Attention's variants: against a slow NumPy oracle, and one cached token at a time against the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.config import DecoderConfig, make_attention
from moe_jax.models.decoder import Decoder
from moe_jax.nn.attention import KeyValues
from moe_jax.ops.attention import attend, visible_keys
from moe_jax.ops.rotary import Rotary, get_rotary, longrope, rotate, yarn

WIDTH, LENGTH = 16, 7
LATENT = {"latent_width": 6, "content_width": 4, "rotary_width": 4, "value_width": 3}
VARIANTS = {
    "plain": {},
    "head width": {"head_width": 6},
    "biases and sinks": {"attention_settings": {"use_bias": True, "use_out_bias": True, "use_sinks": True}},
    "head norm": {"attention_settings": {"qk_norm": "head", "norm_epsilon": 1e-3}},
    "whole norm, clip": {"attention_settings": {"qk_norm": "all", "clip": 0.5}},
    "half turned": {"rotary_settings": {"share": 0.5, "base": 100.0}},
    "yarn": {"rotary": "yarn", "rotary_settings": {"factor": 4.0, "original_length": 4}},
    "window": {"windows": (3,)},
    "relative bias": {"attention_settings": {"bias_buckets": 4, "bias_distance": 6}},
    "GLaM": {"turns": (False,), "attention_settings": {"bias_buckets": 4, "bias_distance": 6, "use_sinks": True}},
    "chunk": {"chunks": (3,)},
    "Llama 4, turning": {"turns": (True,), "attention_settings": {"qk_norm": "l2", "far_scale": 0.1, "far_length": 2}},
    "Llama 4, not": {"turns": (False,), "attention_settings": {"qk_norm": "l2", "far_scale": 0.1, "far_length": 2}},
    "latent": {"attention": "latent", "attention_settings": LATENT},
    "latent queries": {"attention": "latent", "attention_settings": LATENT | {"query_width": 5, "scale": 0.3}},
}


def make(name):
    config = DecoderConfig(width=WIDTH, layers=("dense",), num_heads=4, num_kv_heads=2, **VARIANTS[name])
    pattern = None if config.patterns is None else jnp.asarray(config.patterns[0])
    layer = make_attention(config, pattern, 1.0, jax.random.key(0))
    # Biases, sinks and norms start at values that would hide a mistake.
    leaves, structure = jax.tree.flatten(layer)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_token_at_a_time_equals_the_whole(name):
    layer = make(name)
    x = jax.random.normal(jax.random.key(2), (2, LENGTH, WIDTH))
    whole, kept = jax.jit(lambda layer, x: layer(x))(layer, x)
    # The second sequence lags two tokens behind, and what is cached beyond a token's place must not matter.
    cache = KeyValues(*(jnp.full_like(part, 7.0) for part in kept.grow(LENGTH + 2)))
    extend = jax.jit(lambda layer, x, positions, cache: layer.extend(x, positions, cache))
    for step in range(LENGTH + 2):
        positions = jnp.array([min(step, LENGTH - 1), max(step - 2, 0)])
        rows = x[jnp.arange(2), positions][:, None]
        y, cache = extend(layer, rows, positions, cache)
        np.testing.assert_allclose(y[:, 0], whole[jnp.arange(2), positions], atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_depends_on_the_future_or_on_masked_tokens(name):
    layer, x = make(name), jax.random.normal(jax.random.key(2), (2, LENGTH, WIDTH))
    mask = jnp.ones((2, LENGTH), bool).at[1, 2].set(False)
    y = layer(x, mask)[0]
    other = x.at[:, 5:].set(3.0).at[1, 2].set(-2.0)
    is_same = np.ones((2, LENGTH), bool)
    is_same[:, 5:] = is_same[1, 2] = False
    np.testing.assert_allclose(layer(other, mask)[0][is_same], y[is_same], atol=1e-6)
    assert not np.allclose(layer(other, mask)[0][:, 5:], y[:, 5:])


def test_attend_equals_a_loop(rng):
    shape = {"query": (2, 5, 4, 6), "key": (2, 5, 2, 6), "value": (2, 5, 2, 3)}
    query, key, value = (rng.normal(size=size).astype(np.float32) for size in shape.values())
    sinks, is_visible = rng.normal(size=4).astype(np.float32), rng.random((2, 1, 5, 5)) < 0.7
    bias = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    got = attend(
        *map(jnp.asarray, (query, key, value, is_visible)),
        is_causal=True,
        scale=0.7,
        bias=jnp.asarray(bias),
        sinks=jnp.asarray(sinks),
    )
    for b, i, h in np.ndindex(2, 5, 4):
        seen = [j for j in range(i + 1) if is_visible[b, 0, i, j]]
        weights = np.exp([0.7 * query[b, i, h] @ key[b, j, h // 2] + bias[0, h, i, j] for j in seen])
        total = weights.sum() + np.exp(sinks[h])
        expected = sum((w / total * value[b, j, h // 2] for w, j in zip(weights, seen, strict=True)), np.zeros(3))
        if seen:
            np.testing.assert_allclose(got[b, i, h], expected, atol=1e-5)
    assert np.isfinite(got).all()


def test_visible_keys_by_hand():
    positions = jnp.arange(5)
    rows = visible_keys(positions[None], positions, jnp.int32(3), jnp.int32(4))[0, 0].astype(int)
    # Token 3 sees 1, 2, 3 (the last three); token 4 starts a new chunk.
    np.testing.assert_array_equal(
        rows, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    )


def test_rotary_turns_a_share_and_scales(rng):
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32)
    y = rotate(x, jnp.array([[2]]), Rotary(np.array([0.5], np.float32), 3.0))[0, 0, 0]
    a, b = x[0, 0, 0, 0], x[0, 0, 0, 1]
    # The pair (0, 1) turns by 2 * 0.5 = 1 and grows threefold, the rest passes.
    np.testing.assert_allclose(
        y[:2], 3 * np.array([a * np.cos(1) - b * np.sin(1), b * np.cos(1) + a * np.sin(1)]), rtol=1e-5
    )
    np.testing.assert_array_equal(y[2:], x[0, 0, 0, 2:])


def test_stretched_frequencies():
    np.testing.assert_allclose(get_rotary("linear", 4, 9, base=100.0, factor=2.0).frequencies, [0.5, 0.05], rtol=1e-6)
    fast = yarn(8, factor=4.0, original_length=1000)
    plain = get_rotary("plain", 8, 0).frequencies
    # The fastest pair turns 159 times within 1000 tokens, more than beta_fast, and stays; the slowest is slowed by 4.
    np.testing.assert_allclose(fast.frequencies[[0, 3]], [plain[0], plain[3] / 4], rtol=1e-6)
    assert fast.magnitude == pytest.approx(1 + 0.1 * np.log(4))
    llama = get_rotary("llama3", 8, 0, base=10_000.0, factor=4.0, original_length=1000).frequencies
    np.testing.assert_allclose(llama[[0, 3]], [plain[0], plain[3] / 4], rtol=1e-6)
    short = {"short_factors": (1.0, 2.0), "long_factors": (3.0, 4.0), "original_length": 10, "long_magnitude": 1.5}
    np.testing.assert_allclose(longrope(4, 10, base=100.0, **short).frequencies, [1.0, 0.05], rtol=1e-6)
    np.testing.assert_allclose(longrope(4, 11, base=100.0, **short).frequencies, [1 / 3, 0.025], rtol=1e-6)
    assert longrope(4, 11, **short).magnitude == 1.5
    with pytest.raises(ValueError, match="needs 3 factors"):
        longrope(6, 10, **short)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary": "spiral"}, "unknown rotary 'spiral'; known: plain, linear"),
        ({"rotary_settings": {"factor": 2.0}}, "rotary 'plain' has no setting 'factor'; it has: base, share"),
        ({"attention_settings": {"sink": True}}, "attention 'grouped_query' has no setting 'sink'"),
        ({"attention_settings": {"qk_norm": "heads"}}, "unknown qk_norm 'heads'; known: none, head, all, l2"),
        ({"attention": "linear"}, "unknown attention 'linear'; known: grouped_query, latent"),
        ({"attention": "latent", "attention_settings": LATENT | {"rotary_width": 3}}, "rotary_width=3 must be even"),
        ({"windows": (4,)}, r"windows=\(4,\) must be one non-negative value for each of 2 layers"),
        ({"head_width": 5}, "head_width=5 an even number"),
        ({"norm": "batch"}, "unknown norm 'batch'; known: rms, layer"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(layers=("dense", "moe"), **fields)


def test_scales_ties_and_biases(rng):
    config = DecoderConfig(vocab_size=9, width=8, layers=("dense",), num_heads=2, num_kv_heads=1, dense_hidden=6)
    tokens = jnp.asarray(rng.integers(0, 9, (1, 4)))
    plain = Decoder(config, key=jax.random.key(0))
    hidden, _ = plain.run_layers(2.0 * plain.embed(tokens), 0, 1)
    odd = dataclasses.replace(config, embedding_scale=2.0, logit_scale=0.5, read_out_bias=True, tie_embeddings=True)
    other = Decoder(odd, key=jax.random.key(0))
    bias = jnp.asarray(rng.normal(size=9), jnp.float32)
    other.read_out_bias[...] = bias
    expected = 0.5 * (plain.norm(hidden) @ plain.embedding[...][0].T + bias[None, None])
    np.testing.assert_allclose(other(tokens)[0], expected, atol=1e-5)
    still = Decoder(dataclasses.replace(config, residual_scale=0.0), key=jax.random.key(0))
    np.testing.assert_array_equal(still.run_layers(still.embed(tokens), 0, 1)[0], still.embed(tokens))


def test_gates_on_input(rng):
    """With linear experts it would not matter where the gate is; with SwiGLU it does, and every slot has its own."""
    config = DecoderConfig(width=8, layers=("moe",), num_heads=2, num_experts=4, expert_hidden=6, gates_on_input=True)
    layer = Decoder(config, key=jax.random.key(0)).layer(0).feed_forward
    x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    y, routed = layer(x)
    expert, params = layer.experts.expert, layer.experts.parameters(jnp.float32)
    for token in range(5):
        expected = np.zeros(8, np.float32)
        for e, gate in zip(routed.plan.expert_ids[token], routed.plan.gates[token], strict=True):
            one = {name: value[e] for name, value in params.items()}
            expected += expert.outer(one, expert.inner(one, gate * x[0, token][None]))[0]
        np.testing.assert_allclose(y[0, token], expected, atol=1e-5)
