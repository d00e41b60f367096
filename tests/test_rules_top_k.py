"""The score functions by hand, and where they are steep or flat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, normalize, route, score

# softmax of logs is the numbers over their sum; sigmoid(log x) = x / (1 + x); softplus(log x) = log(1 + x).
BY_HAND = {
    "softmax": [0.2, 0.3, 0.5],
    "sigmoid": [2 / 3, 3 / 4, 5 / 6],
    "sqrt_softplus": [np.log(3) ** 0.5, np.log(4) ** 0.5, np.log(6) ** 0.5],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_by_hand(name):
    logits = jnp.log(jnp.array([[2.0, 3.0, 5.0]]))
    np.testing.assert_allclose(score(name, logits, None), [BY_HAND[name]], rtol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_of_extreme_logits_have_finite_gradients(name):
    logits = jnp.array([[-500.0, -80.0, 0.0, 80.0, 500.0]])
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(normalize(score(name, z, None)) ** 2))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_sqrt_softplus_top_k_by_hand():
    # sqrt(log 4) = 1.1774 and sqrt(log 6) = 1.3386 add up to 2.5160.
    plan = route(jnp.log(jnp.array([[2.0, 3.0, 5.0]])), RULES["sqrt_softplus_top_k"], num_choices=2).plan
    np.testing.assert_array_equal(plan.expert_ids, [[2, 1]])
    np.testing.assert_allclose(plan.gates, [[0.53203, 0.46797]], atol=1e-5)


@pytest.mark.parametrize(("by_logits", "chosen"), [(False, 0), (True, 2)])
def test_saturated_scores_tie_and_logits_do_not(by_logits, chosen):
    # 1 / (1 + e^-20) and 1 / (1 + e^-30) are both 1 in float32.
    rule = get_rule("sigmoid_top_k", by_logits=by_logits)
    plan = route(jnp.array([[20.0, 0.0, 30.0]]), rule, num_choices=1).plan
    np.testing.assert_array_equal(plan.expert_ids, [[chosen]])


def test_choice_by_logits_equals_choice_by_scores_where_no_score_saturates():
    logits = jax.random.normal(jax.random.key(0), (20, 8))
    plans = [
        route(logits, get_rule("sigmoid_top_k", by_logits=by_logits), num_choices=3).plan for by_logits in (False, True)
    ]
    np.testing.assert_array_equal(plans[0].expert_ids, plans[1].expert_ids)
    np.testing.assert_array_equal(plans[0].gates, plans[1].gates)


def test_a_sum_below_the_least_is_not_divided_by():
    # The bias chooses the expert of probability 1 / 101; over 1 / 50 its gate is 50 / 101, and without a least sum 1.
    logits, bias = jnp.log(jnp.array([[100.0, 1.0]])), jnp.array([0.0, 1.0])
    for least, gate in ((0.0, 1.0), (0.02, 50 / 101), (1e-3, 1.0)):
        rule = get_rule("softmax_top_k_renormalized", least_sum=least)
        plan = route(logits, rule, num_choices=1, bias=bias).plan
        np.testing.assert_array_equal(plan.expert_ids, [[1]])
        np.testing.assert_allclose(plan.gates, [[gate]], rtol=1e-6)


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match="unknown score function 'relu'; known: softmax, sigmoid, sqrt_softplus"):
        score("relu", jnp.zeros((1, 2)), None)
