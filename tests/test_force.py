"""A forced plan decides, whatever the rule would have done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import find_flips, load_plan, save_plan
from moe_jax.models.decoder import Decoder
from moe_jax.routing import RULES, Rule, route, rule_settings
from moe_jax.types import RoutingPlan
from tests.random_routing import (
    NUM_EXPERTS,
    NUM_SEQUENCES,
    NUM_TOKENS,
    choices_of,
    random_constraints,
    random_ids,
    random_logits,
)
from tests.tiny_model import TINY

FORCIBLE = [name for name, rule in RULES.items() if rule.can_be_forced]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 8)), jnp.int32)


def random_plan(seed, num_choices, num_reachable=NUM_EXPERTS):
    """Distinct experts of the first few in any order, some slots empty."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((NUM_TOKENS, num_reachable)))[:, :num_choices].astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = NUM_EXPERTS
    gates = np.where(ids < NUM_EXPERTS, rng.random(ids.shape), 0).astype(np.float32)
    return RoutingPlan(jnp.asarray(ids), jnp.asarray(gates), NUM_EXPERTS, None)


def test_recomputed_gates_by_hand():
    # Probabilities (.5, .3, .2) forced onto experts 2 and 0, in this order: gates .2 and .5, or 2/7 and 5/7.
    logits = jnp.log(jnp.array([[5.0, 3.0, 2.0]]))
    plan = RoutingPlan(jnp.array([[2, 0]], jnp.int32), jnp.ones((1, 2)), 3, None)
    expected = {
        "softmax_top_k": [0.2, 0.5],
        "softmax_top_k_renormalized": [2 / 7, 5 / 7],
        "top_k_softmax": [2 / 7, 5 / 7],
    }
    for rule, gates in expected.items():
        output = route(logits, RULES[rule], num_choices=2, forced=plan, force="ids")
        np.testing.assert_array_equal(output.plan.expert_ids, [[2, 0]])
        np.testing.assert_allclose(output.plan.gates, [gates], rtol=1e-6)


@pytest.mark.parametrize("rule", FORCIBLE)
def test_what_was_recorded_is_what_comes_out(rule):
    logits, given = (
        random_logits(0),
        random_constraints(1) | {"token_ids": random_ids(0), "num_sequences": NUM_SEQUENCES},
    )
    recorded = route(logits, RULES[rule], num_choices=choices_of(rule), **given)
    for force in ("ids", "exact"):
        again = route(logits, RULES[rule], num_choices=choices_of(rule), forced=recorded.plan, force=force, **given)
        np.testing.assert_array_equal(again.plan.expert_ids, recorded.plan.expert_ids)
        np.testing.assert_allclose(again.plan.gates, recorded.plan.gates, rtol=1e-5)
        np.testing.assert_array_equal(again.stats.kept, recorded.stats.kept)


@pytest.mark.parametrize("rule", [name for name in FORCIBLE if RULES[name].only_choices is None])
def test_any_experts_can_be_forced_and_their_gates_follow_the_logits(rule):
    # A rule that opens one group of experts to a token is forced within one.
    plan = random_plan(3, 2, NUM_EXPERTS // rule_settings(RULES[rule]).get("num_groups", 1))

    def gates(logits):
        output = route(logits, RULES[rule], num_choices=3, forced=plan, force="ids", token_ids=random_ids(0))
        return output.plan.gates

    forced = gates(jnp.asarray(random_logits(4)))
    assert ((np.asarray(forced) > 0) == (np.asarray(plan.expert_ids) < NUM_EXPERTS)).all()
    slope = jax.jacobian(lambda z: gates(z)[0].sum())(jnp.asarray(random_logits(4)))
    assert np.isfinite(slope).all() and (np.asarray(slope)[1:] == 0).all()


def test_exact_gates_are_the_plans_own_and_have_no_gradient():
    plan, rule = random_plan(5, 2), RULES["softmax_top_k"]
    output = route(random_logits(6), rule, num_choices=3, forced=plan)
    jax.tree.map(np.testing.assert_array_equal, output.plan, plan)
    slope = jax.grad(lambda z: route(z, rule, num_choices=3, forced=plan).plan.gates.sum())(jnp.ones((18, 6)))
    assert (slope == 0).all()


@pytest.mark.parametrize("force", ["ids", "exact"])
def test_a_masked_token_is_not_routed_whatever_was_recorded_for_it(force):
    plan, mask = random_plan(7, 2), jnp.arange(NUM_TOKENS) % 3 != 0
    output = route(random_logits(8), RULES["softmax_top_k"], num_choices=2, forced=plan, force=force, token_mask=mask)
    np.testing.assert_array_equal(output.plan.expert_ids, jnp.where(mask[:, None], plan.expert_ids, NUM_EXPERTS))
    assert (np.asarray(output.plan.gates)[~np.asarray(mask)] == 0).all()
    assert output.stats.kept.sum() == (np.asarray(plan.expert_ids)[np.asarray(mask)] < NUM_EXPERTS).sum()


def test_what_cannot_be_forced_says_so():
    def last(inputs, num_choices):
        raise AssertionError("never asked")

    stubborn = Rule(last, "this project", can_be_forced=False)
    with pytest.raises(ValueError, match='use force="exact"'):
        route(random_logits(0), stubborn, num_choices=2, forced=random_plan(0, 2), force="ids")
    with pytest.raises(ValueError, match="the plan is for 18 tokens and 6 experts, the logits are for 3 and 6"):
        route(jnp.ones((3, 6)), RULES["softmax_top_k"], num_choices=2, forced=random_plan(0, 2))


def test_a_model_replays_its_own_routing_and_another_models():
    model, other = (Decoder(TINY, key=jax.random.key(seed)) for seed in (0, 1))
    logits, recorded = model(TOKENS, trace="full")
    for force in ("ids", "exact"):
        again, routed = model(TOKENS, trace="full", forced=recorded.plan, force=force)
        np.testing.assert_allclose(again, logits, atol=1e-5)
        np.testing.assert_array_equal(routed.plan.expert_ids, recorded.plan.expert_ids)
    free, forced = (other(TOKENS, trace="full", **given)[1] for given in ({}, {"forced": recorded.plan}))
    assert find_flips(recorded, free).flipped.sum() > 0 and find_flips(recorded, forced).flipped.sum() == 0


def test_a_plan_survives_its_file_and_an_edited_one_is_checked(tmp_path):
    plan = Decoder(TINY, key=jax.random.key(0))(TOKENS, trace="topk")[1].plan
    save_plan(tmp_path / "plan.npz", plan)
    jax.tree.map(np.testing.assert_array_equal, load_plan(tmp_path / "plan.npz"), plan)
    for edit, message in (
        ({"expert_ids": plan.expert_ids.at[0, 0].set(0)}, "names expert 0 twice"),
        ({"expert_ids": plan.expert_ids + TINY.num_experts}, "expert ids must lie in"),
        ({"expert_ids": jnp.full_like(plan.expert_ids, TINY.num_experts)}, "gates of empty slots must be 0"),
        ({"gates": plan.gates[:, :, :1]}, "must have the same shape"),
    ):
        with pytest.raises(ValueError, match=message):
            save_plan(tmp_path / "plan.npz", dataclasses.replace(plan, **edit))
    (tmp_path / "plan.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no recorded plan"):
        load_plan(tmp_path / "plan.npz")
