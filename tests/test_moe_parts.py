"""What may join the routed experts of a layer: shared, latent and zero-compute ones, against a loop over tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.dispatch import BACKENDS
from moe_jax.losses import cross_entropy
from moe_jax.models.decoder import Decoder
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.experts import EXPERTS, ExpertKind, lift
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers import LinearRouter
from moe_jax.nn.zero_compute import ZeroComputeExperts, mix_zero_compute, without_zero_compute
from moe_jax.routing import full_topology
from moe_jax.types import RoutingPlan
from tests.expert_oracle import NETWORKS, sigmoid
from tests.tiny_model import TINY

E, D, LATENT, F, K = 3, 6, 4, 5, 2
KINDS = ("zero", "copy", "constant", "constant")
X = np.random.default_rng(0).normal(size=(2, 7, D)).astype(np.float32)
MASK = np.arange(7)[None, :] < np.array([[7], [4]])


def make_layer(kind="gpt_oss", *, shared=False, latent=False, zero_compute=False, **options):
    """A layer with the parts asked for and no parameter at zero."""
    keys = jax.random.split(jax.random.key(0), 5)
    zeros = ZeroComputeExperts(KINDS, D, key=keys[0]) if zero_compute else None
    layer = MoELayer(
        LinearRouter(D, E + len(KINDS) * zero_compute, key=keys[1]),
        ExpertStack(E, LATENT if latent else D, F, kind=kind, key=keys[2]),
        shared=FeedForward(D, F + 1, kind=kind, is_gated=True, key=keys[3]) if shared else None,
        latent=Latent(D, LATENT, key=keys[4]) if latent else None,
        zero_compute=zeros,
        num_choices=K,
        **options,
    )
    rng = np.random.default_rng(1)
    params = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, jnp.float32), params))
    return layer


@jax.jit
def run(layer, x, token_mask=None, topology=None):
    return layer(x, token_mask, topology)


def leaf(variable):
    return np.asarray(variable[...], np.float64)


def weights_of(stack, index):
    return {name: np.asarray(value, np.float64)[index] for name, value in stack.parameters(jnp.float32).items()}


def layer_loop(layer, x, token_mask):
    """One token at a time in float64: the output, and how often each column was chosen."""
    network = NETWORKS[layer.experts.kind, ()]
    x = np.asarray(x, np.float64)
    y, chosen = np.zeros_like(x), np.zeros(layer.num_experts)
    for position in np.argwhere(token_mask):
        token = x[tuple(position)]
        exps = np.exp(token @ leaf(layer.router.kernel))
        best = np.argsort(-exps)[:K]
        chosen[best] += 1
        routed, out = 0.0, np.zeros(D)
        for e in best:
            gate = exps[e] / exps[best].sum()
            if e < E:
                row = token if layer.latent is None else token @ leaf(layer.latent.down)
                routed = routed + gate * network(weights_of(layer.experts, e), row)
            elif KINDS[e - E] == "copy":
                out += gate * token
            elif KINDS[e - E] == "constant":
                n = KINDS[: e - E].count("constant")
                a, b = np.exp(token @ leaf(layer.zero_compute.weights)[n])
                out += gate * (a * token + b * leaf(layer.zero_compute.bias)[n]) / (a + b)
        if not np.isscalar(routed):
            out += routed if layer.latent is None else routed @ leaf(layer.latent.up)
        if layer.shared is not None:
            gate = sigmoid(token @ leaf(layer.shared.gate))
            out += gate * network(weights_of(layer.shared.experts, 0), token)
        y[tuple(position)] = out
    return y, chosen


PARTS = {
    "shared": {"shared": True},
    "latent": {"latent": True},
    "zero-compute": {"zero_compute": True},
    "all": {"shared": True, "latent": True, "zero_compute": True},
}


@pytest.mark.parametrize("parts", PARTS)
def test_layer_equals_the_loop(parts):
    layer = make_layer(**PARTS[parts])
    y, routed = run(layer, X, MASK)
    expected, chosen = layer_loop(layer, X, MASK)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_array_equal(y[~MASK], 0)  # although the experts have biases
    np.testing.assert_array_equal(routed.stats.chosen, chosen)
    np.testing.assert_array_equal(routed.stats.num_tokens, 11)
    assert routed.plan.num_experts == len(chosen) == layer.num_experts


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_every_backend_gives_the_same_output_and_gradient(backend):
    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grad(graphdef, state, x):
        def loss(state, x):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x, MASK)[0]))

        return jax.value_and_grad(loss, argnums=(0, 1))(state, x)

    (graphdef, state), dense = (nnx.split(make_layer(**PARTS["all"], backend=name)) for name in (backend, "dense"))
    actual, expected = value_and_grad(graphdef, state, X), value_and_grad(*dense, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), actual, expected)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(nnx.filter_state(expected[1][0], nnx.Param)))


def test_gradient_equals_finite_differences():
    layer = make_layer(**PARTS["all"])
    direction = np.random.default_rng(2).normal(size=X.shape)

    @jax.jit
    def slope(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(layer(x)[0] * direction))(x) * direction)

    everywhere = np.ones(MASK.shape, bool)
    up, down = (layer_loop(layer, X + step * direction, everywhere)[0] for step in (1e-6, -1e-6))
    np.testing.assert_allclose(slope(X), np.sum((up - down) * direction) / 2e-6, rtol=1e-4)


def test_zero_compute_by_hand():
    # Experts: one that computes, then zero, copy, constant with W = 0, so that x and v = (4, 0) have half each.
    # Token (1, 2), gates 0.5 copy and 0.25 constant: 0.5 (1, 2) + 0.25 (0.5 (1, 2) + 0.5 (4, 0)) = (1.125, 1.25).
    # Token (3, 3), gates 0.9 zero and 0.1 for the one that computes: nothing here.
    plan = RoutingPlan(jnp.array([[2, 3], [1, 0]]), jnp.array([[0.5, 0.25], [0.9, 0.1]]), 4, None)
    tokens, v, w = jnp.array([[1.0, 2.0], [3.0, 3.0]]), jnp.array([[4.0, 0.0]]), jnp.zeros((1, 2, 2))
    y = mix_zero_compute(tokens, plan, ("zero", "copy", "constant"), v, w)
    np.testing.assert_allclose(y, [[1.125, 1.25], [0.0, 0.0]], rtol=1e-6)
    rest = without_zero_compute(plan, 1)
    np.testing.assert_array_equal(rest.expert_ids, [[1, 1], [1, 0]])
    np.testing.assert_allclose(rest.gates, [[0, 0], [0, 0.1]])
    assert rest.num_experts == 1


def test_null_experts_need_no_parameters():
    """The rule of AdaMoE over two columns of kind "zero" is what it is over a stack with two experts never read."""
    rule = {"num_choices": K, "rule": "null_experts", "rule_settings": {"num_null": 2}}
    router = LinearRouter(D, E + 2, key=jax.random.key(1))
    whole = ExpertStack(E + 2, D, F, key=jax.random.key(2))
    part = ExpertStack(E, D, F, key=jax.random.key(2))
    part.w_in[...], part.w_out[...] = whole.w_in[:E], whole.w_out[:E]
    zeros = ZeroComputeExperts(("zero",) * 2, D, key=jax.random.key(0))
    slim, routed = run(MoELayer(router, part, zero_compute=zeros, **rule), X, MASK)
    wide, _ = run(MoELayer(router, whole, **rule), X, MASK)
    np.testing.assert_allclose(slim, wide, atol=1e-6)
    assert routed.stats.chosen[E:].min() > 0
    with pytest.raises(ValueError, match=r"'null_experts' ignores the last 2 columns, so these of .* must be 'zero'"):
        make_layer(zero_compute=True, rule="null_experts", rule_settings={"num_null": 2})


def test_topology_covers_zero_compute_experts():
    layer = make_layer(zero_compute=True)
    only_zeros = jax.tree.map(lambda x: x[0], full_topology(1, E + len(KINDS), K))
    only_zeros = dataclasses.replace(only_zeros, keep=only_zeros.keep.at[:, :E].set(False))
    _, routed = run(layer, X, None, only_zeros)
    np.testing.assert_array_equal(routed.stats.chosen[:E], 0)
    np.testing.assert_array_equal(routed.stats.chosen.sum(), 14 * K)
    too_narrow = jax.tree.map(lambda x: x[0], full_topology(1, E, K))
    with pytest.raises(ValueError, match=r"topology.keep \(1, 3\) must end in the 7 experts of the logits"):
        run(layer, X, None, too_narrow)


def test_bfloat16_stays_near():
    layer = make_layer(**PARTS["all"])
    y, _ = run(layer, X.astype(jnp.bfloat16), MASK)
    assert y.dtype == jnp.bfloat16
    expected, _ = layer_loop(layer, X.astype(jnp.bfloat16), MASK)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())


def scaled_tanh(params, rows):
    return params["scale"][None] * jnp.tanh(rows @ params["w"])


def draw_scaled_tanh(key, num_experts, width, hidden, output_scale):
    w = jax.random.normal(key, (num_experts, width, width)) * width**-0.5
    return {"w": w, "scale": jnp.full((num_experts, width), output_scale)}


OPTIONS = {
    "soft": {"expert": "gpt_oss", "rule": "soft", "allow_noncausal": True},
    "mlp": {"expert": "mlp", "expert_settings": {"activation": "relu", "use_bias": True}},
    "gpt_oss": {"expert": "gpt_oss"},
    "deep": {"expert": "deep", "expert_settings": {"num_layers": 3}},
    "one's own": {"expert": "scaled_tanh"},
    "sizes": {"expert_hidden_sizes": (6, 4, 2, 2)},
    "gated shared": {"shared_hidden": 5, "shared_gate": True},
    "latent": {"latent_width": 8},
    "zero-compute": {"zero_compute": ("zero", "copy", "constant")},
    "all": {
        "expert": "relu2",
        "shared_hidden": 5,
        "shared_gate": True,
        "latent_width": 8,
        "zero_compute": ("copy", "copy", "constant"),
        "num_choices": 5,
        "backend": "blocked",
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_decoder_of_each_option_learns(option, monkeypatch):
    """One step of gradient descent: finite gradients, every parameter has one, and the loss falls."""
    monkeypatch.setitem(EXPERTS, "scaled_tanh", lambda: ExpertKind(lift(scaled_tanh), draw_scaled_tanh))
    config = dataclasses.replace(TINY, layers=("moe",), **OPTIONS[option])
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, config.vocab_size)

    quick = {"xla_backend_optimization_level": 0}  # compiled once, run twice

    @jax.jit(compiler_options=quick)
    def loss_and_grad(model):
        def loss(model):
            return cross_entropy(model(tokens[:, :-1])[0], tokens[:, 1:]).mean()

        return jax.value_and_grad(loss)(model)

    model = jax.jit(lambda key: Decoder(config, key=key), compiler_options=quick)(jax.random.key(0))
    loss, gradient = loss_and_grad(model)
    grads = nnx.filter_state(nnx.state(gradient), nnx.Param)
    assert all(jnp.isfinite(leaf).all() and jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
    assert loss_and_grad(model)[0] < loss - 0.01


def test_parts_leave_the_other_draws_alone():
    """The stack, the router and the attention of a config start alike whatever joins them."""
    plain, joined = (
        Decoder(dataclasses.replace(TINY, **extra), key=jax.random.key(0)) for extra in ({}, {"shared_hidden": 5})
    )
    before, after = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (plain, joined))
    assert set(after) - set(before) and not set(before) - set(after)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path][...], value[...])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": "swish"}, "unknown expert kind 'swish'"),
        ({"expert_settings": {"use_bias": True, "clamp": 7}}, "'swiglu' has no setting 'clamp'"),
        ({"shared_gate": True}, "shared_gate=True has nothing to gate: give shared_hidden"),
        ({"num_choices": 6, "zero_compute": ("zero",)}, r"num_choices must be in \[1, 5\] for 5 experts, got 6"),
        ({"rule": "soft", "shared_hidden": 5, "allow_noncausal": True}, "rule='soft' goes without shared, latent and"),
        ({"latent_width": 0}, "latent_width must be at least 1, got 0"),
        (
            {"zero_compute": ("nothing",)},
            r"zero_compute=\('nothing',\) must name at least one of: zero, copy, constant",
        ),
        ({"expert_hidden_sizes": (7, 1, 1, 1)}, r"hidden_sizes=\(7, 1, 1, 1\) must be one width in \[1, 6\]"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(dataclasses.replace(TINY, **changes), key=jax.random.key(0))
