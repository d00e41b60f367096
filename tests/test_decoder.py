"""The decoder against a NumPy forward pass written from the papers, and its structural promises."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.dispatch import BACKENDS
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.ops.norms import rms_norm
from moe_jax.ops.rotary import rotate
from moe_jax.routing import full_topology, population_topology, single_topology
from tests.tiny_model import TINY

CONFIG = dataclasses.replace(
    TINY, layers=("dense", "moe", "moe", "dense", "moe"), num_heads=4, num_kv_heads=2, num_experts=5, context=1
)


def make(config=CONFIG, seed=0):
    return Decoder(config, key=jax.random.key(seed))


def tokens_of(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def numpy_rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def numpy_swiglu(x, w_in, w_out):
    gate, up = np.split(x @ w_in, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ w_out


def numpy_attention(x, qkv, out):
    length, heads, kv_heads, half = len(x), out.shape[0], (qkv.shape[1] - out.shape[0]) // 2, qkv.shape[2] // 2
    frequencies = 10_000.0 ** (-np.arange(half) / half)

    def rotated(vector, position):
        pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    projected = np.einsum("sd,dhk->shk", x, qkv)
    result = np.zeros_like(x)
    for h in range(heads):
        group = h // (heads // kv_heads)
        query = np.stack([rotated(projected[s, h], s) for s in range(length)])
        key = np.stack([rotated(projected[s, heads + group], s) for s in range(length)])
        for s in range(length):
            score = np.exp(key[: s + 1] @ query[s] / np.sqrt(2 * half))
            result[s] += (score / score.sum()) @ projected[: s + 1, heads + kv_heads + group] @ out[h]
    return result


def numpy_decoder(model, tokens):
    """One sequence, token by token and expert by expert, in float64."""
    leaf = lambda array: np.asarray(array, np.float64)  # noqa: E731
    tables = leaf(model.embedding[...])
    x = tables[0][tokens]
    x[1:] += tables[1][tokens[:-1]]
    blocks = [jax.tree.map(lambda a, i=i: a[i], stack) for stack in model.stacks for i in range(depth_of(stack))]
    for block, kind in zip(blocks, CONFIG.layers, strict=True):
        normed = numpy_rms(x, leaf(block.attention_norm.scale[...]))
        x = x + numpy_attention(normed, leaf(block.attention.qkv[...]), leaf(block.attention.out[...]))
        normed = numpy_rms(x, leaf(block.feed_forward_norm.scale[...]))
        experts = block.feed_forward.experts
        w_in, w_out = leaf(experts.w_in[...]), leaf(experts.w_out[...])
        if kind == "dense":
            x = x + numpy_swiglu(normed, w_in[0], w_out[0])
            continue
        router = leaf(block.feed_forward.router.kernel[...])
        for s in range(len(x)):
            p = np.exp(normed[s] @ router)
            best = np.argsort(-p)[: CONFIG.num_choices]
            x[s] += sum(p[e] / p[best].sum() * numpy_swiglu(normed[s], w_in[e], w_out[e]) for e in best)
    return numpy_rms(x, leaf(model.norm.scale[...])) @ leaf(model.read_out[...])


def depth_of(stack):
    return stack.attention.qkv.shape[0]


@functools.cache
def compiled(config=CONFIG, trace="stats"):
    graphdef = nnx.graphdef(make(config))
    return jax.jit(lambda state, *args, **kw: nnx.merge(graphdef, state)(*args, trace=trace, **kw))


def apply(model, *args, trace="stats", **kw):
    return compiled(model.config, trace)(nnx.state(model), *args, **kw)


def test_equals_the_numpy_decoder():
    model, tokens = make(), tokens_of(2, 9)
    logits, _ = apply(model, tokens)
    for b in range(2):
        np.testing.assert_allclose(logits[b], numpy_decoder(model, np.asarray(tokens[b])), atol=2e-4)


def test_rms_norm_and_rotation_by_hand():
    # rms of (3, 4) is sqrt(12.5).
    np.testing.assert_allclose(
        rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0])), [[0.848528, 2.262742]], rtol=1e-5
    )
    # One pair (1, 0) at position 2 turns by 2 radians.
    turned = rotate(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.array([2]))
    np.testing.assert_allclose(turned.ravel(), [np.cos(2), np.sin(2)], rtol=1e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_every_backend_gives_the_same_model_and_gradient(backend):
    config = dataclasses.replace(CONFIG, backend=backend)
    tokens = tokens_of(3, 8)

    def loss(state, config):
        logits, routed = nnx.merge(nnx.graphdef(make(config)), state)(tokens)
        return jnp.square(logits).mean() + routed.stats.prob_sums[0, 0]

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(nnx.state(make()), config)
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(nnx.state(make()), CONFIG)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected_gradient)


def test_is_causal_and_sequences_do_not_mix():
    model, tokens = make(), tokens_of(2, 10)
    changed = tokens.at[0, 6:].set((tokens[0, 6:] + 1) % CONFIG.vocab_size)
    before, _ = apply(model, tokens)
    after, _ = apply(model, changed)
    np.testing.assert_allclose(after[0, :6], before[0, :6], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)
    assert jnp.abs(after[0, 6:] - before[0, 6:]).max() > 1e-2


def test_masked_tokens_are_inert():
    model, tokens = make(), tokens_of(2, 10)
    mask = jnp.arange(10)[None, :] < jnp.array([[10], [6]])
    garbage = jnp.where(mask, tokens, 0)
    first, second = apply(model, tokens, mask), apply(model, garbage, mask)
    np.testing.assert_allclose(first[0][mask], second[0][mask], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first[1].stats, second[1].stats)
    np.testing.assert_array_equal(first[1].stats.num_tokens, [16.0] * 3)


def test_routing_output_has_a_leading_layer_axis_and_conserves_assignments():
    _, routed = apply(make(), tokens_of(3, 8), trace="full")
    assert routed.plan.expert_ids.shape == (3, 24, 2) and routed.logits.shape == (3, 24, 5)
    np.testing.assert_array_equal(routed.stats.chosen.sum(-1), [48.0] * 3)


def test_trace_off_costs_nothing():
    """Asking for no trace lowers to the same program as throwing the trace away."""
    tokens, state = tokens_of(1, 4), nnx.state(make())
    graphdef = nnx.graphdef(make())

    def program(trace):
        def logits_only(state, tokens):
            return nnx.merge(graphdef, state)(tokens, trace=trace)[0]

        text = jax.jit(logits_only).lower(state, tokens).compile().as_text()
        operations = text[text.index("\n%") :]  # past the tables of source positions
        return re.sub(r", metadata=\{[^}]*\}|stack_frame_id=\d+", "", operations)

    assert program("off") == program("full")


def test_topology_population_equals_candidates_one_by_one():
    model, tokens = make(), tokens_of(2, 7)
    rng = np.random.default_rng(0)
    keep, num_choices = rng.random((3, 3, 5)) < 0.6, rng.integers(1, 3, (3, 3))
    keep[..., 0] = True
    together, _ = apply(
        model, jnp.tile(tokens, (3, 1)), None, population_topology(keep, num_choices), jnp.repeat(jnp.arange(3), 2)
    )
    for p in range(3):
        alone, _ = apply(model, tokens, None, single_topology(keep[p], num_choices[p]))
        np.testing.assert_allclose(together[2 * p : 2 * p + 2], alone, atol=1e-5)
    full, _ = apply(model, tokens, None, full_topology(3, 5, 2))
    np.testing.assert_allclose(full, apply(model, tokens)[0], atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_layers_can_be_run_in_two_parts(cut):
    model, tokens = make(), tokens_of(2, 6)
    topology = single_topology(np.eye(5, dtype=bool)[[0, 1, 2]], [1, 1, 1])
    whole, routed = model.run_layers(model.embed(tokens), 0, 5, topology=topology)
    half, before = model.run_layers(model.embed(tokens), 0, cut, topology=topology)
    rest, after = model.run_layers(half, cut, 5, topology=topology)
    np.testing.assert_allclose(rest, whole, atol=1e-5)
    counts = [part.stats.chosen for part in (before, after) if part.stats is not None]
    np.testing.assert_array_equal(jnp.concatenate(counts), routed.stats.chosen)


def test_population_of_models_is_a_vmap_over_keys():
    graphdef = nnx.graphdef(make())
    states = jax.vmap(lambda key: nnx.state(Decoder(CONFIG, key=key)))(jax.random.split(jax.random.key(0), 3))
    tokens = tokens_of(2, 5)
    together = jax.vmap(lambda state: nnx.merge(graphdef, state)(tokens)[0])(states)
    alone = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[2], states))(tokens)[0]
    np.testing.assert_allclose(together[2], alone, atol=1e-5)


def test_capacity_drops_are_counted():
    config = dataclasses.replace(CONFIG, capacity_factor=0.5)
    _, routed = apply(make(config), tokens_of(4, 8))
    np.testing.assert_array_equal(routed.stats.kept.max(-1) <= 7, True)  # ceil(.5 * 32 * 2 / 5) = 7
    np.testing.assert_array_equal(
        routed.stats.dropped_capacity, routed.stats.chosen.sum(-1) - routed.stats.kept.sum(-1)
    )
    assert routed.stats.dropped_capacity.min() > 0


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    model = make(config)
    logits, _ = apply(model, tokens_of(2, 6))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, apply(make(), tokens_of(2, 6))[0], atol=0.2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 18, "width=18 must be num_heads=4"),
        ("num_kv_heads", 3, "must be a multiple of num_kv_heads=3"),
        ("num_choices", 6, r"num_choices must be in \[1, 5\] for 5 experts, got 6"),
        ("layers", (), "non-empty tuple"),
        ("layers", ("moe", "sparse"), "'dense' and 'moe'"),
    ],
)
def test_impossible_shapes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_unknown_names_are_refused_when_the_model_is_made():
    with pytest.raises(ValueError, match="unknown routing rule"):
        make(dataclasses.replace(CONFIG, rule="best"))
    with pytest.raises(ValueError, match="backend"):
        make(dataclasses.replace(CONFIG, backend="best"))


def test_dense_settings_are_of_dense_layers_and_shared_experts():
    sizes = {"width": 8, "num_heads": 2, "num_kv_heads": 1, "dense_hidden": 6, "expert_hidden": 5, "shared_hidden": 7}
    config = DecoderConfig(layers=("dense", "moe"), dense_settings={"use_bias": True}, **sizes)
    dense, sparse = (stack.feed_forward for stack in make(config).stacks)
    assert dense.experts.b_in.shape == (1, 1, 12)
    assert sparse.shared.experts.b_out.shape == (1, 1, 8)
    assert not hasattr(sparse.experts, "b_in")
    with pytest.raises(ValueError, match="has no setting 'bias'"):
        DecoderConfig(dense_settings={"bias": True})
