"""Routing by uncertainty: what each measure calls hard, by hand."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route
from moe_jax.types import Topology
from tests.oracles import route_loop, uncertainty
from tests.random_routing import NUM_EXPERTS, as_arrays, random_constraints, random_logits


def counts(rule, logits, level, **given):
    plan = route(jnp.asarray(logits), rule, num_choices=2, level=jnp.float32(level), **given).plan
    return (np.asarray(plan.expert_ids) < plan.num_experts).sum(1).tolist()


def test_the_two_measures_by_hand():
    # Free energies: -log 2 = -.69, -(3 + log 2) = -3.69, about -3.0. Entropies, as shares of log 2: 1, 1, about .02.
    # Adding 3 to all logits of a token makes it known to the one and leaves it undecided to the other.
    logits = [[0.0, 0.0], [3.0, 3.0], [3.0, -3.0]]
    assert counts(RULES["free_energy_top_k"], logits, -2.0) == [2, 1, 1]
    assert counts(RULES["free_energy_top_k"], logits, -3.5) == [2, 1, 2]
    assert counts(RULES["entropy_top_k"], logits, 0.5) == [2, 2, 1]
    assert counts(RULES["entropy_top_k"], logits, 0.01) == [2, 2, 2]
    assert counts(get_rule("entropy_top_k", few=2), logits, 0.5) == [2, 2, 2]


def test_entropy_is_a_share_of_what_the_open_experts_allow():
    layer = Topology(jnp.array([[True, True, False, False]]), jnp.array([2], jnp.int32))
    assert counts(RULES["entropy_top_k"], [[1.0, 1.0, 9.0, 9.0]], 0.99, topology=layer) == [2]
    alone = Topology(jnp.array([[True, False, False, False]]), jnp.array([2], jnp.int32))
    assert counts(RULES["entropy_top_k"], [[1.0, 1.0, 9.0, 9.0]], 0.0, topology=alone) == [1]


@pytest.mark.parametrize(
    ("rule", "measure", "start"),
    [("free_energy_top_k", uncertainty.free_energy, -2.5), ("entropy_top_k", uncertainty.entropy, 0.6)],
)
def test_other_settings_equal_the_loop(rule, measure, start):
    logits, oracle = random_logits(20), partial(uncertainty.spend, uncertainty=measure, few=2)
    for constraints in ({}, random_constraints(21)):
        plan = route(logits, get_rule(rule, few=2, start=start), num_choices=4, **constraints).plan
        given = as_arrays(constraints) if constraints else {}
        ids, gates, _ = route_loop(oracle, logits, 4, level=start, fixed_count=False, **given)
        np.testing.assert_array_equal(plan.expert_ids, ids)
        np.testing.assert_allclose(plan.gates, gates, atol=1e-6)
        assert constraints or set((ids < NUM_EXPERTS).sum(1).tolist()) == {2, 4}  # both easy and hard tokens


def test_more_experts_for_easy_tokens_than_for_hard_ones_are_refused():
    with pytest.raises(ValueError, match=r"few must be in \[1, 2\], the num_choices of a hard token; got 3"):
        counts(get_rule("entropy_top_k", few=3), np.zeros((2, 4)), 0.5)
