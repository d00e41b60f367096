"""Routing around the rules: hand-worked gates, capacity, balance by bias, trace levels and borders."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import (
    RULES,
    drop_over_capacity,
    expert_capacity,
    keep_trace,
    route,
)
from moe_jax.types import Topology
from tests.random_routing import NUM_EXPERTS, choices_of, random_logits


def test_gates_by_hand():
    # softmax of (log 5, log 3, log 2) is (.5, .3, .2): the two best weigh .5 and .3, or 5/8 and 3/8 renormalised.
    logits = jnp.log(jnp.array([[5.0, 3.0, 2.0]]))
    names = ("softmax_top_k", "softmax_top_k_renormalized", "top_k_softmax", "switch_top_1")
    gates = {name: route(logits, RULES[name], num_choices=min(choices_of(name), 2)).plan.gates[0] for name in names}
    np.testing.assert_allclose(gates["softmax_top_k"], [0.5, 0.3], rtol=1e-6)
    np.testing.assert_allclose(gates["softmax_top_k_renormalized"], [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(gates["top_k_softmax"], [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(gates["switch_top_1"], [0.5], rtol=1e-6)


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
    with pytest.raises(ValueError, match=r"num_choices must be in \[1, 6\]"):
        route(random_logits(0), RULES["top_k_softmax"], num_choices=7)
    with pytest.raises(ValueError, match="routes to exactly 1 expert"):
        route(random_logits(0), RULES["switch_top_1"], num_choices=2)
    with pytest.raises(ValueError, match="needs token_groups"):
        layer = Topology(jnp.ones((2, NUM_EXPERTS), bool), jnp.ones(2, jnp.int32))
        route(random_logits(0), RULES["top_k_softmax"], num_choices=2, topology=layer)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        route(random_logits(0), RULES["top_k_softmax"], num_choices=2, capacity=0)
    with pytest.raises(ValueError, match=r"token_mask must be \[18\] for logits \(18, 6\), got \(17,\)"):
        route(random_logits(0), RULES["top_k_softmax"], num_choices=2, token_mask=jnp.ones(17, bool))
    with pytest.raises(ValueError, match="num_sequences=4 does not divide the 18 tokens"):
        route(random_logits(0), RULES["top_k_softmax"], num_choices=2, num_sequences=4)
    with pytest.raises(ValueError, match="unknown trace level 'all'"):
        keep_trace(route(random_logits(0), RULES["top_k_softmax"], num_choices=2), "all")
