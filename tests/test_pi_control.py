"""The PI controller of a rule's level: by hand, its stability, and rules that it steers on a drifting stream."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import get_rule, route
from moe_jax.routing.pi_control import steer_mean_choices
from moe_jax.types import RouterStats

STEER = partial(steer_mean_choices, start=0.5, low=0.0, high=1.0)


def stats_with(chosen, num_tokens):
    """Statistics of which only these two are known."""
    unknown = {field.name: jnp.nan for field in dataclasses.fields(RouterStats)}
    return RouterStats(**unknown | {"chosen": jnp.asarray(chosen, float), "num_tokens": jnp.asarray(num_tokens, float)})


def test_two_steps_by_hand():
    # 4 experts. 30 choices of 10 tokens are 3 a token, so e = (2 - 3) / 4 = -.25: the integral is .2 * -.25 = -.05 and
    # the level .5 - .05 + .1 * -.25 = .425. Then e = 0, so the first term goes and the integral stays: .45.
    steer = partial(STEER, kp=0.1, ki=0.2, target=2.0)
    level, integral = steer(jnp.float32(0.5), jnp.float32(0.0), stats_with([9, 9, 6, 6], 10), 4)
    np.testing.assert_allclose([level, integral], [0.425, -0.05], rtol=1e-6)
    level, integral = steer(level, integral, stats_with([5, 5, 5, 5], 10), 4)
    np.testing.assert_allclose([level, integral], [0.45, -0.05], rtol=1e-6)


@pytest.mark.parametrize("given", [{"target": None}, {"target": 2.0}], ids=["no target", "no tokens"])
def test_nothing_moves_without_target_or_without_tokens(given):
    stats = stats_with([0, 0], 0) if given["target"] else stats_with([7, 3], 5)
    level, integral = STEER(jnp.float32(0.7), jnp.float32(0.1), stats, 2, kp=1.0, ki=1.0, **given)
    np.testing.assert_array_equal([level, integral], np.float32([0.7, 0.1]))


def test_an_unreachable_target_winds_nothing_up():
    steer = partial(STEER, kp=0.1, ki=0.2, target=2.0)
    level, integral = jnp.float32(0.5), jnp.float32(0.0)
    for _ in range(50):  # one expert a token, whatever the level
        level, integral = steer(level, integral, stats_with([10, 0], 10), 2)
    assert level == 1.0 and integral == 0.5  # start + integral is the highest level
    level, _ = steer(level, integral, stats_with([10, 14], 10), 2)  # now 2.4 a token: e = -.2
    np.testing.assert_allclose(level, 1.0 - 0.2 * 0.2 - 0.1 * 0.2, rtol=1e-6)


@pytest.mark.parametrize(("kp", "ki", "is_stable"), [(0.3, 1.3, True), (0.3, 1.5, False), (0.0, 1.9, True)])
def test_the_loop_is_stable_where_the_docstring_says(kp, ki, is_stable):
    level, integral, misses = jnp.float32(0.5), jnp.float32(0.0), []
    for _ in range(60):  # 4 experts, of which a token uses 4 * level: slope g = 1, target at level .52
        misses.append(abs(float(level) - 0.52))
        steer = partial(STEER, kp=kp, ki=ki, target=2.08)
        level, integral = steer(level, integral, stats_with([40 * level, 0, 0, 0], 10), 4)
    assert (misses[-1] < 0.1 * misses[0]) == is_stable


@pytest.mark.parametrize("rule", ["threshold", "top_p", "free_energy_top_k", "entropy_top_k"])
def test_a_steered_rule_keeps_its_mean_on_a_skewed_and_drifting_stream(rule):
    steered = get_rule(rule, target=3.0)

    @jax.jit
    def means(controller_is_on):
        def step(state, i):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (512, 8))
            skew = jnp.linspace(0.0, 2.0, 8) * jnp.cos(i / 200)
            logits = (1.0 + 0.5 * jnp.sin(i / 150)) * noise + skew[None, :]
            stats = route(logits, steered, num_choices=8, level=state[0]).stats
            moved = steered.controller.update(*state, stats, 8)
            state = jax.tree.map(partial(jnp.where, controller_is_on | (i < 150)), moved, state)
            return state, stats.chosen.sum() / stats.num_tokens

        start = jnp.float32(steered.controller.start), jnp.float32(0.0)
        return jax.lax.scan(step, start, jnp.arange(400))[1]

    on, off = means(True), means(False)
    assert np.abs(on[:3] - 3.0).max() > 0.5  # it starts wrong
    np.testing.assert_allclose(on[150:].reshape(-1, 25).mean(1), 3.0, rtol=0.1)
    assert np.abs(off[-25:].mean() - 3.0) > 5 * np.abs(on[-25:].mean() - 3.0)  # a level frozen at step 150 loses it


def test_settings_reach_the_controller_and_a_bad_target_is_refused():
    rule = get_rule("top_p", start=0.3, target=2.0, kp=0.0, renormalize=True)
    assert rule.controller.start == 0.3
    stats = stats_with([4, 4, 4, 4], 8)  # two a token, as asked
    assert rule.controller.update(jnp.float32(0.9), jnp.float32(0.0), stats, 4)[0] == jnp.float32(0.3)
    with pytest.raises(ValueError, match=r"target is a mean number of experts in \[1, 4\], the num_choices; got 5.0"):
        get_rule("top_p", target=5.0).controller.update(jnp.float32(0.4), jnp.float32(0.0), stats, 4)
    with pytest.raises(ValueError, match=r"no setting 'goal'; it has: high, ki, kp, low, renormalize, start, target"):
        get_rule("top_p", goal=2.0)
