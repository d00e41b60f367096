"""Batch-prioritised routing: with room for some, the surest tokens are served."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import audit_causality
from moe_jax.routing import RULES, get_rule, route

RULE = RULES["batch_prioritised_top_k"]


def test_the_largest_gate_is_served_first():
    # Three tokens want expert 0 with gates .5, .7 and .6.
    logits = jnp.log(jnp.array([[5.0, 3.0, 2.0], [7.0, 2.0, 1.0], [6.0, 2.0, 2.0]]))
    for capacity, served in {1: [3, 0, 3], 2: [3, 0, 0], 3: [0, 0, 0]}.items():
        plan = route(logits, RULE, num_choices=1, capacity=capacity).plan
        np.testing.assert_array_equal(plan.expert_ids[:, 0], served)
    by_position = route(logits, RULES["softmax_top_k"], num_choices=1, capacity=1).plan
    np.testing.assert_array_equal(by_position.expert_ids[:, 0], [0, 3, 3])


@pytest.mark.parametrize(("priority", "served"), [("max", [[0, 1], [4, 2]]), ("sum", [[4, 1], [0, 2]])])
def test_the_sum_of_gates_can_order_otherwise(priority, served):
    # Both want 0 first: token 0 with gates .50 and .20, token 1 with .45 and .40, whose sums are .70 and .85.
    logits = jnp.log(jnp.array([[0.50, 0.20, 0.15, 0.15], [0.45, 0.08, 0.40, 0.07]]))
    rule = get_rule("batch_prioritised_top_k", priority=priority)
    np.testing.assert_array_equal(route(logits, rule, num_choices=2, capacity=1).plan.expert_ids, served)


def test_every_first_choice_is_served_before_any_second():
    # Expert 0 is the sure token's second choice and the unsure token's first.
    logits = jnp.log(jnp.array([[0.35, 0.60, 0.05], [0.40, 0.25, 0.35]]))
    plan = route(logits, RULE, num_choices=2, capacity=1).plan
    np.testing.assert_array_equal(plan.expert_ids, [[1, 3], [0, 2]])


@pytest.mark.parametrize(("rule", "is_causal"), [("softmax_top_k", True), ("batch_prioritised_top_k", False)])
def test_under_a_capacity_it_sees_the_future_even_of_its_own_sequence_with_one_choice(rule, is_causal):
    def ids_of(logits):
        run = functools.partial(route, rule=RULES[rule], num_choices=1, capacity=2)
        return run(logits.reshape(-1, 4)).plan.expert_ids.reshape(1, 9)

    inputs = np.random.default_rng(0).normal(size=(2, 1, 9, 4)).astype(np.float32)
    assert audit_causality(ids_of, *inputs).is_causal == is_causal


def test_unknown_priorities_are_refused():
    with pytest.raises(ValueError, match="unknown priority 'mean'; known: max, sum"):
        route(jnp.zeros((1, 2)), get_rule("batch_prioritised_top_k", priority="mean"), num_choices=1)
