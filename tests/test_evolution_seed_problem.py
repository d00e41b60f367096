"""The re-created problem of the earlier system: three programs for one fitness, and the simple answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import seed_problem_numpy as original
from experiments.seed_problem import evaluate, round_robin

PROBLEM = original.make_problem(0)
FORM = original.gram_form(PROBLEM)


def test_loop_gram_form_and_jax_agree():
    masks = original.random_masks(np.random.default_rng(0), 3)
    masks[2] = np.arange(8) == 5  # one expert for all: no balance, and the second choice has weight zero
    expected = [original.fitness_loop(PROBLEM, mask) for mask in masks]
    np.testing.assert_allclose(original.fitness_gram(FORM, masks), expected, atol=1e-12)
    form = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), FORM)
    losses = jax.jit(evaluate)(jnp.asarray(masks.reshape(3, -1), jnp.int32), form)
    np.testing.assert_allclose(losses, -np.array(expected), atol=1e-6)


def test_the_zero_output_has_a_lower_error_than_plain_routing():
    # Targets are 0.8 x + 0.1 noise with unit variances: 0.64 + 0.01, up to sampling.
    assert FORM.energy == pytest.approx(0.65, abs=0.01)
    assert original.gram_terms(FORM, np.ones((1, 16, 8), bool))[0] > FORM.energy


def test_round_robin_by_hand():
    mask = round_robin(4)
    np.testing.assert_array_equal(mask[:3, :4].sum(axis=1), [4, 0, 4])  # tokens 0, 1, 2: experts 0-3, 4-7, 0-3
    np.testing.assert_array_equal(mask.sum(axis=0), np.full(8, 8))


def test_the_originals_operators_keep_an_expert_for_every_token():
    random = np.random.default_rng(0)
    masks = original.random_masks(random, 40)
    children = original.offspring(random, masks, np.arange(40.0))
    assert masks.any(axis=2).all() and children.any(axis=2).all() and children.shape == masks.shape
    np.testing.assert_array_equal(children[:2], masks[-2:])
