"""Attention heads as experts against a loop over tokens, experts, heads and keys, and what they must not see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.attention_experts import AttentionExperts
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers import LinearRouter
from moe_jax.types import RoutingPlan

E, K, D, H, DH, B, S = 4, 2, 10, 3, 4, 2, 6
X = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]], bool)


def make_experts(seed=0):
    return AttentionExperts(E, D, H, DH, key=jax.random.key(seed))


def random_plan(num_tokens=B * S):
    """Two of {expert 0..3, empty} per token, experts distinct; masked tokens have none."""
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((num_tokens, E + 1)), axis=1)[:, :K]
    ids[~MASK.reshape(-1)] = E
    gates = np.where(ids < E, rng.random(ids.shape), 0)
    return RoutingPlan(jnp.asarray(ids, jnp.int32), jnp.asarray(gates, jnp.float32), E, None)


def rotated(vector, position):
    half = len(vector) // 2
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attention_loop(experts, x, expert_ids, gates, mask):
    """`[B, S, D]` in float64, one token, expert, head and key at a time."""
    x = np.asarray(x, np.float64)
    query, key_value, out = (
        np.asarray(getattr(experts, name)[...], np.float64) for name in ("query", "key_value", "out")
    )
    y = np.zeros_like(x)
    for b, t, k in np.ndindex(B, S, K):
        e = expert_ids[b * S + t, k]
        if e == E:
            continue
        for h in range(H):
            q = rotated(x[b, t] @ query[e, :, h], t)
            weights, mixed = 0.0, np.zeros(DH)
            for s in range(t + 1):
                if mask[b, s]:
                    weight = np.exp(q @ rotated(x[b, s] @ key_value[:, 0, h], s) / np.sqrt(DH))
                    weights, mixed = weights + weight, mixed + weight * (x[b, s] @ key_value[:, 1, h])
            y[b, t] += gates[b * S + t, k] * mixed / weights @ out[e, h]
    return y


@functools.partial(jax.jit, static_argnames="dispatch")
def value_and_grads(experts, x, plan, dispatch):
    """The output, and the gradients of a scalar of it for parameters, input and gates."""

    def scalar(experts, x, gates):
        y = experts.mix(x, RoutingPlan(plan.expert_ids, gates, E, plan.capacity), dispatch, MASK)
        return jnp.sum(jnp.sin(y)), y

    return jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(experts, x, plan.gates)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_equals_the_loop_on_every_backend(backend):
    experts, plan = make_experts(), random_plan()
    grads, y = value_and_grads(experts, X, plan, BACKENDS[backend])
    expected = attention_loop(experts, X, np.asarray(plan.expert_ids), np.asarray(plan.gates, np.float64), MASK)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    dense, _ = value_and_grads(experts, X, plan, BACKENDS["dense"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, dense)


def test_gradient_equals_finite_differences():
    experts, plan = make_experts(), random_plan()
    ids, gates = np.asarray(plan.expert_ids), np.asarray(plan.gates, np.float64)
    (_, x_grad, gates_grad), _ = value_and_grads(experts, X, plan, BACKENDS["dense"])
    direction = np.random.default_rng(2).normal(size=X.shape)

    def scalar(x, gates):
        return np.sin(attention_loop(experts, x, ids, gates, MASK)).sum()

    slope = (scalar(X + 1e-6 * direction, gates) - scalar(X - 1e-6 * direction, gates)) / 2e-6
    np.testing.assert_allclose(np.sum(x_grad * direction), slope, rtol=1e-4)
    change = np.where(ids < E, np.random.default_rng(3).normal(size=ids.shape), 0)
    slope = (scalar(X, gates + 1e-6 * change) - scalar(X, gates - 1e-6 * change)) / 2e-6
    np.testing.assert_allclose(np.sum(gates_grad * change), slope, rtol=1e-4)


def test_one_expert_of_gate_one_is_attention():
    """K = E = 1: multi-head attention, whatever the router says."""
    experts = AttentionExperts(1, D, H, DH, key=jax.random.key(0))
    layer = MoELayer(LinearRouter(D, 1, key=jax.random.key(1)), experts, num_choices=1)
    y, _ = jax.jit(lambda layer, x: layer(x))(layer, X)
    query = np.einsum("bsd,dhk->bhsk", X, experts.query[0])
    key, value = np.einsum("bsd,dahk->abhsk", X, experts.key_value[...])
    turn = np.vectorize(rotated, signature="(k),()->(k)")
    scores = np.einsum("bhsk,bhtk->bhst", turn(query, np.arange(S)), turn(key, np.arange(S))) / np.sqrt(DH)
    weights = np.where(np.tri(S, dtype=bool), np.exp(scores), 0)
    mixed = np.einsum("bhst,bhtk->bhsk", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(y, np.einsum("bhsk,hkd->bsd", mixed, experts.out[0]), atol=1e-5)


def make_layer(rule="top_k_softmax"):
    router = LinearRouter(D, E, key=jax.random.key(1))
    return MoELayer(router, make_experts(), num_choices=K, rule=rule, backend="gather")


@jax.jit
def run(layer, x, mask):
    return layer(x, mask)


def test_layer_routes_and_counts():
    y, routed = run(make_layer(), X, MASK)
    np.testing.assert_array_equal(routed.stats.chosen.sum(), K * MASK.sum())
    np.testing.assert_allclose(routed.plan.gates.sum(1), MASK.reshape(-1), rtol=1e-6)
    plan = routed.plan
    expected = attention_loop(make_experts(), X, np.asarray(plan.expert_ids), np.asarray(plan.gates), MASK)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(y[~MASK], 0)


def test_sees_neither_the_future_nor_masked_tokens_nor_other_sequences():
    layer = make_layer()
    before, _ = run(layer, X, MASK)
    changed = X.copy()
    changed[0, 4:] += 1.0
    after, _ = run(layer, changed, MASK)
    np.testing.assert_allclose(after[0, :4], before[0, :4], atol=1e-6)
    np.testing.assert_allclose(after[1], before[1], atol=1e-6)
    assert np.abs(after[0, 4:] - before[0, 4:]).max() > 0.1
    garbage = np.where(MASK[:, :, None], X, 100.0)
    np.testing.assert_allclose(run(layer, garbage, MASK)[0], before, atol=1e-6)


def test_bfloat16_and_a_population():
    def first(key):
        experts = AttentionExperts(E, D, H, DH, key=key)
        return experts.mix(X.astype(jnp.bfloat16), random_plan(), BACKENDS["gather"], MASK)

    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(first))(keys)
    assert together.dtype == jnp.bfloat16
    experts, plan = AttentionExperts(E, D, H, DH, key=keys[1]), random_plan()
    expected = attention_loop(experts, X, np.asarray(plan.expert_ids), np.asarray(plan.gates), MASK)
    np.testing.assert_allclose(together[1].astype(jnp.float32), expected, atol=0.03)


def test_parameters_have_a_gradient():
    layer = make_layer()
    grads = jax.jit(jax.grad(lambda layer: jnp.sum(layer(X, MASK)[0] ** 2)))(layer)
    leaves = jax.tree.leaves(nnx.state(grads, nnx.Param))
    assert len(leaves) == 4 and all(jnp.any(leaf != 0) for leaf in leaves)
