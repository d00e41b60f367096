"""SparseMixer: what it draws, and whether its gradient is that of the expected loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RULES, get_rule, route
from moe_jax.routing.rules.sparse_mixer import Draws, sparse_mixer, sparse_mixer_of_draws
from moe_jax.types import RoutingInputs
from tests.oracles import route_loop
from tests.oracles import sparse_mixer as oracle
from tests.random_routing import as_arrays, random_constraints, random_logits

EVERYTHING_IS_NEAR = 100.0


def test_evaluation_by_hand():
    # r = 0.01: 2.00 and 1.97 differ by 1.5 % of 2, so both are near: 1 / (1 + exp(-0.03)) = 0.5075. Without the first,
    # 1.97 stands alone, for 1.00 is 49 % below.
    plan = route(jnp.array([[1.97, 1.0, 2.0]]), RULES["sparse_mixer"], num_choices=2).plan
    np.testing.assert_array_equal(plan.expert_ids, [[2, 0]])
    np.testing.assert_allclose(plan.gates, [[0.5075, 1.0]], atol=1e-5)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("jitter", [0.3, EVERYTHING_IS_NEAR])
def test_more_jitter_equals_the_loop(jitter, constrained):
    logits, constraints = random_logits(0), random_constraints(1) if constrained else {}
    plan = route(logits, get_rule("sparse_mixer", jitter=jitter), num_choices=3, **constraints).plan
    loop = functools.partial(oracle.sparse_mixer, jitter=jitter)
    ids, gates, _ = route_loop(loop, logits, 3, **(as_arrays(constraints) if constrained else {}))
    np.testing.assert_array_equal(plan.expert_ids, ids)
    np.testing.assert_allclose(plan.gates, gates, atol=1e-6)


def test_training_draws_experts_by_their_probability_and_scales_three_quarters_of_the_gates():
    # pi = (.5, .3, .2). The best expert keeps its gate; the others have a third of theirs in 3 of 4 draws.
    pi, num_tokens = np.array([0.5, 0.3, 0.2]), 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(pi, jnp.float32))[None], (num_tokens, 1))
    rule = get_rule("sparse_mixer", jitter=EVERYTHING_IS_NEAR)
    plan = route(logits, rule, num_choices=2, key=jax.random.key(0)).plan
    ids, gates = np.asarray(plan.expert_ids), np.asarray(plan.gates)
    for e in range(3):
        is_drawn = ids[:, 0] == e
        assert abs(is_drawn.mean() - pi[e]) < 0.015  # four standard deviations
        np.testing.assert_allclose(gates[is_drawn, 0].max(), pi[e], rtol=1e-5)
        is_scaled = gates[is_drawn, 0] < 0.9 * pi[e]
        assert abs(is_scaled.mean() - (0.75 if e else 0.0)) < 0.03
        np.testing.assert_allclose(gates[is_drawn, 0][is_scaled], pi[e] / 3, rtol=1e-5)
    # After expert 0 the others have .3 / .5 and .2 / .5, the better of them unscaled.
    second = ids[ids[:, 0] == 0, 1]
    assert abs((second == 1).mean() - 0.6) < 0.02
    np.testing.assert_allclose(gates[(ids == [[0, 1]]).all(1), 1], 0.6, rtol=1e-5)


def gate_of(logits, expert, uniform):
    """The gate of a single slot when the draws are forced: `uniform` above 3/4 leaves it unscaled."""
    gumbel = jnp.where(jnp.arange(len(logits)) == expert, 1e3, 0.0)[None, None, :]
    draws = Draws(gumbel, jnp.full((1, 1), uniform))
    return sparse_mixer_of_draws(RoutingInputs(logits[None]), 1, draws, jitter=EVERYTHING_IS_NEAR).gates[0, 0]


@pytest.mark.parametrize(("uniform", "scale"), [(0.0, 1 / 3), (1.0, 1.0)])
def test_the_gradient_of_a_gate_is_that_of_its_probability(uniform, scale):
    # pi = (.5, .3, .2): d pi_1 / dz = .3 * (-.5, 1 - .3, -.2), at any scale of the gate.
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    gate, gradient = jax.value_and_grad(gate_of)(logits, 1, uniform)
    np.testing.assert_allclose(gate, 0.3 * scale, rtol=1e-5)
    np.testing.assert_allclose(gradient, [-0.15, 0.21, -0.06], rtol=1e-5)


def gradients_of_draws(logits, outputs, loss):
    """`[E, E]`: row D is the mean gradient of the draws of expert D; with Heun's nodes, and without scaling."""

    def gradient(expert, uniform):
        return jax.grad(lambda z: loss(gate_of(z, expert, uniform) * outputs[expert]))(logits)

    scaled, unscaled = (jax.vmap(gradient, (0, None))(jnp.arange(len(logits)), uniform) for uniform in (0.0, 1.0))
    return 0.75 * scaled + 0.25 * unscaled, unscaled


def true_gradients(logits, outputs, loss):
    """`[E, E]`: row D is (f(pi_D) - f(0)) d pi_D / pi_D; the mean over D ~ pi does not depend on f(0)."""
    pi = jax.nn.softmax(logits)
    values = jax.vmap(loss)(pi[:, None] * outputs) - loss(jnp.zeros_like(outputs[0]))
    return values[:, None] * jax.jacobian(jax.nn.softmax)(logits) / pi[:, None]


def toy(seed, num_experts, spread, size):
    """Logits of that spread, expert outputs of that size, and what they should be."""
    rng = np.random.default_rng(seed)
    arrays = spread * rng.normal(size=num_experts), size * rng.normal(size=(num_experts, 3)), rng.normal(size=3)
    return (jnp.asarray(x, jnp.float32) for x in arrays)


def test_for_all_but_the_best_expert_heun_is_exact_on_cubic_losses():
    logits, outputs, target = toy(0, num_experts=12, spread=0.3, size=10.0)
    loss = lambda y: jnp.sum((y - target) ** 3)  # noqa: E731
    heun, plain = gradients_of_draws(logits, outputs, loss)
    true, others = true_gradients(logits, outputs, loss), np.arange(12) != int(logits.argmax())
    np.testing.assert_allclose(heun[others], true[others], rtol=1e-3, atol=1e-4)
    assert np.linalg.norm((plain - true)[others]) > 0.5 * np.linalg.norm(true[others])


@pytest.mark.parametrize(
    ("squash", "experts", "measured"),
    [
        # A flat router over many experts, a loss that saturates: Heun's nodes take a third off the error.
        (jnp.tanh, {"num_experts": 12, "spread": 0.3, "size": 10.0}, [0.39, 0.61]),
        # Few experts and a quadratic loss: the best expert, left at first order, has half the weight and spoils it.
        (lambda y: y, {"num_experts": 4, "spread": 1.0, "size": 1.0}, [0.71, 0.60]),
    ],
)
def test_distance_of_the_mean_over_draws_from_the_true_gradient(squash, experts, measured):
    """Relative error with Heun's nodes and without, mean of eight toys; the whole expectation, nothing is sampled."""

    @jax.jit
    def errors(logits, outputs, target):
        loss = lambda y: jnp.sum((squash(y) - target) ** 2)  # noqa: E731
        pi = jax.nn.softmax(logits)
        truth = pi @ true_gradients(logits, outputs, loss)
        means = [pi @ rows for rows in gradients_of_draws(logits, outputs, loss)]
        return jnp.stack([jnp.linalg.norm(mean - truth) for mean in means]) / jnp.linalg.norm(truth)

    mean = np.mean([errors(*toy(seed, **experts)) for seed in range(8)], axis=0)
    np.testing.assert_allclose(mean, measured, atol=0.01)


def test_in_evaluation_the_gradient_is_the_plain_one():
    logits, direction = (jnp.asarray(random_logits(seed)) for seed in (0, 1))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(18, 3)), jnp.float32)

    @jax.jit
    def value(logits):
        return jnp.sum(weights * sparse_mixer(RoutingInputs(logits), 3, jitter=EVERYTHING_IS_NEAR).gates)

    step = 1e-2
    numeric = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(logits), direction), numeric, rtol=1e-3)
