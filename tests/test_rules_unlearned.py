"""Rules without logits: the loads that they promise, and that the same input gives the same experts everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import get_rule, route
from moe_jax.types import Topology
from tests.oracles.unlearned import by_hash, mix, zipf_shares

T, E = 1000, 8


def plan_of(name, num_choices, num_tokens=T, settings=(), **arrays):
    run = functools.partial(route, rule=get_rule(name, **dict(settings)), num_choices=num_choices)
    return jax.jit(run)(jnp.zeros((num_tokens, E)), **arrays).plan


def loads(plan):
    return np.bincount(np.asarray(plan.expert_ids).ravel(), minlength=E + 1)[:-1]


def promised(name, k, share):
    """The share of the tokens that each expert gets."""
    if name == "forced_uniform":
        return np.full(E, k / E)
    if name == "forced_zipf":
        return np.array(zipf_shares(E, k), float)
    return np.array([share] + [(k - share) / (E - 1)] * (E - 1))


def test_zipf_shares_by_hand():
    # 1 + 1/2 + … + 1/8 = 761/280, so the first of eight gets 280/761 of the tokens. With K = 4 it would get more than
    # all; it gets all, and the others share 3 choices as 1/2 : 1/3 : …, of the sum 481/280.
    np.testing.assert_allclose(promised("forced_zipf", 1, 0)[:2], [280 / 761, 140 / 761])
    np.testing.assert_allclose(promised("forced_zipf", 4, 0)[:2], [1.0, 3 * 140 / 481])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", ["forced_uniform", "forced_zipf", "forced_skewed"])
def test_loads_are_as_promised_to_rounding(name, k):
    settings = {"share": 0.9} if name == "forced_skewed" else {}
    plan = plan_of(name, k, settings=settings)
    assert np.abs(loads(plan) - T * promised(name, k, 0.9)).max() < 1
    np.testing.assert_allclose(plan.gates, 1 / k)


def test_defaults_and_settings_by_hand():
    np.testing.assert_array_equal(loads(plan_of("forced_skewed", 1))[0], 600)
    np.testing.assert_array_equal(loads(plan_of("forced_zipf", 1, settings={"alpha": 0.0})), T // E)
    np.testing.assert_array_equal(
        plan_of("forced_uniform", 3, num_tokens=3).expert_ids, [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    )


@pytest.mark.parametrize("name", ["forced_uniform", "forced_zipf", "forced_skewed"])
def test_masked_tokens_take_no_part_of_the_loads(name):
    mask = np.random.default_rng(0).random(T) < 0.7
    kept = loads(plan_of(name, 2, token_mask=jnp.asarray(mask)))
    # Round-robin stays exact; the others are those of a part of a sequence.
    assert np.abs(kept - mask.sum() * promised(name, 2, 0.6)).max() < (1 if name == "forced_uniform" else 3)


@pytest.mark.parametrize("name", ["hash", "random", "forced_uniform", "forced_zipf", "forced_skewed"])
def test_closed_experts_are_replaced_by_open_ones(name):
    topology = Topology(jnp.arange(E)[None, :] >= 3, jnp.array([3]))
    plan = plan_of(name, 3, num_tokens=40, token_ids=jnp.arange(40), topology=topology)
    assert (plan.expert_ids >= 3).all() and (plan.expert_ids < E).all()
    few = Topology(jnp.arange(E)[None, :] >= 6, jnp.array([3]))
    plan = plan_of(name, 3, num_tokens=40, token_ids=jnp.arange(40), topology=few)
    np.testing.assert_array_equal((np.asarray(plan.expert_ids) < E).sum(1), 2)
    np.testing.assert_allclose(plan.gates[:, :2], 0.5)


def test_the_hash_is_the_published_one_and_stays():
    assert mix(1) == 0x514E28B7  # MurmurHash3 of no bytes with seed 1 is its finalizer of 1
    ids = plan_of("hash", 2, num_tokens=3, token_ids=jnp.array([0, 1, 50_000])).expert_ids
    assert ids.tolist() == [by_hash(value, E, 0)[:2] for value in (0, 1, 50_000)] == PINNED


PINNED = [[5, 3], [2, 7], [7, 6]]  # would change with the hash, and trained models with it


def test_the_hash_sends_an_id_to_the_same_experts_and_ids_evenly():
    vocabulary = jnp.arange(20_000)
    plan = plan_of("hash", 2, num_tokens=20_000, token_ids=vocabulary)
    again = plan_of("hash", 2, num_tokens=20_000, token_ids=vocabulary[::-1])
    np.testing.assert_array_equal(plan.expert_ids, again.expert_ids[::-1])
    pairs = np.zeros((E, E))
    np.add.at(pairs, tuple(np.asarray(plan.expert_ids).T), 1)
    expected = 20_000 / (E * (E - 1))  # each ordered pair of distinct experts, 357 +- 19
    assert np.abs(pairs[~np.eye(E, dtype=bool)] - expected).max() < 5 * expected**0.5
    other = plan_of("hash", 2, num_tokens=20_000, token_ids=vocabulary, settings={"seed": 1})
    same = (plan.expert_ids[:, 0] == other.expert_ids[:, 0]).mean()
    assert abs(same - 1 / E) < 0.02


def test_random_is_fresh_for_each_key_and_even():
    first, second = (plan_of("random", 2, num_tokens=20_000, key=jax.random.key(s)) for s in (0, 1))
    assert abs((first.expert_ids[:, 0] == second.expert_ids[:, 0]).mean() - 1 / E) < 0.02
    for plan in (first, plan_of("random", 2, num_tokens=20_000)):
        assert np.abs(loads(plan) - 5000).max() < 5 * 5000**0.5


def test_without_a_key_random_depends_on_the_place_in_the_sequence_alone():
    short, long = (plan_of("random", 2, num_tokens=n).expert_ids for n in (10, 30))
    np.testing.assert_array_equal(short, long[:10])


@pytest.mark.parametrize("name", ["hash", "random", "forced_uniform", "forced_zipf", "forced_skewed"])
def test_the_router_gets_no_gradient_but_through_its_own_losses(name):
    @jax.jit
    def value(logits):
        output = route(logits, get_rule(name), num_choices=2, token_ids=jnp.arange(6))
        return output.plan.gates[:, 0].sum() + output.stats.prob_sums[0] + output.stats.entropy_sum

    np.testing.assert_array_equal(jax.grad(value)(jnp.ones((6, E))), 0.0)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="alpha must not be negative, got -1"):
        plan_of("forced_zipf", 1, settings={"alpha": -1.0})
    with pytest.raises(ValueError, match=r"share=1.5 must be in \[0, 1\]"):
        plan_of("forced_skewed", 1, settings={"share": 1.5})
    with pytest.raises(ValueError, match="at most 7 of K=8 choices to the 7 other experts"):
        plan_of("forced_skewed", 8, settings={"share": 0.5})
