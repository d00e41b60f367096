"""Routing against a loop oracle, hand-worked values and the invariants of each rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import (
    RULES,
    drop_over_capacity,
    expert_capacity,
    full_topology,
    get_rule,
    keep_trace,
    population_topology,
    route,
    single_topology,
    update_bias,
)
from moe_jax.types import RouterStats, Topology
from tests.routing_oracle import route_loop

NUM_EXPERTS = 6


def choices_of(rule):
    return RULES[rule].fixed_choices or 3


def random_logits(seed, num_tokens=17):
    return np.random.default_rng(seed).normal(size=(num_tokens, NUM_EXPERTS)).astype(np.float32) * 2


def random_constraints(seed, num_tokens=17):
    """A topology of three groups (one of them nearly closed), masked tokens and a selection bias."""
    rng = np.random.default_rng(seed)
    keep = rng.random((3, NUM_EXPERTS)) < 0.6
    keep[0] = np.arange(NUM_EXPERTS) == 2
    return {
        "topology": Topology(jnp.asarray(keep), jnp.asarray([3, 1, 2], jnp.int32)),
        "token_groups": jnp.asarray(rng.integers(0, 3, num_tokens), jnp.int32),
        "token_mask": jnp.asarray(rng.random(num_tokens) < 0.8),
        "bias": jnp.asarray(rng.normal(size=NUM_EXPERTS), jnp.float32) * 0.3,
    }


def assert_equals_oracle(output, expected):
    ids, gates, stats = expected
    np.testing.assert_array_equal(output.plan.expert_ids, ids)
    np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
    for name, value in stats.items():
        np.testing.assert_allclose(getattr(output.stats, name), value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_loop(rule, constrained, capacity):
    logits, k = random_logits(0), choices_of(rule)
    constraints = random_constraints(1) if constrained else {}
    routed = jax.jit(functools.partial(route, rule=RULES[rule], num_choices=k, capacity=capacity))
    output = routed(logits, **constraints)
    oracle = {}
    if constrained:
        groups = np.asarray(constraints["token_groups"])
        oracle = {
            "is_open": np.asarray(constraints["topology"].keep)[groups],
            "limit": np.asarray(constraints["topology"].num_choices)[groups],
            "token_mask": np.asarray(constraints["token_mask"]),
            "bias": np.asarray(constraints["bias"]),
        }
    assert_equals_oracle(output, route_loop(logits, rule, k, capacity=capacity, **oracle))


def test_gates_by_hand():
    # softmax of (log 5, log 3, log 2) is (.5, .3, .2): the two best weigh .5 and .3, or 5/8 and 3/8 renormalised.
    logits = jnp.log(jnp.array([[5.0, 3.0, 2.0]]))
    gates = {name: route(logits, RULES[name], num_choices=min(choices_of(name), 2)).plan.gates[0] for name in RULES}
    np.testing.assert_allclose(gates["softmax_top_k"], [0.5, 0.3], rtol=1e-6)
    np.testing.assert_allclose(gates["softmax_top_k_renormalized"], [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(gates["top_k_softmax"], [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(gates["switch_top_1"], [0.5], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_normalized_gates_sum_to_one_and_never_repeat_an_expert(rule):
    constraints = random_constraints(2)
    plan = route(random_logits(3), RULES[rule], num_choices=choices_of(rule), **constraints).plan
    routed = np.asarray(plan.expert_ids) < NUM_EXPERTS
    assert (np.asarray(plan.gates)[~routed] == 0).all()
    for row, ids in zip(routed, np.asarray(plan.expert_ids), strict=True):
        assert len(set(ids[row])) == row.sum()
    if RULES[rule].normalized:
        np.testing.assert_allclose(np.asarray(plan.gates).sum(-1), routed.any(-1), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_permuting_experts_permutes_the_plan(rule):
    logits, order = random_logits(4), np.random.default_rng(0).permutation(NUM_EXPERTS)
    plan = route(logits, RULES[rule], num_choices=choices_of(rule)).plan
    permuted = route(logits[:, order], RULES[rule], num_choices=choices_of(rule)).plan
    np.testing.assert_array_equal(order[np.asarray(permuted.expert_ids)], plan.expert_ids)
    np.testing.assert_allclose(permuted.gates, plan.gates, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_masked_tokens_change_nothing_for_the_others(rule):
    logits, mask = random_logits(5), np.arange(17) % 3 != 0
    garbage = np.where(mask[:, None], logits, 50.0 * random_logits(6))
    k, capacity = choices_of(rule), 3
    run = functools.partial(route, rule=RULES[rule], num_choices=k, token_mask=jnp.asarray(mask), capacity=capacity)
    jax.tree.map(np.testing.assert_array_equal, run(logits).stats, run(garbage).stats)
    np.testing.assert_array_equal(run(logits).plan.expert_ids, run(garbage).plan.expert_ids)
    assert (np.asarray(run(logits).plan.expert_ids)[~mask] == NUM_EXPERTS).all()


@pytest.mark.parametrize("rule", RULES)
def test_full_topology_is_no_topology(rule):
    logits, k = random_logits(7), choices_of(rule)
    layer = jax.tree.map(lambda leaf: leaf[0], full_topology(1, NUM_EXPERTS, k))
    with_topology = route(logits, RULES[rule], num_choices=k, topology=layer)
    without = route(logits, RULES[rule], num_choices=k)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), with_topology, without)


@pytest.mark.parametrize("rule", RULES)
def test_population_as_groups_equals_one_topology_at_a_time(rule):
    rng, k = np.random.default_rng(8), choices_of(rule)
    keep, num_choices = rng.random((4, 1, NUM_EXPERTS)) < 0.7, rng.integers(1, k + 1, (4, 1))
    logits = random_logits(9, num_tokens=20)  # five tokens for each of four candidates
    layer = jax.tree.map(lambda leaf: leaf[0], population_topology(keep, num_choices))
    groups = jnp.repeat(jnp.arange(4), 5)
    together = route(logits, RULES[rule], num_choices=k, topology=layer, token_groups=groups)
    for p in range(4):
        alone = jax.tree.map(lambda leaf: leaf[0], single_topology(keep[p], num_choices[p]))
        plan = route(logits[5 * p : 5 * p + 5], RULES[rule], num_choices=k, topology=alone).plan
        np.testing.assert_array_equal(together.plan.expert_ids[5 * p : 5 * p + 5], plan.expert_ids)
        np.testing.assert_allclose(together.plan.gates[5 * p : 5 * p + 5], plan.gates, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_a_population_of_routers(rule):
    logits = np.stack([random_logits(seed) for seed in range(3)])
    run = functools.partial(route, rule=RULES[rule], num_choices=choices_of(rule), capacity=5)
    together = jax.vmap(run)(jnp.asarray(logits))
    for p in range(3):
        jax.tree.map(
            lambda a, b, p=p: np.testing.assert_allclose(a[p], b, rtol=1e-5, atol=1e-6), together, run(logits[p])
        )


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_the_gates_own_and_finite_under_constraints(rule):
    logits, constraints = random_logits(10), random_constraints(11)
    weights = jnp.asarray(np.random.default_rng(12).normal(size=(17, choices_of(rule))), jnp.float32)

    def value(logits):
        output = route(logits, RULES[rule], num_choices=choices_of(rule), **constraints)
        stats = output.stats
        return jnp.sum(weights * output.plan.gates) + stats.entropy_sum + stats.z_sum + stats.prob_sums[0]

    gradient = jax.grad(value)(jnp.asarray(logits))
    assert np.isfinite(gradient).all()
    direction = np.random.default_rng(13).normal(size=logits.shape).astype(np.float32)
    step = 1e-2  # selection does not flip within it at this seed; central differences in float32
    numeric = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=2e-2, atol=2e-2)


def test_no_open_expert_is_inert():
    closed = Topology(jnp.zeros((1, NUM_EXPERTS), bool), jnp.array([2], jnp.int32))
    output = route(random_logits(14), RULES["top_k_softmax"], num_choices=2, topology=closed)
    assert (output.plan.expert_ids == NUM_EXPERTS).all() and (output.plan.gates == 0).all()
    assert output.stats.dropped_topology == 34 and output.stats.z_sum == 0 and output.stats.entropy_sum == 0


def test_bias_moves_selection_but_not_gates():
    logits = jnp.log(jnp.array([[5.0, 3.0, 2.0]]))
    plan = route(logits, RULES["softmax_top_k"], num_choices=1, bias=jnp.array([0.0, 0.0, 0.4])).plan
    assert plan.expert_ids[0, 0] == 2  # .2 + .4 beats .5
    np.testing.assert_allclose(plan.gates, [[0.2]], rtol=1e-6)


def test_ties_go_to_the_lower_expert():
    plan = route(jnp.zeros((3, NUM_EXPERTS)), RULES["top_k_softmax"], num_choices=2).plan
    np.testing.assert_array_equal(plan.expert_ids, [[0, 1]] * 3)


def test_capacity_arithmetic_by_hand():
    assert expert_capacity(16, 4, 2, 1.0) == 8  # 16 tokens * 2 choices / 4 experts
    assert expert_capacity(16, 4, 2, 1.25) == 10
    assert expert_capacity(5, 4, 1, 1.0) == 2  # ceil(1.25)
    assert expert_capacity(3, 64, 1, 1.0) == 1
    assert expert_capacity(4, 2, 2, 8.0) == 4  # never more than T
    with pytest.raises(ValueError, match="capacity factor must be positive"):
        expert_capacity(4, 2, 2, 0.0)


def test_capacity_serves_first_choices_first():
    # Expert 0 is the second choice of token 0 and the first of tokens 1 and 2; with room for two, token 0 goes without.
    ids = jnp.array([[1, 0], [0, 1], [0, 2]], jnp.int32)
    np.testing.assert_array_equal(drop_over_capacity(ids, 3, 2), [[1, 3], [0, 1], [0, 2]])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), capacity=st.integers(1, 12))
def test_capacity_is_never_exceeded_and_drops_nobody_needlessly(seed, capacity):
    ids = np.random.default_rng(seed).integers(0, NUM_EXPERTS + 1, (12, 2)).astype(np.int32)
    kept = np.asarray(drop_over_capacity(jnp.asarray(ids), NUM_EXPERTS, capacity))
    for e in range(NUM_EXPERTS):
        assert (kept == e).sum() == min(capacity, (ids == e).sum())


def test_bias_update_by_hand():
    # loads (5, 1, 3) have mean 3: expert 0 goes down, expert 1 up, expert 2 stays; the shift's mean is 0 already.
    zeros = jnp.zeros(())
    stats = RouterStats(jnp.array([5.0, 1.0, 3.0]), jnp.zeros(3), jnp.zeros(3), *([zeros] * 6))
    np.testing.assert_allclose(update_bias(jnp.zeros(3), stats, 0.1), [-0.1, 0.1, 0.0], atol=1e-7)


def test_bias_update_balances_a_skewed_router():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(512, NUM_EXPERTS)) + np.linspace(0, 2, NUM_EXPERTS), jnp.float32)
    bias, rule = jnp.zeros(NUM_EXPERTS), RULES["softmax_top_k_renormalized"]

    @jax.jit
    def step(bias):
        stats = route(logits, rule, num_choices=2, bias=bias).stats
        return update_bias(bias, stats, 0.003), stats.chosen.max() / stats.chosen.mean()

    _, before = step(bias)
    for _ in range(200):
        bias, after = step(bias)
    assert before > 1.8 and after < 1.1


def test_trace_levels_keep_what_they_say():
    output = route(random_logits(15), RULES["top_k_softmax"], num_choices=2)
    kept = {
        level: [getattr(keep_trace(output, level), f) is not None for f in ("stats", "plan", "logits")]
        for level in ("off", "stats", "topk", "full")
    }
    assert kept == {
        "off": [False, False, False],
        "stats": [True, False, False],
        "topk": [True, True, False],
        "full": [True, True, True],
    }


def test_borders_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown routing rule 'top_2'; known: softmax_top_k"):
        get_rule("top_2")
    with pytest.raises(ValueError, match=r"num_choices must be in \[1, 6\]"):
        route(random_logits(0), RULES["top_k_softmax"], num_choices=7)
    with pytest.raises(ValueError, match="switch_top_1 routes to exactly 1 expert"):
        route(random_logits(0), RULES["switch_top_1"], num_choices=2)
    with pytest.raises(ValueError, match="needs token_groups"):
        layer = Topology(jnp.ones((2, NUM_EXPERTS), bool), jnp.ones(2, jnp.int32))
        route(random_logits(0), RULES["top_k_softmax"], num_choices=2, topology=layer)
    with pytest.raises(ValueError, match="unknown trace level 'all'"):
        keep_trace(route(random_logits(0), RULES["top_k_softmax"], num_choices=2), "all")
