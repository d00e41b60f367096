"""ReLU routing: by hand, its penalty and the control of its weight, in a toy and in a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.models.decoder import Decoder
from moe_jax.routing import RULES, get_balancer, get_rule, route
from moe_jax.training.step import LossConfig, init_state, make_train_step, merge_model
from moe_jax.types import RouterStats
from tests.tiny_model import TINY

CONTROLLER = RULES["relu"].controller


def test_by_hand():
    logits = jnp.array([[1.5, -0.5, 0.0, 2.0], [-1.0, -2.0, -0.1, -3.0]])
    output = route(logits, RULES["relu"], num_choices=1)  # K is a goal: the first token has two experts
    np.testing.assert_array_equal(output.plan.expert_ids, [[3, 0, 4, 4], [4, 4, 4, 4]])
    np.testing.assert_allclose(output.plan.gates, [[2.0, 1.5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(output.stats.prob_sums, jax.nn.softmax(logits).sum(0), rtol=1e-6)
    bias = jnp.array([-1.6, 9.0, 9.0, 0.0])  # closes expert 0; opens nobody
    np.testing.assert_array_equal(
        route(logits, RULES["relu"], num_choices=1, bias=bias).plan.expert_ids, [[3, 4, 4, 4], [4, 4, 4, 4]]
    )


def test_the_penalty_by_hand_and_its_gradient():
    # Gates (1, 0) and (2, .5): loads (2, 1), f = E / (K T) * loads = (2, 1), sums of gates (3, .5),
    # so L = lambda / T * (2 * 3 + 1 * .5) = 3.25 lambda. An active gate's slope is lambda f_e / T; f has none.
    logits = jnp.array([[1.0, -1.0], [2.0, 0.5]])

    def penalty(logits):
        stats = route(logits, RULES["relu"], num_choices=1).stats
        return CONTROLLER.penalty(jnp.float32(0.1), stats, 1)

    np.testing.assert_allclose(penalty(logits), 0.325, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(penalty)(logits), [[0.1, 0.0], [0.1, 0.05]], rtol=1e-6)


def test_at_balanced_load_and_the_right_count_the_penalty_is_plain_l1():
    logits = jnp.where(jnp.eye(4, dtype=bool), jnp.arange(1.0, 5.0)[:, None], -1.0)  # an own expert for each token
    stats = route(logits, RULES["relu"], num_choices=1).stats
    np.testing.assert_allclose(CONTROLLER.penalty(jnp.float32(1.0), stats, 1), (1 + 2 + 3 + 4) / 4, rtol=1e-6)
    empty = route(logits, RULES["relu"], num_choices=1, token_mask=jnp.zeros(4, bool)).stats
    assert CONTROLLER.penalty(jnp.float32(1.0), empty, 1) == 0


@pytest.mark.parametrize(("num_choices", "factor"), [(1, 1.2), (2, 1.0), (3, 1 / 1.2)])
def test_the_weight_rises_while_too_many_experts_are_used(num_choices, factor):
    stats = route(jnp.array([[1.0, 1.0, -1.0, -1.0]]), RULES["relu"], num_choices=num_choices).stats
    level, _ = CONTROLLER.update(jnp.float32(1e-8), jnp.float32(0), stats, num_choices)
    np.testing.assert_allclose(level, 1e-8 * factor, rtol=1e-6)
    level, _ = get_rule("relu", alpha=2.0).controller.update(jnp.float32(1.0), jnp.float32(0), stats, num_choices)
    np.testing.assert_allclose(level, 2.0 ** round(np.log(factor) / np.log(1.2)))


def test_the_weight_rests_without_tokens_and_stays_finite_out_of_reach():
    logits = jnp.ones((1, 4))
    empty = route(logits, RULES["relu"], num_choices=1, token_mask=jnp.zeros(1, bool)).stats
    assert CONTROLLER.update(jnp.float32(0.3), jnp.float32(0), empty, 1)[0] == jnp.float32(0.3)
    stats, level = route(logits, RULES["relu"], num_choices=1).stats, jnp.float32(1e-8)
    for _ in range(200):
        level, _ = CONTROLLER.update(level, jnp.float32(0), stats, 1)
    assert level == 1e4


def test_a_trained_router_reaches_the_target_sparsity_and_holds_it():
    """With experts that are vectors the layer is a ReLU network; its teacher is one too, of half its units active."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8))
    x[:, 0] = 1.0  # with features of zero mean alone, half of a linear router's logits are positive for ever
    x, y = jnp.asarray(x), jnp.asarray(np.maximum(x @ rng.normal(size=(8, 8)), 0) @ rng.normal(size=(8, 4)))
    params = {"router": jnp.asarray(rng.normal(size=(8, 8)) / 8**0.5), "values": jnp.asarray(rng.normal(size=(8, 4)))}
    optimizer, num_choices = optax.adam(0.02), 2

    def loss(params, level):
        output = route(x @ params["router"], RULES["relu"], num_choices=num_choices)
        gates, values = output.plan.gates, jnp.append(params["values"], jnp.zeros((1, 4)), 0)
        error = y - jnp.einsum("tk,tkd->td", gates, values[output.plan.expert_ids])
        return jnp.mean(error**2) + CONTROLLER.penalty(level, output.stats, num_choices), output.stats

    def step(state, _):
        params, opt_state, level = state
        grads, stats = jax.grad(loss, has_aux=True)(params, level)
        updates, opt_state = optimizer.update(grads, opt_state)
        level, _ = CONTROLLER.update(level, jnp.float32(0), stats, num_choices)
        return (optax.apply_updates(params, updates), opt_state, level), 1 - stats.chosen.sum() / (256 * 8)

    start = params, optimizer.init(params), jnp.float32(CONTROLLER.start)
    sparsity = np.asarray(jax.jit(lambda state: jax.lax.scan(step, state, length=400))(start)[1])
    assert sparsity[0] < 0.6
    np.testing.assert_allclose(sparsity[200:].reshape(-1, 50).mean(1), 1 - num_choices / 8, atol=0.03)


def test_all_layers_share_one_weight_and_layers_that_are_steered_alone_do_not():
    known = {"chosen": jnp.array([[1.0] * 4, [12.0] * 4]), "num_tokens": jnp.array([12.0, 12.0])}
    stats = RouterStats(**{field.name: jnp.zeros(2) for field in dataclasses.fields(RouterStats)} | known)
    levels = {}
    for rule, settings in (("relu", {}), ("top_p", {"target": 2.0, "start": 0.6})):
        model = Decoder(dataclasses.replace(TINY, rule=rule, rule_settings=settings), key=jax.random.key(0))
        model.update_balance(stats, get_balancer("none"))
        levels[rule] = np.asarray(model.stacks[1].feed_forward.level[...])
    # Together 52 choices of 24 tokens are more than 2 a token. Alone, the first layer is under 2 and the second over.
    np.testing.assert_allclose(levels["relu"], [1.2e-8, 1.2e-8], rtol=1e-6)
    assert levels["top_p"][0] > 0.6 > levels["top_p"][1]


def test_the_penalty_is_in_the_loss_and_micro_batches_do_not_change_it():
    config = dataclasses.replace(TINY, layers=("moe",), rule="relu", rule_settings={"start": 0.5})
    optimizer, tokens = optax.sgd(1.0), jnp.asarray(np.random.default_rng(0).integers(0, 19, (4, 7)), jnp.int32)
    graphdef, state = init_state(lambda key: Decoder(config, key=key), jax.random.key(0), optimizer)
    ends, losses = [], []
    for parts in (1, 2):
        step = make_train_step(graphdef, optimizer, LossConfig(balance=0.0, z=0.0, micro_batches=parts))
        after, metrics = jax.jit(step)(state, tokens, jnp.ones((4, 7), bool))
        ends.append(after.params)
        losses.append(metrics["loss"] - metrics["cross_entropy"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *ends)
    stats = jax.jit(lambda tokens: merge_model(graphdef, state)(tokens)[1].stats)(tokens[:, :-1])
    by_hand = 0.5 / 24 * (4 / (2 * 24)) * (stats.chosen * stats.gate_sums).sum()  # T = 24, E = 4, K = 2
    np.testing.assert_allclose(losses, [by_hand, by_hand], rtol=1e-4)
