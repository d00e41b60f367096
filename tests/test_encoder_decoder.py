"""The encoder-decoder against a NumPy forward pass written from the papers, and its structural promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.nn.multi_head_attention import MultiHeadAttention
from moe_jax.ops.relative_position import relative_position_buckets
from tests.tiny_encoder_decoder import NLLB, STYLES, SWITCH, apply, dropless, make, run, tokens_of


def leaf(param):
    return np.asarray(param[...], np.float64)


def numpy_norm(norm, x):
    if not hasattr(norm, "bias"):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon) * leaf(norm.scale)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon) * leaf(norm.scale) + leaf(norm.bias)


def numpy_attention(attention, x, source, bias, is_causal):
    """One token, head and key at a time; `bias` is the table of relative positions or None."""

    def project(name, rows):
        y = np.einsum("sd,dhk->shk", rows, leaf(getattr(attention, name)))
        added = getattr(attention, f"{name}_bias")
        return y if added is None else y + leaf(added)

    query, key, value = project("query", x), project("key", source), project("value", source)
    scale = 1.0 if attention.score_scale == 1 else query.shape[-1] ** -0.5
    y = np.zeros_like(x) if attention.out_bias is None else np.tile(leaf(attention.out_bias), (len(x), 1))
    for s in range(len(x)):
        for h in range(query.shape[1]):
            seen = range(s + 1 if is_causal else len(source))
            scores = np.array([query[s, h] @ key[n, h] * scale for n in seen])
            if bias is not None:
                side = {"num_buckets": 8, "max_distance": 10, "is_bidirectional": not is_causal}
                buckets = relative_position_buckets(jnp.arange(len(scores)) - s, **side)
                scores += leaf(bias.table)[np.asarray(buckets), h]
            weights = np.exp(scores - scores.max())
            y[s] += (weights / weights.sum()) @ value[: len(scores), h] @ leaf(attention.out)[h]
    return y


def numpy_network(experts, e, x):
    bias = (leaf(experts.b_in)[e], leaf(experts.b_out)[e]) if hasattr(experts, "b_in") else (0, 0)
    return np.maximum(x @ leaf(experts.w_in)[e] + bias[0], 0) @ leaf(experts.w_out)[e] + bias[1]


def numpy_moe(layer, x, config, capacity):
    """First choices of all tokens in order, then the second ones; who finds no room leaves the gate to the other."""
    p = np.exp(x @ leaf(layer.router.kernel))
    p /= p.sum(-1, keepdims=True)
    best = np.argsort(-p, axis=-1)[:, : config.num_choices]
    taken, kept = np.zeros(config.num_experts, int), [[] for _ in x]
    for rank in range(config.num_choices):
        for t, e in enumerate(best[:, rank]):
            taken[e] += 1
            if taken[e] <= capacity:
                kept[t].append(e)
    y = np.zeros_like(x)
    for t, experts in enumerate(kept):
        for e in experts:
            gate = p[t, e] if config.num_choices == 1 else 0.8 * p[t, e] / p[t, experts].sum()
            y[t] += gate * numpy_network(layer.experts, e, x[t])
    return y


def numpy_model(model, source, target):
    """One source and one target without padding, in float64."""
    config = model.config

    def embed(table, ids):
        x = leaf(table)[ids]
        if config.positions == "relative":
            return x
        angles = (2 + np.arange(len(ids)))[:, None] * 10_000.0 ** (-np.arange(6) / 5)
        return x * 12**0.5 + np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def feed(block, x):
        normed = numpy_norm(block.feed_forward_norm, x)
        if not hasattr(block.feed_forward, "router"):
            return x + numpy_network(block.feed_forward.experts, 0, normed)
        capacity = 2 if config.capacity_unit == "tokens" else int(np.ceil(0.4 * len(x)))
        return x + numpy_moe(block.feed_forward, normed, config, capacity)

    x = embed(model.embedding, source)
    for block in model.encoder:
        normed = numpy_norm(block.attention_norm, x)
        x = feed(block, x + numpy_attention(block.attention, normed, normed, model.encoder_bias, False))
    encoded = numpy_norm(model.encoder_norm, x)
    x = embed(model.embedding if config.tie_embeddings else model.target_embedding, target)
    for block in model.decoder:
        normed = numpy_norm(block.attention_norm, x)
        x = x + numpy_attention(block.attention, normed, normed, model.decoder_bias, True)
        x = feed(
            block, x + numpy_attention(block.cross_attention, numpy_norm(block.cross_norm, x), encoded, None, False)
        )
    x = numpy_norm(model.decoder_norm, x)
    return x @ leaf(model.embedding).T / 12**0.5 if config.tie_embeddings else x @ leaf(model.read_out)


@pytest.mark.parametrize("style", STYLES)
def test_equals_the_numpy_model_with_drops(style):
    model, source, target = make(STYLES[style]), tokens_of(2, 9), tokens_of(2, 7, seed=2)
    logits, *routed = apply(model, source, target)
    assert all(output.stats.dropped_capacity.sum() > 0 for output in routed)
    for b in range(2):
        np.testing.assert_allclose(logits[b], numpy_model(model, source[b], target[b]), atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_masked_tokens_are_inert_on_either_side(style):
    """Padding before and behind the tokens: whatever it holds, and as if it were not there."""
    model, source, target = make(STYLES[style]), tokens_of(2, 9), tokens_of(2, 8, seed=2)
    source_mask = jnp.array([[False] * 3 + [True] * 6, [True] * 9])
    target_mask = jnp.array([[False] * 2 + [True] * 5 + [False], [True] * 8])
    logits, *routed = apply(model, source, target, source_mask, target_mask, trace="topk")
    garbage = [jnp.where(mask, ids, 5) for ids, mask in ((source, source_mask), (target, target_mask))]
    again, *routed_again = apply(model, *garbage, source_mask, target_mask, trace="topk")
    np.testing.assert_allclose(again[target_mask], logits[target_mask], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), routed_again, routed)
    np.testing.assert_array_equal([output.stats.num_tokens.sum() for output in routed], [15.0, 13.0])
    if style == "switch":  # its capacity is the same however long the padding
        alone, *_ = apply(model, source[:1, 3:], target[:1, 2:7])
        np.testing.assert_allclose(logits[:1, 2:7], alone, atol=1e-5)


def test_decoder_is_causal_and_sequences_do_not_mix():
    model, source, target = make(SWITCH), tokens_of(2, 9), tokens_of(2, 8, seed=2)
    before, *_ = apply(model, source, target)
    after, *_ = apply(model, source, target.at[0, 5:].add(-3))
    np.testing.assert_allclose(after[0, :5], before[0, :5], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)
    assert jnp.abs(after[0, 5:] - before[0, 5:]).max() > 1e-2
    after, *_ = apply(model, source.at[0, 8].add(-3), target)
    assert jnp.abs(after[0] - before[0]).min(-1).max() > 1e-4
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("parts", [(1,) * 6, (2, 4), (5, 1)])
def test_cached_decoding_equals_the_whole_target(style, parts):
    model, source, target = make(dropless(STYLES[style])), tokens_of(2, 9), tokens_of(2, 6, seed=2)
    source_mask = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    target_mask = jnp.array([[True] * 6, [False, True, True, False, True, True]])
    whole, _, routed = apply(model, source, target, source_mask, target_mask, trace="full")
    encoded, _ = model.encode(source, source_mask)
    cache = model.start_cache(encoded, source_mask, 8)
    decode = jax.jit(lambda state, *args: nnx.merge(nnx.graphdef(model), state).decode(*args, "full"))
    logits, router_logits, start = [], [], 0
    for length in parts:
        part = slice(start, start + length)
        step, cache, output = decode(nnx.state(model), target[:, part], cache, target_mask[:, part])
        logits.append(step)
        router_logits.append(output.logits.reshape(-1, 2, length, 4))
        start += length
    assert cache.length == 6
    np.testing.assert_allclose(jnp.concatenate(logits, 1)[target_mask], whole[target_mask], atol=1e-5)
    stepwise = jnp.concatenate(router_logits, 2)[:, target_mask]
    np.testing.assert_allclose(stepwise, routed.logits.reshape(-1, 2, 6, 4)[:, target_mask], atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_finite_and_reach_every_parameter(style):
    model = make(STYLES[style])
    source, target = tokens_of(3, 9), tokens_of(3, 7, seed=2)
    mask = jnp.arange(9)[None, :] < jnp.array([[9], [4], [0]])  # the last source is empty

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits, *_ = nnx.merge(graphdef, params, rest)(source, target, mask, trace="off")
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, :, None], -1).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, value in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(value).all(), path
        assert "key_bias" in str(path) or jnp.abs(value).max() > 1e-7, path  # softmax cancels a shift of all keys


def test_routing_output_is_per_side_and_absent_without_moe_layers():
    config = dataclasses.replace(SWITCH, encoder_layers=("moe", "dense", "moe"), decoder_layers=("dense",))
    source, target = tokens_of(2, 6), tokens_of(2, 5)
    _, encoder, decoder = apply(make(config), source, target, trace="full")
    assert encoder.plan.expert_ids.shape == (2, 12, 1) and encoder.logits.shape == (2, 12, 4)
    assert (decoder.plan, decoder.logits, decoder.stats) == (None, None, None)
    _, encoder, _ = apply(make(config), source, target, trace="off")
    assert encoder.stats is None


def test_jitter_needs_a_key():
    model = make(dataclasses.replace(SWITCH, router_settings={"jitter": 0.3}))
    source, target = tokens_of(2, 6), tokens_of(2, 5)
    still, _, _ = apply(model, source, target)
    shaken = [apply(model, source, target, key=jax.random.key(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(shaken[0], shaken[1])
    assert min(jnp.abs(shaken[0] - other).max() for other in (shaken[2], still)) > 1e-4


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    source, target = tokens_of(2, 6), tokens_of(2, 5)
    model = make(dataclasses.replace(NLLB, compute_dtype="bfloat16"))
    logits, *_ = apply(model, source, target)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, apply(make(NLLB), source, target)[0], atol=0.3)


def test_population_of_models_is_a_vmap_over_keys():
    config = dataclasses.replace(SWITCH, encoder_layers=("moe",), decoder_layers=("dense",))
    states = jax.vmap(lambda key: nnx.state(EncoderDecoder(config, key=key)))(jax.random.split(jax.random.key(0), 2))
    graphdef, args = nnx.graphdef(make(config)), (tokens_of(2, 6), tokens_of(2, 5))
    together = jax.jit(jax.vmap(lambda state: nnx.merge(graphdef, state)(*args)[0]))(states)
    alone, *_ = run(graphdef, jax.tree.map(lambda leaf: leaf[1], states), *args, trace="off", key=None)
    np.testing.assert_allclose(together[1], alone, atol=1e-5)
    assert jnp.abs(together[0] - together[1]).max() > 0.1


def test_attention_by_hand():
    """One head of width 1 and all weights 1: scores 2 * (0, 1) and a bias of -2 on the second make equal weights."""
    attention = MultiHeadAttention(1, 1, 1, is_scaled=False, key=jax.random.key(0))
    for name in ("query", "key", "value", "out"):
        getattr(attention, name)[...] = jnp.ones((1, 1, 1))
    x, source = jnp.array([[[2.0]]]), jnp.array([[[0.0], [1.0], [9.0]]])
    keys, values = attention.keys_and_values(source)
    mask, bias = jnp.array([[[[True, True, False]]]]), jnp.array([[[[0.0, -2.0, 0.0]]]])
    np.testing.assert_allclose(attention(x, keys, values, mask, bias), [[[0.5]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": ()}, "must be tuples of 'dense' and 'moe'"),
        ({"decoder_layers": ("sparse",)}, "must be tuples of 'dense' and 'moe'"),
        ({"head_width": None, "encoder_heads": 5}, "width=12 must be a multiple of encoder_heads=5"),
        ({"width": 0}, "width=0 must be a positive number"),
        ({"decoder_heads": -1}, "decoder_heads=-1 must be a positive number"),
        ({"relative_buckets": 2}, "num_buckets=2 must leave at least 2"),
        ({"norm": "batch"}, "unknown norm 'batch'; known: rms, layer"),
        ({"positions": "rotary"}, "unknown positions 'rotary'; known: relative, sinusoidal"),
        ({"positions": "sinusoidal", "width": 13}, "an even width of at least 4, got 13"),
        ({"stop_ids": (1, 23), "pad_id": -1}, r"token ids \[-1, 23\] .* outside vocab_size=23"),
        ({"rule": "expert_choice"}, "with dense decoder_layers, or take a causal rule"),
        ({"capacity": 0}, "capacity 0 of unit 'tokens' must be positive"),
        ({"capacity_unit": "litres"}, "one of balance, share, tokens"),
        ({"num_choices": 2}, "switch_top_1 routes to exactly 1"),
        ({"router": "best"}, "unknown router 'best'"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SWITCH, **fields)


def test_an_encoder_may_see_the_future():
    config = dataclasses.replace(
        SWITCH, rule="expert_choice", num_choices=2, capacity=None, decoder_layers=("dense", "dense")
    )
    logits, encoder, _ = apply(make(config), tokens_of(2, 6), tokens_of(2, 5))
    assert jnp.isfinite(logits).all() and encoder.stats.kept.shape == (1, 4)
