"""Rules that use every expert that is good enough: by hand, other settings, and what is wrong with the fixed one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route
from tests.oracles import route_loop, threshold
from tests.oracles.top_k import softmax
from tests.random_routing import NUM_EXPERTS, as_arrays, random_constraints, random_logits


def chosen_by(rule, logits, level=None, num_choices=3):
    """The experts and gates of one token."""
    plan = jax.jit(partial(route, rule=rule, num_choices=num_choices))(jnp.asarray([logits]), level=level).plan
    filled = np.asarray(plan.expert_ids[0]) < len(logits)
    return np.asarray(plan.expert_ids[0])[filled].tolist(), np.asarray(plan.gates[0])[filled]


@pytest.mark.parametrize(
    ("level", "experts"), [(0.0, [0]), (0.45, [0]), (0.55, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2])]
)
def test_top_p_by_hand(level, experts):
    # Probabilities (.5, .3, .2) sum to .5, .8, 1; renormalised over two: 5/8 and 3/8.
    logits = np.log([5.0, 3.0, 2.0])
    ids, gates = chosen_by(RULES["top_p"], logits, jnp.float32(level))
    assert ids == experts
    np.testing.assert_allclose(gates, np.array([0.5, 0.3, 0.2])[experts], rtol=1e-6)
    _, gates = chosen_by(get_rule("top_p", renormalize=True), logits, jnp.float32(level))
    np.testing.assert_allclose(gates.sum(), 1.0, rtol=1e-6)
    assert chosen_by(RULES["top_p"], logits, jnp.float32(level), num_choices=2)[0] == experts[:2]


@pytest.mark.parametrize(("level", "experts"), [(0.2, [1, 0, 2]), (0.5, [1, 0]), (0.8, [1]), (0.95, [1])])
def test_threshold_by_hand(level, experts):
    # Sigmoids of (1, 2, -1) are .731, .881, .269; the best is taken even below the level.
    logits = np.array([1.0, 2.0, -1.0])
    ids, gates = chosen_by(RULES["threshold"], logits, jnp.float32(level))
    assert ids == experts
    np.testing.assert_allclose(gates, np.array([0.7310586, 0.8807971, 0.2689414])[experts], rtol=1e-6)
    assert chosen_by(RULES["threshold"], logits, jnp.float32(level), num_choices=1)[0] == [1]


def test_a_bias_moves_the_order_of_top_p_and_not_its_gates():
    bias = jnp.array([0.0, 0.0, 0.4])  # .2 + .4 is best, but counts as the .2 that it is: below .25, so one more
    plan = route(jnp.log(jnp.array([[5.0, 3.0, 2.0]])), RULES["top_p"], num_choices=3, level=0.25, bias=bias).plan
    np.testing.assert_array_equal(plan.expert_ids, [[2, 0, 3]])
    np.testing.assert_allclose(plan.gates, [[0.2, 0.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "settings", "oracle"),
    [
        (
            "threshold",
            {"score_function": "softmax", "renormalize": True, "start": 0.15},
            partial(threshold.threshold, score=softmax, renormalize=True),
        ),
        ("top_p", {"renormalize": True, "start": 0.8}, partial(threshold.top_p, renormalize=True)),
        ("fixed_threshold", {"minimum": 0.1}, partial(threshold.fixed_threshold, minimum=0.1)),
    ],
)
def test_other_settings_equal_the_loop(rule, settings, oracle):
    logits, constraints = random_logits(20), random_constraints(21)
    output = route(logits, get_rule(rule, **settings), num_choices=5, **constraints)
    level = settings.get("start", 0.0)
    ids, gates, stats = route_loop(oracle, logits, 5, level=level, fixed_count=False, **as_arrays(constraints))
    np.testing.assert_array_equal(output.plan.expert_ids, ids)
    np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
    np.testing.assert_allclose(output.stats.entropy_sum, stats["entropy_sum"], rtol=1e-5)
    counts = (ids < NUM_EXPERTS).sum(1)
    assert len(set(counts.tolist())) >= 3  # the case tells counts apart


def test_three_gates_can_pass_the_fixed_threshold_and_four_never():
    # 4 * .3 > 1. A third each is the fullest: three experts, of at most four.
    ids, gates = chosen_by(RULES["fixed_threshold"], np.log([1.0, 1.0, 1.0, 1e-6]), num_choices=4)
    assert ids == [0, 1, 2] and (gates > 0.3).all()
    assert chosen_by(RULES["fixed_threshold"], np.zeros(4), num_choices=4)[0] == []  # flat: nobody
    for sd in (0.1, 1.0, 3.0, 10.0):
        logits = sd * np.random.default_rng(0).normal(size=(2000, 8))
        plan = route(jnp.asarray(logits), RULES["fixed_threshold"], num_choices=4).plan
        assert (plan.expert_ids < 8).sum(1).max() <= 3


@pytest.mark.parametrize(
    ("num_experts", "sd", "share"),
    [(8, 1, 0.356), (16, 1, 0.783), (64, 1, 0.994), (8, 2, 0.051), (16, 2, 0.201), (64, 2, 0.603)],
)
def test_share_of_tokens_that_the_fixed_threshold_leaves_without_expert(num_experts, sd, share):
    logits = sd * np.random.default_rng(1).normal(size=(20_000, num_experts))
    plan = route(jnp.asarray(logits), RULES["fixed_threshold"], num_choices=4).plan
    without = (plan.expert_ids == num_experts).all(1).mean()
    # Of 20,000 draws the standard error is .0035 at most; the shares in the docstring are of a million.
    np.testing.assert_allclose(without, share, atol=0.015)
