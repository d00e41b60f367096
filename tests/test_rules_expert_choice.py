"""Expert choice: equal loads, whatever the logits; what masks, limits and sequences do to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import audit_causality
from moe_jax.dispatch import BACKENDS
from moe_jax.routing import get_rule, route
from moe_jax.types import Expert, Topology
from tests.oracles import expert_choice as oracle
from tests.oracles.case import make_case
from tests.random_routing import NUM_EXPERTS, NUM_SEQUENCES, NUM_TOKENS, random_logits

RULE = get_rule("expert_choice")
PER_SEQUENCE = get_rule("expert_choice", per_sequence=True)


def plan_of(rule, logits, num_choices, num_sequences=1, **arrays):
    run = functools.partial(route, rule=rule, num_choices=num_choices, num_sequences=num_sequences)
    return jax.jit(run)(logits, **arrays).plan


def loads(plan):
    return np.bincount(np.asarray(plan.expert_ids).ravel(), minlength=plan.num_experts + 1)[:-1]


def test_by_hand():
    # K = 1, four tokens, two experts: each takes ceil(1 * 4 / 2) = 2. Expert 0 prefers .9 and .8, expert 1 the .4 of
    # token 2 and the .3 of token 3; so tokens 0 and 1 have expert 0, and tokens 2 and 3 expert 1.
    p = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    plan = plan_of(RULE, jnp.log(p), 1)
    np.testing.assert_array_equal(plan.expert_ids, [[0, 2], [0, 2], [1, 2], [1, 2]])
    np.testing.assert_allclose(plan.gates[:, 0], [0.9, 0.8, 0.4, 0.3], rtol=1e-6)
    assert plan.capacity == 2


def test_a_token_may_be_wanted_by_all_or_none():
    # K = 1, two tokens, two experts: one place each. Of three experts' probabilities token 0 wins all of the first two.
    p = jnp.array([[0.45, 0.45, 0.1], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]])
    ids = plan_of(RULE, jnp.log(p), 1).expert_ids
    np.testing.assert_array_equal(ids, [[0, 1, 3], [2, 3, 3], [3, 3, 3]])


@pytest.mark.parametrize("rule", [RULE, PER_SEQUENCE], ids=["batch", "sequence"])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_all_loads_are_exactly_equal(rule, k):
    logits = random_logits(0) + 3 * np.arange(NUM_EXPERTS, dtype=np.float32)
    plan = plan_of(rule, logits, k, num_sequences=NUM_SEQUENCES)
    np.testing.assert_array_equal(loads(plan), k * NUM_TOKENS // NUM_EXPERTS)
    assert plan.capacity == k * NUM_TOKENS // NUM_EXPERTS


def test_masked_tokens_lessen_the_places():
    mask = np.arange(NUM_TOKENS) < 10  # ceil(2 * 10 / 6) = 4 places, of ceil(2 * 18 / 6) = 6 that there is room for
    plan = plan_of(RULE, random_logits(1), 2, token_mask=jnp.asarray(mask))
    np.testing.assert_array_equal(loads(plan), 4)
    assert plan.capacity == 6
    # By sequences of six tokens, of which 6, 4 and 0 are left: ceil(2 * 6 / 6) + ceil(2 * 4 / 6) + 0 = 4.
    plan = plan_of(PER_SEQUENCE, random_logits(1), 2, token_mask=jnp.asarray(mask), num_sequences=3)
    np.testing.assert_array_equal(loads(plan), 4)


def test_sequences_are_independent_only_if_asked():
    def ids_of(rule, logits):  # [B, S, E]
        flat = logits.reshape(-1, NUM_EXPERTS)
        ids = plan_of(rule, flat, 2, num_sequences=len(logits)).expert_ids
        return ids.reshape(*logits.shape[:2], -1)

    inputs = [random_logits(s).reshape(3, 6, NUM_EXPERTS) for s in (0, 1)]
    assert not audit_causality(functools.partial(ids_of, RULE), *inputs).is_independent
    audit = audit_causality(functools.partial(ids_of, PER_SEQUENCE), *inputs)
    assert audit.is_independent and not audit.is_causal


def test_by_sequence_equals_the_loop():
    logits, mask = random_logits(2), np.random.default_rng(0).random(NUM_TOKENS) < 0.7
    plan = plan_of(PER_SEQUENCE, logits, 2, token_mask=jnp.asarray(mask), num_sequences=NUM_SEQUENCES)
    case = make_case(logits, token_mask=mask, num_sequences=NUM_SEQUENCES)
    ids, gates, _ = oracle.expert_choice(case, 2, per_sequence=True)
    np.testing.assert_array_equal(plan.expert_ids, ids)
    np.testing.assert_allclose(plan.gates, gates, atol=1e-6)


def test_a_limit_keeps_the_best_of_the_experts_that_chose():
    logits = random_logits(3)
    free = plan_of(RULE, logits, 3)
    topology = Topology(jnp.ones((1, NUM_EXPERTS), bool), jnp.array([2]))
    limited = plan_of(RULE, logits, 3, topology=topology)
    np.testing.assert_array_equal(limited.expert_ids[:, :2], free.expert_ids[:, :2])
    assert (limited.expert_ids[:, 2:] == NUM_EXPERTS).all() and (loads(free) > loads(limited)).any()
    narrow = plan_of(get_rule("expert_choice", max_experts=2), logits, 3)
    np.testing.assert_array_equal(narrow.expert_ids, free.expert_ids[:, :2])


@pytest.mark.parametrize("backend", ["einsum", "gather"])
def test_the_promised_capacity_loses_nothing(backend):
    plan = plan_of(RULE, random_logits(4), 2)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(NUM_TOKENS, 4)), jnp.float32)
    scale = Expert(lambda weight, rows: rows * weight, lambda weight, hidden: hidden)
    weights = jnp.arange(1.0, NUM_EXPERTS + 1)
    expected = tokens * (plan.gates * jnp.append(weights, 0.0)[plan.expert_ids]).sum(1, keepdims=True)
    mixed = jax.jit(BACKENDS[backend], static_argnames="expert")(tokens, plan, expert=scale, params=weights)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
