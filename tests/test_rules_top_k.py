"""The score functions by hand, and where they are steep or flat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, normalize, route, score

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


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match="unknown score function 'relu'; known: softmax, sigmoid, sqrt_softplus"):
        score("relu", jnp.zeros((1, 2)), None)
