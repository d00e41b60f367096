"""Group-limited top-k: which groups count, and that nothing outside of them is reached."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route
from moe_jax.types import RoutingInputs
from tests.oracles import group_limited, route_loop
from tests.random_routing import as_arrays, random_constraints, random_logits

NAMES = ("group_limited_softmax_top_k", "group_limited_sigmoid_top_k")


def test_a_group_counts_by_its_best_or_by_its_best_two():
    # Groups {0, 1} and {2, 3}: the best expert is 0, but 2 and 3 together weigh .55 against .45.
    logits = jnp.log(jnp.array([[0.40, 0.05, 0.30, 0.25]]))
    by_best = route(logits, RULES["group_limited_softmax_top_k"], num_choices=2).plan
    np.testing.assert_array_equal(by_best.expert_ids, [[0, 1]])
    np.testing.assert_allclose(by_best.gates, [[0.40, 0.05]], rtol=1e-6)
    rule = get_rule("group_limited_softmax_top_k", group_score="top_2_sum", scale=2.0)
    by_two = route(logits, rule, num_choices=2).plan
    np.testing.assert_array_equal(by_two.expert_ids, [[2, 3]])
    np.testing.assert_allclose(by_two.gates, [[0.60, 0.50]], rtol=1e-6)


def test_the_bias_moves_groups_and_experts_but_not_gates():
    # Sigmoids .8, .5 and .6, .5: the first group has 1.3 against 1.1, but the bias lifts the second to 1.5.
    logits = jnp.log(jnp.array([[4.0, 1.0, 1.5, 1.0]]))
    rule, bias = RULES["group_limited_sigmoid_top_k"], jnp.array([0.0, 0.0, 0.0, 0.4])
    plan = route(logits, rule, num_choices=2, bias=bias).plan
    np.testing.assert_array_equal(plan.expert_ids, [[3, 2]])
    np.testing.assert_allclose(plan.gates, [[5 / 11, 6 / 11]], rtol=1e-6)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("num_groups", "open_groups"), [(3, 2), (6, 4), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_other_settings_equal_the_loop(name, num_groups, open_groups, constrained):
    settings = {"num_groups": num_groups, "open_groups": open_groups}
    logits, constraints = random_logits(0), random_constraints(1) if constrained else {}
    output = route(logits, get_rule(name, **settings), num_choices=3, **constraints)
    oracle = functools.partial(getattr(group_limited, name), **settings)
    ids, gates, stats = route_loop(oracle, logits, 3, **(as_arrays(constraints) if constrained else {}))
    np.testing.assert_array_equal(output.plan.expert_ids, ids)
    np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
    np.testing.assert_allclose(output.stats.dropped_topology, stats["dropped_topology"])


def test_a_closed_group_is_not_picked_for_a_bias_below_zero():
    # Group {2, 3} is closed and would count 0; group {0, 1} counts less than that, but it is open.
    is_open = jnp.array([[True, True, False, False]])
    bias = jnp.array([-2.0, -2.0, 0.0, 0.0])
    rule = RULES["group_limited_sigmoid_top_k"]
    choice = rule.choose(RoutingInputs(jnp.zeros((1, 4)), is_open=is_open, bias=bias), 2)
    np.testing.assert_array_equal(choice.expert_ids, [[0, 1]])


@pytest.mark.parametrize(
    ("name", "num_experts", "open_groups", "num_choices"), [(NAMES[0], 160, 3, 6), (NAMES[1], 256, 4, 8)]
)
def test_at_published_settings_tokens_stay_in_their_groups(name, num_experts, open_groups, num_choices):
    logits = np.random.default_rng(0).normal(size=(200, num_experts)).astype(np.float32)
    rule = get_rule(name, num_groups=8, open_groups=open_groups)
    ids = np.asarray(route(logits, rule, num_choices=num_choices).plan.expert_ids)
    visited = [len(set(row // (num_experts // 8))) for row in ids]
    free = [len(set(row // (num_experts // 8))) for row in np.argsort(-logits)[:, :num_choices]]
    assert (ids < num_experts).all() and max(visited) <= open_groups < max(free)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 4}, r"num_groups=4 does not divide the 6 experts"),
        ({"open_groups": 3}, r"open_groups must be in \[1, 2\] for 2 groups, got 3"),
        ({"num_groups": 3}, r"open_groups=1 of num_groups=3 leave a token 2 of 6 experts, fewer than num_choices=3"),
        ({"group_score": "mean"}, r"unknown group_score 'mean'; known: max, top_2_sum"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        route(random_logits(0), get_rule(NAMES[0], **settings), num_choices=3)
