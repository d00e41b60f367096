"""The audit finds the leaks that are there, and none in what cannot leak."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.analysis import audit_causality
from moe_jax.models.decoder import Decoder
from moe_jax.routing import RULES, route
from tests.tiny_model import TINY

B, S, E = 3, 7, 4


def two_inputs(*shape):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, *shape)).astype(np.float32)


def plan_of(rule, capacity, logits):
    """Ids and gates `[B, S, K]` of logits `[B, S, E]`, all sequences routed together."""
    k = RULES[rule].only_choices or 2
    ids = jnp.arange(logits[..., 0].size, dtype=jnp.int32)
    plan = route(
        logits.reshape(-1, E), RULES[rule], num_choices=k, capacity=capacity, token_ids=ids, num_sequences=len(logits)
    ).plan
    return plan.expert_ids.reshape(*logits.shape[:2], -1), plan.gates.reshape(*logits.shape[:2], -1)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_as_causal_as_its_table_says(rule):
    audit = audit_causality(functools.partial(plan_of, rule, None), *two_inputs(B, S, E))
    assert (audit.is_causal and audit.is_independent) == RULES[rule].is_causal


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.is_learned])
def test_a_capacity_lets_sequences_push_each_other_out(rule):
    """Tokens of all sequences compete for the places of an expert."""
    audit = audit_causality(functools.partial(plan_of, rule, 2), *two_inputs(B, S, E))
    assert not audit.is_independent and audit.batch.largest > 0


def test_second_choices_yield_to_later_first_choices():
    """One place per expert: token 0 takes 0 and 1, unless token 1 wants 1 first, for first choices go before second."""
    inputs = np.array([[[4, 3, 0, 0], [0, 0, 4, 3]]], np.float32)
    replacements = np.array([[[4, 3, 0, 0], [0, 4, 3, 0]]], np.float32)
    audit = audit_causality(functools.partial(plan_of, "softmax_top_k", 1), inputs, replacements)
    assert not audit.is_causal and audit.is_independent
    assert audit.future == (0.5, float(E - 1))  # of its two ids and two gates one each moves, the id from 1 to E


def expert_choice(logits):
    """Every expert takes its two favourite tokens of all (Zhou et al. 2202.09368): a user's own router."""
    flat = logits.reshape(-1, E)
    _, tokens = jax.lax.top_k(flat.T, 2)  # [E, 2]
    taken = jnp.zeros(flat.shape, bool).at[tokens, jnp.arange(E)[:, None]].set(True)
    return taken.reshape(logits.shape)


def test_expert_choice_sees_the_future_and_the_others():
    audit = audit_causality(expert_choice, *two_inputs(B, S, E))
    assert not audit.is_causal and not audit.is_independent
    assert audit.future.largest == 1.0


def test_a_running_mean_is_causal_and_its_reverse_is_not():
    inputs = two_inputs(B, S)
    assert audit_causality(lambda x: jnp.cumsum(x, axis=1), *inputs).is_causal
    reverse = audit_causality(lambda x: jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1], *inputs)
    assert reverse.future.share == 1.0 and reverse.is_independent


def test_one_cut_by_hand():
    """y_t = x_{t+1}: with the cut at 1 only y_1 of each sequence, half of the positions 0 and 1, may move."""
    inputs = np.arange(10.0).reshape(2, 5)
    audit = audit_causality(lambda x: jnp.roll(x, -1, axis=1), inputs, inputs + 100.0, cuts=[1])
    assert audit.future == (0.5, 100.0)


def test_a_number_that_becomes_nan_has_moved():
    audit = audit_causality(lambda x: x + jnp.log(jnp.min(x)), np.ones((2, 3)), -np.ones((2, 3)))
    assert audit.future == (1.0, np.inf) and audit.batch == (1.0, np.inf)


def test_a_whole_model_is_causal_without_capacity():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, TINY.vocab_size, (2, 2, S)).astype(np.int32)
    graphdef, state = nnx.split(Decoder(TINY, key=jax.random.key(0)))
    audit = audit_causality(lambda x: nnx.merge(graphdef, state)(x)[0], *tokens, cuts=[0, 3, S - 2])
    assert audit.is_causal and audit.is_independent


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        audit_causality(lambda x: x, np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"cuts must lie in \[0, 1\].*\[2\]"):
        audit_causality(lambda x: x, np.zeros((2, 3)), np.ones((2, 3)), cuts=[2])
    with pytest.raises(ValueError, match="leading"):
        audit_causality(lambda x: x.sum(1), np.zeros((2, 3)), np.ones((2, 3)))
