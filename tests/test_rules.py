"""Every rule of the table against its oracle and against what the table promises."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.config import DecoderConfig
from moe_jax.routing import (
    RULES,
    full_topology,
    get_rule,
    population_topology,
    route,
    single_topology,
)
from moe_jax.types import Topology
from tests.oracles import ORACLES, route_loop
from tests.random_routing import (
    NUM_EXPERTS,
    NUM_SEQUENCES,
    NUM_TOKENS,
    as_arrays,
    choices_of,
    nulls_of,
    random_constraints,
    random_ids,
    random_logits,
    random_permutation,
)

CAUSAL = [name for name, rule in RULES.items() if rule.is_causal]
LEARNED = [name for name, rule in RULES.items() if rule.is_learned]
# Their gradient is by design not the derivative of their value; each has a test of its own.
# sparse_mixer: by design in training; in evaluation a gate jumps where an expert ceases to be near the best.
ESTIMATED_GRADIENT = {"sparse_mixer"}


def routed_by(rule, **arguments):
    """`route` with all that some rule needs."""
    defaults = {"num_choices": choices_of(rule), "token_ids": random_ids(0), "num_sequences": NUM_SEQUENCES}
    return functools.partial(route, rule=RULES[rule], **(defaults | arguments))


def test_every_rule_has_an_oracle():
    assert set(ORACLES) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_the_table_names_a_paper_and_settings_with_defaults(rule):
    assert "arXiv:" in RULES[rule].paper or "this project" in RULES[rule].paper
    parameters = inspect.signature(RULES[rule].choose).parameters.values()
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_loop(rule, constrained, capacity):
    logits, constraints = random_logits(0), random_constraints(1) if constrained else {}
    output = jax.jit(routed_by(rule, capacity=capacity))(logits, **constraints)
    controller = RULES[rule].controller
    ids, gates, stats = route_loop(
        ORACLES[rule],
        logits,
        choices_of(rule),
        capacity=capacity,
        fixed_count=RULES[rule].fixed_count,
        num_null=nulls_of(rule),
        level=0.0 if controller is None else controller.start,
        token_ids=random_ids(0),
        num_sequences=NUM_SEQUENCES,
        **(as_arrays(constraints) if constrained else {}),
    )
    np.testing.assert_array_equal(output.plan.expert_ids, ids)
    np.testing.assert_allclose(output.plan.gates, gates, atol=1e-6)
    for name, value in stats.items():
        np.testing.assert_allclose(getattr(output.stats, name), value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_gates_are_what_the_table_says_and_no_expert_is_named_twice(rule):
    plan = routed_by(rule)(random_logits(3), **random_constraints(2)).plan
    is_filled = np.asarray(plan.expert_ids) < NUM_EXPERTS
    assert (np.asarray(plan.gates)[~is_filled] == 0).all()
    for row, ids in zip(is_filled, np.asarray(plan.expert_ids), strict=True):
        assert len(set(ids[row])) == row.sum()
    if RULES[rule].normalized:
        np.testing.assert_allclose(np.asarray(plan.gates).sum(-1), is_filled.any(-1), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_fixed_count_is_kept(rule):
    counts = (np.asarray(routed_by(rule)(random_logits(3)).plan.expert_ids) < NUM_EXPERTS).sum(-1)
    assert (counts == choices_of(rule)).all() or not RULES[rule].fixed_count


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_are_a_distribution(rule):
    constraints = random_constraints(2)
    routed = routed_by(rule, stats_groups=NUM_TOKENS)(random_logits(3), **constraints)
    is_routable = as_arrays(constraints)["is_open"].any(-1) & np.asarray(constraints["token_mask"])
    np.testing.assert_allclose(routed.stats.prob_sums.sum(-1), is_routable, atol=1e-5)
    assert (routed.stats.prob_sums >= 0).all()


@pytest.mark.parametrize("rule", LEARNED)
def test_permuting_experts_permutes_the_plan(rule):
    logits, order = random_logits(4), random_permutation(rule, 0)
    plan, permuted = (routed_by(rule)(z).plan for z in (logits, logits[:, order]))
    names = np.append(order, NUM_EXPERTS)
    for t in range(NUM_TOKENS):
        before = dict(zip(np.asarray(plan.expert_ids[t]), np.asarray(plan.gates[t]), strict=True))
        after = dict(zip(names[np.asarray(permuted.expert_ids[t])], np.asarray(permuted.gates[t]), strict=True))
        assert before == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_masked_tokens_change_nothing_for_the_others(rule):
    logits, mask = random_logits(5), np.arange(NUM_TOKENS) % 3 != 0
    garbage = np.where(mask[:, None], logits, 50.0 * random_logits(6))
    run = routed_by(rule, token_mask=jnp.asarray(mask), capacity=3)
    jax.tree.map(np.testing.assert_array_equal, run(logits).stats, run(garbage).stats)
    np.testing.assert_array_equal(run(logits).plan.expert_ids, run(garbage).plan.expert_ids)
    assert (np.asarray(run(logits).plan.expert_ids)[~mask] == NUM_EXPERTS).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_topology_that_limits_nothing_is_no_topology(rule):
    layer = jax.tree.map(lambda leaf: leaf[0], full_topology(1, NUM_EXPERTS, NUM_EXPERTS))
    with_topology, without = routed_by(rule)(random_logits(7), topology=layer), routed_by(rule)(random_logits(7))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), with_topology, without)


@pytest.mark.parametrize("rule", CAUSAL)
def test_population_as_groups_equals_one_topology_at_a_time(rule):
    rng, k = np.random.default_rng(8), choices_of(rule)
    keep, num_choices = rng.random((4, 1, NUM_EXPERTS)) < 0.7, rng.integers(1, k + 1, (4, 1))
    logits, ids = random_logits(9, num_tokens=20), random_ids(9, num_tokens=20)  # five tokens for each candidate
    layer = jax.tree.map(lambda leaf: leaf[0], population_topology(keep, num_choices))
    run = functools.partial(route, rule=RULES[rule], num_choices=k)
    together = run(logits, topology=layer, token_groups=jnp.repeat(jnp.arange(4), 5), token_ids=ids, num_sequences=4)
    for p in range(4):
        part = slice(5 * p, 5 * p + 5)
        alone = jax.tree.map(lambda leaf: leaf[0], single_topology(keep[p], num_choices[p]))
        plan = run(logits[part], topology=alone, token_ids=ids[part]).plan
        np.testing.assert_array_equal(together.plan.expert_ids[part], plan.expert_ids)
        np.testing.assert_allclose(together.plan.gates[part], plan.gates, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_a_population_of_routers(rule):
    logits = np.stack([random_logits(seed) for seed in range(3)])
    run = routed_by(rule, capacity=5)
    together = jax.vmap(run)(jnp.asarray(logits))
    for p in range(3):
        jax.tree.map(
            lambda a, b, p=p: np.testing.assert_allclose(a[p], b, rtol=1e-5, atol=1e-6), together, run(logits[p])
        )


@pytest.mark.parametrize("rule", sorted(set(RULES) - ESTIMATED_GRADIENT))
def test_gradients_are_the_gates_own_and_finite_under_constraints(rule):
    logits, constraints = random_logits(10), random_constraints(11)
    weights = jnp.asarray(np.random.default_rng(12).normal(size=(NUM_TOKENS, NUM_EXPERTS)), jnp.float32)

    @jax.jit
    def value(logits):
        output = routed_by(rule)(logits, **constraints)
        stats, gates = output.stats, output.plan.gates
        losses = stats.entropy_sum + stats.z_sum + stats.prob_sums[0] + stats.gate_sums[1]
        return jnp.sum(weights[:, : gates.shape[1]] * gates) + losses

    gradient = jax.jit(jax.grad(value))(jnp.asarray(logits))
    assert np.isfinite(gradient).all()
    direction = np.random.default_rng(13).normal(size=logits.shape).astype(np.float32)
    step = 1e-2  # selection does not flip within it at this seed; central differences in float32
    numeric = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("logits", [np.zeros((NUM_TOKENS, NUM_EXPERTS)), 80.0 * random_logits(1)], ids=["tie", "huge"])
@pytest.mark.parametrize("rule", RULES)
def test_ties_huge_logits_and_no_tokens_give_finite_numbers_and_gradients(rule, logits):
    @functools.partial(jax.jit, static_argnames="is_empty")
    def value(logits, is_empty):
        mask = jnp.zeros(NUM_TOKENS, bool) if is_empty else None
        output = routed_by(rule, token_mask=mask)(logits)
        return sum(leaf.sum() for leaf in jax.tree.leaves((output.plan.gates, output.stats))), output

    for is_empty in (False, True):
        gradient, output = jax.grad(value, has_aux=True)(jnp.asarray(logits, jnp.float32), is_empty=is_empty)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, output)))
        assert not is_empty or (output.plan.expert_ids == NUM_EXPERTS).all()


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_logits_are_computed_in_float32(rule):
    logits = jnp.asarray(random_logits(2), jnp.bfloat16)
    low, high = routed_by(rule)(logits), routed_by(rule)(logits.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, low, high)
    assert low.plan.gates.dtype == jnp.float32


@pytest.mark.parametrize("rule", RULES)
def test_no_open_expert_is_inert(rule):
    closed = Topology(jnp.zeros((1, NUM_EXPERTS), bool), jnp.array([2], jnp.int32))
    output = routed_by(rule)(random_logits(14), topology=closed)
    assert (output.plan.expert_ids == NUM_EXPERTS).all() and (output.plan.gates == 0).all()
    assert output.stats.z_sum == 0 and output.stats.entropy_sum == 0


@pytest.mark.parametrize("rule", RULES)
def test_what_training_draws_respects_constraints_and_repeats_with_the_key(rule):
    logits, constraints = jnp.asarray(random_logits(3)), random_constraints(2)
    given = as_arrays(constraints)
    is_open = given["is_open"] & given["token_mask"][:, None]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(logits, key):
        output = routed_by(rule, key=key)(logits, **constraints)
        return output.plan.gates.sum() + output.stats.load_sums.sum(), output

    gradient, output = run(logits, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, output)))
    jax.tree.map(np.testing.assert_array_equal, output, run(logits, jax.random.key(0))[1])
    for t, row in enumerate(np.asarray(output.plan.expert_ids)):
        filled = row[row < NUM_EXPERTS]
        assert is_open[t, filled].all() and len(set(filled)) == len(filled) <= given["limit"][t]


@pytest.mark.parametrize("rule", RULES)
def test_statistics_of_groups_add_up_to_the_whole(rule):
    run = functools.partial(routed_by(rule), random_logits(3), **random_constraints(2))
    whole, parts = run().stats, run(stats_groups=NUM_SEQUENCES).stats
    assert parts.chosen.shape == (NUM_SEQUENCES, NUM_EXPERTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-5, atol=1e-5), parts, whole)


def test_settings_are_the_keyword_arguments_and_unknown_ones_are_refused():
    rule = get_rule("sigmoid_top_k", scale=2.5)
    gates = route(random_logits(0), rule, num_choices=2).plan.gates
    np.testing.assert_allclose(gates.sum(-1), 2.5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rule 'sigmoid_top_k' has no setting 'scales'; it has: .*scale"):
        get_rule("sigmoid_top_k", scales=2.5)
    with pytest.raises(ValueError, match=r"unknown routing rule 'top_2'; known: .*softmax_top_k"):
        get_rule("top_2")


def test_bad_settings_are_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"target is a mean number of experts in \[1, 2\]"):
        DecoderConfig(num_choices=2, rule="top_p", rule_settings={"target": 3.0})
    with pytest.raises(ValueError, match="unknown score function 'tanh'"):
        DecoderConfig(rule="sigmoid_top_k", rule_settings={"score_function": "tanh"})
    with pytest.raises(ValueError, match="switch_top_1 routes to exactly 1 expert"):
        DecoderConfig(rule="switch_top_1")
