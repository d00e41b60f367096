"""Null experts: by hand, how they are counted, and what balance makes of the number of true experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.losses import load_balancing_loss
from moe_jax.routing import get_rule, move_bias_by_sign, route
from tests.oracles import null_experts, route_loop
from tests.random_routing import NUM_EXPERTS, as_arrays, random_constraints, random_logits


def test_by_hand():
    # Columns 2 and 3 are null. The first token takes 0 and 2 of (.4, .1, .3, .2), the second only nulls.
    logits = jnp.log(jnp.array([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 5.0, 3.0]]))
    for name, gate in (("null_experts", 0.4), ("null_experts_renormalized", 1.0)):
        output = route(logits, get_rule(name, num_null=2), num_choices=2)
        np.testing.assert_array_equal(output.plan.expert_ids, [[0, 4], [4, 4]])
        np.testing.assert_allclose(output.plan.gates, [[gate, 0.0], [0.0, 0.0]], rtol=1e-6)
        # One choice of expert 0, and three of null experts, shared by both of them.
        np.testing.assert_allclose(output.stats.chosen, [1.0, 0.0, 1.5, 1.5])
        np.testing.assert_array_equal(output.stats.kept, [1.0, 0.0, 0.0, 0.0])
        assert output.stats.dropped_capacity == 0 and output.stats.dropped_topology == 0


def test_gates_of_the_true_experts_sum_to_one_in_the_renormalised_form():
    plan = route(random_logits(3), get_rule("null_experts_renormalized", num_null=4), num_choices=2).plan
    has_expert = (plan.expert_ids < NUM_EXPERTS).any(1)
    assert 0 < has_expert.sum() < len(has_expert)
    np.testing.assert_allclose(plan.gates.sum(1), has_expert, atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
def test_several_null_experts_equal_the_loop(renormalize):
    logits, constraints = random_logits(20), random_constraints(21)
    rule = get_rule("null_experts", num_null=3, renormalize=renormalize)
    output = route(logits, rule, num_choices=4, capacity=2, **constraints)
    oracle = partial(null_experts.null_experts, num_null=3, renormalize=renormalize)
    ids, gates, stats = route_loop(
        oracle, logits, 4, capacity=2, fixed_count=False, num_null=3, **as_arrays(constraints)
    )
    np.testing.assert_array_equal(output.plan.expert_ids, ids)
    np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
    for name in ("chosen", "kept", "prob_sums", "gate_sums", "dropped_capacity"):
        np.testing.assert_allclose(getattr(output.stats, name), stats[name], rtol=2e-5, atol=2e-5, err_msg=name)
    assert stats["dropped_capacity"] > 0


def test_the_balance_loss_is_adamoes():
    """Switch's, with the load of every null expert replaced by their mean (2406.13233), one token at a time."""
    logits, num_null, k = random_logits(5), 2, 3
    stats = route(logits, get_rule("null_experts", num_null=num_null), num_choices=k).stats
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    load = np.zeros(NUM_EXPERTS)
    for row in p:
        for e in np.argsort(-row)[:k]:
            load[e] += 1
    load[-num_null:] = load[-num_null:].mean()
    np.testing.assert_allclose(
        load_balancing_loss(stats), NUM_EXPERTS * np.sum(load / (k * len(p)) * p.mean(0)), rtol=1e-5
    )


def test_balance_gives_each_column_its_share_so_the_mean_number_of_true_experts_is_known():
    # 8 columns, 4 of them null, K = 4: two true experts a token at balance. The router begins with hardly any.
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(512, 8)) + 2.0 * (np.arange(8) >= 4), jnp.float32)
    rule = get_rule("null_experts", num_null=4)

    def step(bias, _):
        stats = route(logits, rule, num_choices=4, bias=bias).stats
        return move_bias_by_sign(bias, stats, rate=0.003), stats.kept.sum() / stats.num_tokens

    counts = np.asarray(jax.jit(lambda bias: jax.lax.scan(step, bias, length=200))(jnp.zeros(8))[1])
    assert counts[0] < 1.0
    np.testing.assert_allclose(counts[-20:].mean(), 2.0, rtol=0.05)


def test_some_expert_must_be_true():
    with pytest.raises(ValueError, match=r"num_null must be in \[0, 5\] for 6 columns, got 6"):
        route(random_logits(0), get_rule("null_experts", num_null=6), num_choices=2)
