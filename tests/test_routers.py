"""Every router module of the table against its oracle and against what all of them promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.analysis import audit_causality
from moe_jax.models.cost import part_cost
from moe_jax.models.decoder import Decoder
from moe_jax.nn.routers import ROUTERS, CosineRouter, LinearRouter, get_router
from moe_jax.ops.norms import l2_normalize
from moe_jax.training.step import LossConfig, init_state, make_train_step, merge_model
from tests.oracles.routers import ROUTER_ORACLES, softmax
from tests.tiny_model import TINY

B, S, D, E = 2, 7, 5, 6
SETTINGS = {
    "linear": {"use_bias": True, "temperature": 0.5},
    "cosine": {"prototype_width": 3},
    "mlp": {"hidden": 4},
    "attention": {},
    "hierarchical": {"num_groups": 3},
    "recurrent": {"hidden": 4},
    "load_aware": {"strength": 2.0, "decay": 0.7},
}
MASK = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1]], bool)
every_router = pytest.mark.parametrize("name", ROUTERS)


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)


def make(name, seed=0):
    """The router with all parameters drawn anew, those that start at zero too; a scale keeps its sign."""
    router = get_router(name, **SETTINGS[name])(D, E, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(router, nnx.Param)):
        value = jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        leaf[...] = 2 + abs(value) if path == ("scale",) else value
    return router


@jax.jit
def score(router, x, mask=None):
    return router(x, mask).logits


def parameters(router):
    return {
        path[0]: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(router, nnx.Param))
    }


def test_every_router_has_an_oracle_and_settings():
    assert set(ROUTER_ORACLES) == set(ROUTERS) == set(SETTINGS)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@every_router
def test_equals_the_loop(name, mask):
    router = make(name)
    logits = score(router, inputs(), mask)
    assert logits.shape == (B, S, E) and logits.dtype == jnp.float32
    for b in range(B):
        is_token = np.ones(S, bool) if mask is None else mask[b]
        expected = ROUTER_ORACLES[name](parameters(router), np.float64(inputs()[b]), is_token, **SETTINGS[name])
        np.testing.assert_allclose(logits[b][is_token], np.array(expected)[is_token], rtol=1e-4, atol=1e-5)


@every_router
def test_masked_tokens_change_nothing_for_the_others(name):
    router, garbage = make(name), np.where(MASK[..., None], inputs(), 50 * inputs(1))
    np.testing.assert_array_equal(score(router, inputs(), MASK)[MASK], score(router, garbage, MASK)[MASK])
    assert np.isfinite(score(router, inputs(), np.zeros_like(MASK))).all()


@every_router
def test_no_token_sees_a_later_one_or_another_sequence(name):
    audit = audit_causality(functools.partial(score, make(name)), inputs(), inputs(1))
    assert audit.is_causal and audit.is_independent


@every_router
def test_permuting_experts_permutes_the_logits(name):
    """Experts move within their group, and groups move, for the sake of the hierarchical router."""
    router, other = make(name), make(name)
    groups = np.array([2, 0, 1])
    order = np.concatenate([np.arange(2 * g, 2 * g + 2)[::-1] for g in groups])
    for path, leaf in nnx.to_flat_state(nnx.state(other, nnx.Param)):
        if path == ("group_kernel",):
            leaf[...] = leaf[...][:, groups]
        elif path == ("qkv",):
            leaf[...] = leaf[...].reshape(D, 3, E)[..., order].reshape(D, 3 * E)
        elif leaf.shape and leaf.shape[-1] == E:
            leaf[...] = leaf[...][..., order]
    np.testing.assert_allclose(score(other, inputs()), score(router, inputs())[..., order], rtol=1e-5, atol=1e-5)


@every_router
def test_gradients_equal_finite_differences(name):
    graphdef, state = nnx.split(make(name), nnx.Param)[:2]
    weights = np.random.default_rng(5).normal(size=(B, S, E)).astype(np.float32)
    weights *= MASK[..., None]

    @jax.jit
    def value(state, x):
        return jnp.sum(weights * nnx.merge(graphdef, state)(x, jnp.asarray(MASK)).logits)

    point = (state, jnp.asarray(inputs()))
    rng = np.random.default_rng(6)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), point)
    slope = optax.tree.vdot(jax.jit(jax.grad(value, argnums=(0, 1)))(*point), direction)
    step = 1e-2
    ahead, behind = (value(*jax.tree.map(lambda p, d, s=sign: p + s * step * d, point, direction)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-2, atol=1e-2)


@every_router
def test_a_population_is_a_vmap_over_keys(name):
    keys = jax.random.split(jax.random.key(1), 3)
    init = functools.partial(get_router(name, **SETTINGS[name]), D, E)
    population = jax.vmap(lambda key: init(key=key))(keys)
    together = jax.vmap(score, (0, None))(population, inputs())
    np.testing.assert_allclose(together[2], score(init(key=keys[2]), inputs()), rtol=1e-5, atol=1e-5)


@every_router
def test_bfloat16_is_computed_in_float32_and_defaults_draw_nothing(name):
    low = jnp.asarray(inputs(), jnp.bfloat16)
    np.testing.assert_array_equal(score(make(name), low), score(make(name), low.astype(jnp.float32)))
    router = get_router(name)(D, E, key=jax.random.key(0))
    scored = jax.jit(lambda router, key: router(low, key=key))(router, jax.random.key(1))
    assert scored.logits.dtype == jnp.float32 and scored.noise_scale is None
    np.testing.assert_array_equal(scored.logits, score(router, low))


FLOPS = {  # as the docstrings say
    "linear": 2 * D * E,
    "cosine": 2 * 3 * (D + E),
    "mlp": 2 * 4 * (D + E),
    "attention": 6 * D * E,
    "hierarchical": 2 * D * (E + 3),
    "recurrent": 2 * (D * E + 2 * D * 4 + 4 * E),
    "load_aware": 2 * D * E,
}


@every_router
def test_flops_are_what_the_docstring_says(name):
    assert part_cost(nnx.to_pure_dict(nnx.state(make(name), nnx.Param))).flops == FLOPS[name]


@every_router
def test_a_decoder_with_it_trains(name):
    config = dataclasses.replace(TINY, layers=("moe",), router=name)
    optimizer = optax.sgd(0.1)
    graphdef, state = init_state(lambda key: Decoder(config, key=key), jax.random.key(0), optimizer)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 6)).astype(np.int32)
    mask = np.arange(6)[None, :] < np.array([[6], [4], [6]])
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig(), jax.random.key(1)))
    after, metrics = step(state, tokens, mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    before, after = (parameters(merge_model(graphdef, s).stacks[0].feed_forward.router) for s in (state, after))
    still = [key for key in before if (before[key] == after[key]).all()]
    assert still == (["w_in"] if name == "recurrent" else [])  # since its w_out starts at zero


def test_the_linear_router_is_drawn_as_ever_and_the_adaptive_ones_start_as_it():
    key = jax.random.key(3)
    linear = LinearRouter(D, E, key=key)
    np.testing.assert_array_equal(linear.kernel[...], jax.random.normal(key, (D, E)) * D**-0.5)
    np.testing.assert_array_equal(linear(inputs()).logits, inputs() @ linear.kernel[...])
    assert set(parameters(linear)) == {"kernel"}
    for adaptive in (get_router("recurrent"), get_router("load_aware", strength=0.0)):
        np.testing.assert_array_equal(score(adaptive(D, E, key=key), inputs()), score(linear, inputs()))


def test_jitter_and_input_noise():
    """With x = 1 and W = identity the logits are the disturbed x itself."""
    x, key = jnp.ones((50, 40, 4)), jax.random.key(0)

    def disturbed(**settings):
        router = LinearRouter(4, 4, **settings, key=key)
        router.kernel[...] = jnp.eye(4)
        assert (router(x).logits == 1).all()
        return np.asarray(router(x, key=jax.random.key(1)).logits)

    jittered = disturbed(jitter=0.1)
    assert 0.9 <= jittered.min() < 0.901 and 1.099 < jittered.max() <= 1.1
    noisy = disturbed(input_noise=0.2)
    # 8000 normal draws: the mean's standard error is 0.2 / sqrt(8000) = 0.0022, that of the deviation 0.0016.
    np.testing.assert_allclose([noisy.mean(), noisy.std()], [1, 0.2], atol=0.01)
    both = disturbed(jitter=0.1, input_noise=0.2)
    np.testing.assert_allclose(both - 1, (jittered - 1) + (noisy - 1), atol=1e-6)


def test_learned_noise_starts_at_log_2_and_follows_the_token():
    router = LinearRouter(2, 2, learned_noise=True, temperature=2.0, key=jax.random.key(0))
    x = jnp.array([[[1.0, 0.0]]])
    np.testing.assert_allclose(router(x).noise_scale, np.full((1, 1, 2), np.log(2) / 2), rtol=1e-6)
    router.noise_kernel[...] = jnp.array([[1.0, -1.0], [5.0, 5.0]])
    # softplus(1) = log(1 + e) = 1.3133, softplus(-1) = 0.3133; the temperature halves noise as it halves logits.
    np.testing.assert_allclose(router(x).noise_scale, [[[0.65663, 0.15663]]], rtol=1e-4)


def test_cosine_by_hand_and_at_zero():
    router = CosineRouter(2, 2, prototype_width=2, temperature=0.5, key=jax.random.key(0))
    router.projection[...], router.prototypes[...] = jnp.eye(2), jnp.array([[3.0, 0.0], [3.0, -7.0]])
    # (0, 4) makes 45 degrees with (3, 3) and 180 with (0, -7); the scale is 1 / 0.5.
    np.testing.assert_allclose(score(router, jnp.array([[[0.0, 4.0]]])), [[[np.sqrt(2), -2]]], rtol=1e-6)
    router.prototypes[...] = jnp.zeros((2, 2))
    slopes = jax.jit(jax.grad(lambda *given: score(*given).sum(), argnums=(0, 1)))(router, jnp.zeros((1, 1, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_l2_normalize():
    # |(3, 4)| = 5, and the same along the other axis; far from 1 nothing over- or underflows into NaN.
    np.testing.assert_allclose(l2_normalize(jnp.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(l2_normalize(jnp.array([[3.0], [4.0]]), axis=0), [[0.6], [0.8]], rtol=1e-6)
    value_and_slope = jax.jit(jax.value_and_grad(lambda x: l2_normalize(x)[0, 0]))
    for size in (0.0, 1e-30, 1e-13, 1e-12, 1e-6, 1e15):
        assert all(np.isfinite(leaf).all() for leaf in value_and_slope(size * jnp.array([[3.0, 4.0]])))
    assert l2_normalize(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(("width", "num_experts"), [(128, 16), (768, 64), (7168, 256), (8, 2), (3, 1)])
def test_the_mlp_has_the_flops_of_a_linear_router_to_half_a_unit(width, num_experts):
    router = jax.eval_shape(lambda: get_router("mlp")(width, num_experts, key=jax.random.key(0)))
    flops = part_cost(nnx.to_pure_dict(nnx.state(router, nnx.Param))).flops
    hidden = router.w_in.shape[1]
    assert flops == 2 * hidden * (width + num_experts)
    assert abs(flops - 2 * width * num_experts) <= width + num_experts or hidden == 1


def test_attention_by_hand():
    """Two experts with queries (1, 0), keys (0, log 3) and values (4, 8)."""
    router = get_router("attention")(1, 2, key=jax.random.key(0))
    router.qkv[...] = jnp.array([[1.0, 0.0, 0.0, np.log(3), 4.0, 8.0]])
    # Expert 0 attends with softmax(0, log 3) = (1/4, 3/4): 1 + 6 = 7. Expert 1's query is 0, so evenly: 2 + 4 = 6.
    np.testing.assert_allclose(score(router, jnp.ones((1, 1, 1))), [[[7, 6]]], rtol=1e-6)


def test_softmax_of_the_hierarchical_logits_is_the_product_of_both_levels():
    router = make("hierarchical")
    params, p = parameters(router), jax.nn.softmax(score(router, inputs()))
    for b, s in np.ndindex(B, S):
        groups = softmax(inputs()[b, s] @ params["group_kernel"])
        for g in range(3):
            inside = softmax(inputs()[b, s] @ params["kernel"][:, 2 * g : 2 * g + 2])
            np.testing.assert_allclose(p[b, s, 2 * g : 2 * g + 2], np.multiply(groups[g], inside), rtol=1e-4)


def test_recurrent_by_hand():
    """One state with gate 1/2 and candidate x: after (2, masked, 4) it is 1, 1 and 1/2 + 2."""
    router = get_router("recurrent", hidden=1)(1, 1, key=jax.random.key(0))
    router.kernel[...], router.w_in[...], router.w_out[...] = (
        jnp.zeros((1, 1)),
        jnp.array([[0.0, 1.0]]),
        jnp.ones((1, 1)),
    )
    x, mask = jnp.array([[[2.0], [np.nan], [4.0]]]), jnp.array([[True, False, True]])
    np.testing.assert_allclose(score(router, x, mask)[0, ::2, 0], [1, 2.5], rtol=1e-6)


def test_load_aware_by_hand():
    """A token of wishes (log 3, 0) goes 3/4 and 1/4; with decay 1/2 the load of (1/2, 1/2) becomes (5/8, 3/8)."""
    router = get_router("load_aware", strength=1.0, decay=0.5)(1, 2, key=jax.random.key(0))
    router.kernel[...] = jnp.array([[np.log(3), 0.0]])
    # The second token's logits lose 2 * 5/8 - 1 = 1/4 and gain as much.
    expected = [[[np.log(3), 0], [np.log(3) - 0.25, 0.25]]]
    np.testing.assert_allclose(score(router, jnp.ones((1, 2, 1))), expected, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 18.0])
def test_a_load_aware_router_settles_where_load_and_wishes_agree(strength):
    """All tokens alike, wishes w: it ends at p = softmax(w - strength E p), as below a strength of 19 at decay 0.9."""
    router = get_router("load_aware", strength=strength, decay=0.9)(D, E, key=jax.random.key(0))
    x = jnp.broadcast_to(inputs()[:1, :1], (1, 400, D))
    p = np.asarray(jax.nn.softmax(score(router, x)[0, -1]))
    wishes = x[0, -1] @ router.kernel[...]
    np.testing.assert_allclose(p, jax.nn.softmax(wishes - strength * E * p), rtol=1e-4)
    even = np.abs(E * p - 1).max() < np.abs(E * jax.nn.softmax(wishes) - 1).max() / (1 + strength / 2)
    assert even and p.max() > 1 / E


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("linear", {"temperature": 0.0}, "temperature=0.0 must be positive"),
        ("linear", {"jitter": 1.0}, r"jitter=1.0 in \[0, 1\)"),
        ("linear", {"input_noise": -0.1}, "input_noise=-0.1 not negative"),
        ("cosine", {"temperature": -1.0}, "temperature=-1.0 must be positive"),
        ("mlp", {"hidden": -1}, "hidden=-1 must be"),
        ("hierarchical", {"num_groups": 4}, "num_groups=4 must divide num_experts=6"),
        ("recurrent", {"hidden": 0}, "hidden=0 must be at least 1"),
        ("load_aware", {"decay": 1.0}, r"decay=1.0 must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_router(name, **settings)(D, E, key=jax.random.key(0))


def test_unknown_names_and_bad_values_are_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="unknown router 'best'; known: linear, cosine"):
        dataclasses.replace(TINY, router="best")
    with pytest.raises(ValueError, match=r"router 'mlp' has no setting 'depth'; it has: hidden"):
        dataclasses.replace(TINY, router="mlp", router_settings={"depth": 2})
    with pytest.raises(ValueError, match=r"router 'attention' has no setting 'key'; it has: none"):
        dataclasses.replace(TINY, router="attention", router_settings={"key": 2})
    with pytest.raises(ValueError, match="num_groups=3 must divide num_experts=4"):
        dataclasses.replace(TINY, router="hierarchical", router_settings={"num_groups": 3})
    assert hash(dataclasses.replace(TINY, router="mlp", router_settings={"hidden": 3}))
