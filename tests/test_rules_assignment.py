"""BASE and Sinkhorn: balance in training, the best experts at evaluation, gates from the raw logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import audit_causality
from moe_jax.routing import expert_capacity, get_rule, route
from moe_jax.types import Topology
from tests.oracles.assignment import exact_assignment
from tests.random_routing import NUM_EXPERTS, random_logits

GREEDY = {"base": "sigmoid_top_k", "sinkhorn": "softmax_top_k"}


def routed(rule, logits, num_choices=1, **arrays):
    return jax.jit(functools.partial(route, rule=rule, num_choices=num_choices))(logits, **arrays)


def loads(plan):
    return np.bincount(np.asarray(plan.expert_ids).ravel(), minlength=plan.num_experts + 1)[:-1]


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_the_token_that_loses_less_gives_way(name):
    # Both tokens prefer expert 0, by 2 and by 1: the sum 2 + 0 beats 0 + 1. The gates are sigmoid(2) and sigmoid(0).
    plan = routed(get_rule(name), jnp.array([[2.0, 0.0], [1.0, 0.0]]), 1).plan
    np.testing.assert_array_equal(plan.expert_ids, [[0], [1]])
    np.testing.assert_allclose(plan.gates, [[0.880797], [0.5]], rtol=1e-6)


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_greedy_evaluation_is_causal_and_needs_that_there_is_no_key(name):
    k = get_rule(name).only_choices or 2
    rule, logits = get_rule(name, greedy_evaluation=True), random_logits(0) + np.arange(NUM_EXPERTS, dtype=np.float32)
    greedy = routed(rule, logits, k).plan
    np.testing.assert_array_equal(greedy.expert_ids, routed(get_rule(GREEDY[name]), logits, k).plan.expert_ids)
    balanced = routed(get_rule(name), logits, k).plan
    np.testing.assert_array_equal(routed(rule, logits, k, key=jax.random.key(0)).plan.expert_ids, balanced.expert_ids)
    assert np.ptp(loads(balanced)) < np.ptp(loads(greedy))

    def ids_of(logits):  # [B, S, E]
        return route(logits.reshape(-1, NUM_EXPERTS), rule, num_choices=k).plan.expert_ids.reshape(3, 6, k)

    audit = audit_causality(ids_of, *(random_logits(s).reshape(3, 6, NUM_EXPERTS) for s in (0, 1)))
    assert audit.is_causal and audit.is_independent


@pytest.mark.parametrize("num_masked", [0, 1, 5])
def test_base_loads_differ_by_one_at_most_and_the_popular_have_more(num_masked):
    logits = random_logits(1, num_tokens=60) + np.arange(NUM_EXPERTS, dtype=np.float32)
    mask = np.arange(60) >= num_masked
    plan = routed(get_rule("base"), logits, token_mask=jnp.asarray(mask)).plan
    few = loads(plan) < 10  # 60, 59 or 55 tokens on 6 experts: 10 each, or 9 for one or five of them
    assert loads(plan).sum() == mask.sum() and loads(plan).min() >= 9 and few.sum() == num_masked
    popularity = np.bincount(logits[mask].argmax(1), minlength=NUM_EXPERTS)
    assert not few.any() or popularity[few].max() <= popularity[~few].min()
    capacity = expert_capacity(60, NUM_EXPERTS, 1, 1.0)
    dropping = functools.partial(route, rule=get_rule("base"), num_choices=1, capacity=capacity)
    assert jax.jit(dropping)(logits, token_mask=jnp.asarray(mask)).stats.dropped_capacity == 0


def test_base_is_near_the_exact_optimum():
    logits = random_logits(2, num_tokens=240)
    ids = np.asarray(routed(get_rule("base"), logits, 1).plan.expert_ids)[:, 0]
    exact = exact_assignment(logits, np.full(NUM_EXPERTS, 40), np.ones(logits.shape, bool))
    means = [logits[np.arange(240), experts].mean(dtype=np.float64) for experts in (ids, exact)]
    assert 0 <= means[1] - means[0] <= 1e-3 * np.ptp(logits)


def test_base_serves_every_token_even_where_balance_is_impossible():
    """Group 0 may only use expert 2, which has seats for a sixth of the tokens."""
    keep = jnp.stack([jnp.arange(NUM_EXPERTS) == 2, jnp.arange(NUM_EXPERTS) != 4])
    topology, groups = Topology(keep, jnp.array([1, 1])), jnp.arange(18) // 9
    output = routed(get_rule("base"), random_logits(3), 1, topology=topology, token_groups=groups)
    ids = np.asarray(output.plan.expert_ids)[:, 0]
    assert (ids[:9] == 2).all() and set(ids[9:]) <= {0, 1, 3, 5}
    assert output.stats.dropped_topology == 0


def test_a_single_open_expert_takes_all():
    topology = Topology(jnp.arange(NUM_EXPERTS)[None, :] == 3, jnp.array([1]))
    assert (routed(get_rule("base"), random_logits(3), 1, topology=topology).plan.expert_ids == 3).all()


def test_sinkhorn_gates_are_those_of_megatron_or_chosen():
    logits = random_logits(4)
    for k, name in ((1, "sigmoid"), (2, "softmax")):
        plan = routed(get_rule("sinkhorn"), logits, k).plan
        scores = {"sigmoid": jax.nn.sigmoid(logits), "softmax": jax.nn.softmax(logits)}[name]
        np.testing.assert_allclose(plan.gates, np.take_along_axis(scores, plan.expert_ids, 1), rtol=1e-6)
    forced = routed(get_rule("sinkhorn", score_function="sigmoid"), logits, 2).plan
    np.testing.assert_array_equal(forced.expert_ids, plan.expert_ids)
    np.testing.assert_allclose(forced.gates, np.take_along_axis(jax.nn.sigmoid(logits), plan.expert_ids, 1), rtol=1e-6)


def test_sharp_sinkhorn_is_base():
    """Without entropy, optimal transport is the assignment problem."""
    logits = random_logits(5)
    sinkhorn = routed(get_rule("sinkhorn", num_iterations=5000), 50 * logits, 1).plan
    np.testing.assert_array_equal(sinkhorn.expert_ids, routed(get_rule("base"), logits, 1).plan.expert_ids)


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_a_bias_of_whole_experts_is_balanced_away(name):
    logits, bias = random_logits(6), jnp.array([3.0, -2.0, 1.0, 0.0, 0.0, 5.0])
    plans = [routed(get_rule(name), logits, 1, bias=b).plan for b in (None, bias)]
    jax.tree.map(np.testing.assert_array_equal, *plans)
