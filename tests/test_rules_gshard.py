"""GShard's top-2: how often the second expert is used, and how its absence is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route

NUM_TOKENS = 20_000
# softmax (.5, .3, .2): of the best two the gates are 5/8 and 3/8, so the second is used with probability 3/4.
LOGITS = jnp.tile(jnp.log(jnp.array([[5.0, 3.0, 2.0]])), (NUM_TOKENS, 1))


def train(logits, seed=0, **arguments):
    return route(logits, RULES["gshard_top_2"], num_choices=2, key=jax.random.key(seed), **arguments)


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_both_experts_serve_in_evaluation_and_under_the_policy_all(key):
    rule = RULES["gshard_top_2"] if key is None else get_rule("gshard_top_2", second_policy="all")
    plan = route(LOGITS[:3], rule, num_choices=2, key=key).plan
    np.testing.assert_array_equal(plan.expert_ids, [[0, 1]] * 3)
    np.testing.assert_allclose(plan.gates, [[0.625, 0.375]] * 3, rtol=1e-6)


def test_the_second_expert_is_used_twice_as_often_as_its_gate_says():
    plan = train(LOGITS).plan
    is_used = np.asarray(plan.expert_ids[:, 1]) == 1
    assert abs(is_used.mean() - 0.75) < 0.0125  # four standard deviations of 20,000 draws
    assert (np.asarray(plan.expert_ids[:, 0]) == 0).all()
    np.testing.assert_allclose(plan.gates[:, 0], 0.625, rtol=1e-6)  # also where it serves alone
    np.testing.assert_allclose(plan.gates[:, 1], np.where(is_used, 0.375, 0.0), rtol=1e-6)


def test_an_equal_second_expert_is_always_used():
    tied = jnp.tile(jnp.array([[1.0, 1.0, -1.0]]), (NUM_TOKENS, 1))
    assert (train(tied).plan.expert_ids[:, 1] == 1).all()


def test_what_is_left_out_is_no_drop_and_takes_no_place():
    # Every token wants 0 first; with room for half of the tokens, first choices fill expert 0 and half of them are
    # dropped. Expert 1 has room for half of the tokens, and three quarters of them ask.
    stats = train(LOGITS, capacity=NUM_TOKENS // 2).stats
    assert stats.dropped_topology == 0
    assert stats.chosen[0] == NUM_TOKENS and 0.73 < stats.chosen[1] / NUM_TOKENS < 0.77
    np.testing.assert_array_equal(stats.kept, [NUM_TOKENS // 2, NUM_TOKENS // 2, 0])
    assert stats.dropped_capacity == stats.chosen.sum() - NUM_TOKENS


def test_gates_of_used_experts_have_the_gradient_of_evaluation():
    plan = train(LOGITS[:50]).plan

    def first_gates(logits, key):
        return route(logits, RULES["gshard_top_2"], num_choices=2, key=key).plan.gates[:, 0].sum()

    assert (plan.expert_ids[:, 1] == 3).any()
    train_gradient, gradient = (jax.grad(first_gates)(LOGITS[:50], key) for key in (jax.random.key(0), None))
    np.testing.assert_allclose(train_gradient, gradient, rtol=1e-6)


# Tokens that want (0, 1), (0, 2) and (0, 1), with gates 5/8 and 3/8; the second is the surest of its first choice.
PROBABILITIES = jnp.array([[0.5, 0.3, 0.2], [0.625, 0.0, 0.375], [0.5, 0.3, 0.2]])


def short(**settings):
    """One row for each expert."""
    rule = get_rule("gshard_top_2", **settings)
    return route(jnp.log(PROBABILITIES + 1e-9), rule, num_choices=2, capacity=1)


def test_what_capacity_drops_can_go_to_the_other_expert():
    # Expert 0 takes token 0, then as second choices expert 1 takes token 0 and expert 2 token 1; token 2 gets nothing.
    ids = [[0, 1], [3, 2], [3, 3]]
    for settings, gates in (
        ({}, [[0.625, 0.375], [0, 0.375], [0, 0]]),
        ({"scale": 0.8}, [[0.5, 0.3], [0, 0.3], [0, 0]]),
        ({"redistribute": True}, [[0.625, 0.375], [0, 1], [0, 0]]),
        ({"redistribute": True, "scale": 0.8}, [[0.5, 0.3], [0, 0.8], [0, 0]]),
    ):
        output = short(**settings)
        np.testing.assert_array_equal(output.plan.expert_ids, ids)
        np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
        assert output.stats.dropped_capacity == 3


def test_the_surest_token_can_be_served_first():
    np.testing.assert_array_equal(short(by_priority=True).plan.expert_ids, [[3, 1], [0, 2], [3, 3]])


def test_scale_leaves_the_second_experts_frequency():
    plan = route(LOGITS, get_rule("gshard_top_2", scale=0.5), num_choices=2, key=jax.random.key(0)).plan
    np.testing.assert_array_equal(plan.expert_ids, train(LOGITS).plan.expert_ids)
    np.testing.assert_allclose(plan.gates, train(LOGITS).plan.gates / 2, rtol=1e-6)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="unknown second_policy 'sampling'; known: random, all"):
        route(LOGITS[:1], get_rule("gshard_top_2", second_policy="sampling"), num_choices=2)
