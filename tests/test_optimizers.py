"""Every optimizer against its paper in NumPy for three steps; groups, schedules and the moving average by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.models.decoder import Decoder
from moe_jax.runs import ConfigError, section
from moe_jax.training.averaging import evaluated
from moe_jax.training.optimizer import DIRECTIONS, OptimizerConfig, learning_rate_schedule, make_optimizer
from moe_jax.training.step import LossConfig, TrainState, init_state, make_train_step
from tests.tiny_model import TINY

STEPS = 3
# The paths decide: a stacked pair of matrices per layer and expert, a scale, and an unstacked matrix.
SHAPES = {
    "embedding": (2, 5, 4),
    "norm": {"scale": (4,)},
    "stacks": {"experts": {"w_in": (2, 3, 140, 130)}, "router": {"kernel": (2, 4, 3)}},
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def run(config, num_steps=STEPS):
    """Parameters after each step under gradients that are given, and the last state."""
    optimizer = make_optimizer(config, 10)
    params = jax.tree.map(jnp.asarray, draw(0))
    state, history = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for step in range(num_steps):
        updates, state = update(draw(step + 1), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def oracle(config, direction, num_steps=STEPS):
    """The same in NumPy float64: `direction(step, gradient, parameter, memory)` of one matrix, decay, rate."""
    params = jax.tree.map(np.float64, draw(0))
    memory, history = {}, []
    for step in range(num_steps):
        grads = jax.tree.map(np.float64, draw(step + 1))
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
        rate = rate_by_hand(config, step)

        def move(path, parameter, gradient, step=step, norm=norm, rate=rate):
            name = jax.tree_util.keystr(path)
            gradient = gradient * min(1.0, config.clip_norm / norm)
            decay = 0.0 if "scale" in name else config.weight_decay
            axes = 2 if "experts" in name else 1 if "stacks" in name else 0
            moved = np.empty_like(parameter)
            for index in np.ndindex(parameter.shape[:axes]):
                slot = memory.setdefault((name, index), {})
                rest = direction(step, gradient[index], parameter[index], slot) + decay * parameter[index]
                moved[index] = parameter[index] - rate * rest
            return moved

        params = jax.tree_util.tree_map_with_path(move, params, grads)
        history.append(params)
    return history


def rate_by_hand(config, step):
    """Two steps of warm-up to the peak, constant from there."""
    return config.learning_rate * min(step / 2, 1.0)


def adam(config):
    def direction(step, gradient, parameter, memory):
        del parameter
        memory["m"] = config.b1 * memory.get("m", 0) + (1 - config.b1) * gradient
        memory["v"] = config.b2 * memory.get("v", 0) + (1 - config.b2) * gradient**2
        m, v = memory["m"] / (1 - config.b1 ** (step + 1)), memory["v"] / (1 - config.b2 ** (step + 1))
        return m / (np.sqrt(v) + 1e-8)

    return direction


def adafactor(step, gradient, parameter, memory):
    """1804.04235, algorithms 4 and 5: factored where both sides have 128 numbers; beta2 = 1 - t^-0.8."""
    beta, squared = 1 - (step + 1) ** -0.8, gradient**2 + 1e-30
    if sorted(gradient.shape)[-2:-1] >= [128]:
        memory["row"] = beta * memory.get("row", 0) + (1 - beta) * squared.mean(1)
        memory["column"] = beta * memory.get("column", 0) + (1 - beta) * squared.mean(0)
        second = np.outer(memory["row"], memory["column"]) / memory["row"].mean()
    else:
        memory["v"] = second = beta * memory.get("v", 0) + (1 - beta) * squared
    update = gradient / np.sqrt(second)
    update /= max(1.0, np.sqrt(np.square(update).mean()))
    return update * max(np.sqrt(np.square(parameter).mean()), 1e-3)


CONSTANT = OptimizerConfig(learning_rate=0.05, warmup_steps=2, schedule="constant", weight_decay=0.3)


def assert_close(ours, theirs, rtol=2e-4, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def test_adamw():
    assert_close(run(CONSTANT)[0], oracle(CONSTANT, adam(CONSTANT)))


def test_adafactor_of_each_layer_and_expert():
    config = dataclasses.replace(CONSTANT, name="adafactor")
    history, state = run(config)
    assert_close(history, oracle(config, adafactor))
    factored = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape[:2] == (2, 3) and leaf.ndim == 3]
    assert sorted(factored)[-2:] == [(2, 3, 130), (2, 3, 140)], "a row and a column of numbers for each expert"


def test_schedule_free_and_what_it_evaluates():
    """2405.15682, eq. 1-3: z follows Adam's steps from y, x averages z by the squared rate, y lies between them."""
    config = dataclasses.replace(CONSTANT, name="schedule_free")
    history, state = run(config)
    x = z = y = jax.tree.map(np.float64, draw(0))
    memory, total = {}, 0.0
    for step in range(STEPS):
        grads = jax.tree.map(np.float64, draw(step + 1))
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))

        def move(path, z, y, gradient, step=step, norm=norm):
            name = jax.tree_util.keystr(path)
            slot = memory.setdefault(name, {})
            direction = adam(dataclasses.replace(config, b1=0.0))(step, gradient * min(1, 1 / norm), y, slot)
            decay = 0.0 if "scale" in name else config.weight_decay
            return z - rate_by_hand(config, step) * (direction + decay * y)

        z = jax.tree_util.tree_map_with_path(move, z, y, grads)
        weight = rate_by_hand(config, step + 1) ** 2  # optax counts the averages from 1
        total += weight
        x = jax.tree.map(lambda x, z, c=weight / total: (1 - c) * x + c * z, x, z)
        y = jax.tree.map(lambda x, z: config.b1 * x + (1 - config.b1) * z, x, z)
        assert_close(history[step], y)
    trained = TrainState(history[-1], {}, state, jnp.int32(STEPS))
    assert_close(evaluated(trained), x)
    assert np.abs(np.asarray(evaluated(trained)["embedding"]) - history[-1]["embedding"]).max() > 1e-3


def test_muon_orthogonalises_each_matrix_and_decays_like_the_others():
    """Newton-Schulz makes all singular values of an update nearly one: their spread falls within the known band."""
    config = dataclasses.replace(CONSTANT, name="muon", warmup_steps=0, weight_decay=0.0)
    (first,), _ = run(config, 1)
    moved = (draw(0)["stacks"]["experts"]["w_in"] - np.asarray(first["stacks"]["experts"]["w_in"])) / 0.05
    singular = np.linalg.svd(moved / (0.2 * np.sqrt(140)), compute_uv=False)
    assert singular.shape == (2, 3, 130) and (singular > 0.5).mean() > 0.97 and singular.max() < 1.3
    tables = np.abs(draw(0)["embedding"] - np.asarray(first["embedding"]))
    assert np.ptp(tables) < 1e-3 * tables.max(), "Adam moves every number of an embedding by the same in its first step"
    decayed = run(dataclasses.replace(config, weight_decay=0.3), 1)[0][0]
    expected = jax.tree_util.tree_map_with_path(
        lambda path, plain, start: plain - (0 if "scale" in jax.tree_util.keystr(path) else 0.05 * 0.3 * start),
        first,
        draw(0),
    )
    assert_close(decayed, expected, atol=1e-6)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_groups_scale_updates_and_set_decay(name):
    """Half the rate for the router, none for the embedding, and a scale that decays at last."""
    schedule = "constant" if name == "schedule_free" else "cosine"
    plain = OptimizerConfig(name=name, warmup_steps=0, schedule=schedule, weight_decay=0.0, learning_rate=0.1)
    groups = (
        {"pattern": "*router*", "learning_rate_factor": 0.5},
        {"pattern": "embedding", "learning_rate_factor": 0.0},
        {"pattern": "norm/*", "weight_decay": 0.4},
    )
    values = dataclasses.asdict(plain) | {"groups": groups}
    start, (before,), (after,) = draw(0), run(plain, 1)[0], run(section(OptimizerConfig, values), 1)[0]
    change = jax.tree.map(lambda end, start: end - start, before, start)
    expected = {
        "embedding": start["embedding"],
        "norm": {"scale": before["norm"]["scale"] - 0.1 * 0.4 * start["norm"]["scale"]},
        "stacks": {
            "experts": before["stacks"]["experts"],
            "router": {"kernel": start["stacks"]["router"]["kernel"] + 0.5 * change["stacks"]["router"]["kernel"]},
        },
    }
    assert_close(after, expected, atol=1e-6)


def test_a_group_without_parameters_is_refused_with_the_paths():
    groups = ({"pattern": "*router*"}, {"pattern": "*routr*"})
    config = section(OptimizerConfig, {"groups": groups}, "config.optimizer")
    with pytest.raises(ConfigError, match=r"'\*routr\*' matches no parameter.*stacks/1/feed_forward/router/kernel"):
        init_state(lambda key: Decoder(TINY, key=key), jax.random.key(0), make_optimizer(config, 10))
    shadowed = section(OptimizerConfig, {"groups": ({"pattern": "*"}, {"pattern": "*router*"})})
    with pytest.raises(ConfigError, match="matches no parameter that an earlier one left"):
        init_state(lambda key: Decoder(TINY, key=key), jax.random.key(0), make_optimizer(shadowed, 10))
    with pytest.raises(ConfigError, match=r"unknown key config.optimizer.groups\[0\].factor"):
        section(OptimizerConfig, {"groups": ({"pattern": "*", "factor": 2.0},)}, "config.optimizer")


def test_vectors_do_not_decay_whatever_they_are_called():
    config = dataclasses.replace(
        TINY, read_out_bias=True, attention_settings={"use_bias": True, "use_sinks": True, "qk_norm": "head"}
    )
    params = nnx.state(Decoder(config, key=jax.random.key(0)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf + 1.0, params)
    rule = make_optimizer(OptimizerConfig(weight_decay=1.0, warmup_steps=0, learning_rate=0.1), 10)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    still = {str(path[-2].key) for path, update in jax.tree_util.tree_leaves_with_path(updates) if not update.any()}
    assert still == {"scale", "read_out_bias", "qkv_bias", "sinks", "query_norm", "key_norm"}


def test_schedules_by_hand():
    # 10 warm-up steps to 1, constant to step 80, then 20 steps down to 0.1.
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, schedule="wsd", decay_fraction=0.2)
    values = [float(learning_rate_schedule(config, 100)(step)) for step in (0, 5, 10, 79, 80, 90, 100, 120)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 1, 1, 0.55, 0.1, 0.1], atol=1e-6)
    constant = dataclasses.replace(config, schedule="constant", heal_fraction=0.5)
    values = [float(learning_rate_schedule(constant, 100, 20)(step)) for step in (0, 5, 10, 99, 100, 110, 120)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 1, 0.5, 0.3, 0.1], atol=1e-6)


def test_schedule_free_refuses_what_it_replaces():
    with pytest.raises(ConfigError, match=r"config.optimizer: name='schedule_free' averages.*got 'cosine'"):
        section(OptimizerConfig, {"name": "schedule_free"}, "config.optimizer")
    with pytest.raises(ConfigError, match=r"average_decay=1.0 must be in \[0, 1\)"):
        section(OptimizerConfig, {"average_decay": 1.0})


def test_the_moving_average_is_the_weighted_sum_of_all_steps():
    # After 3 steps of decay 0.6: weights 0.4 * (0.36, 0.6, 1) / (1 - 0.216), which sum to 1.
    config = dataclasses.replace(CONSTANT, average_decay=0.6)
    history, state = run(config)
    weights = 0.4 * np.array([0.36, 0.6, 1.0]) / (1 - 0.216)
    assert abs(weights.sum() - 1) < 1e-12
    expected = jax.tree.map(
        lambda *leaves: sum(w * np.asarray(x) for w, x in zip(weights, leaves, strict=True)), *history
    )
    assert_close(evaluated(TrainState(history[-1], {}, state, jnp.int32(3))), expected, atol=1e-6)
    assert_close(history, run(CONSTANT)[0], rtol=0, atol=0)  # training itself is left alone


def test_without_average_the_parameters_are_evaluated():
    history, state = run(CONSTANT)
    assert evaluated(TrainState(history[-1], {}, state, jnp.int32(3))) is history[-1]


@pytest.mark.parametrize("name", ["adafactor", "schedule_free"])
def test_training_memorises_a_batch(name):
    schedule = "constant" if name == "schedule_free" else "cosine"
    rate = 0.1 if name == "adafactor" else 1e-2
    config = OptimizerConfig(name=name, schedule=schedule, learning_rate=rate, warmup_steps=5, average_decay=0.0)
    rule = make_optimizer(config, 50)
    graphdef, state = init_state(lambda key: Decoder(TINY, key=key), jax.random.key(0), rule)
    step = jax.jit(make_train_step(graphdef, rule, LossConfig()))
    tokens = np.random.default_rng(0).integers(0, 19, (8, 13)).astype(np.int32)
    losses = []
    for _ in range(50):
        state, metrics = step(state, tokens, np.ones((8, 13), bool))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0], losses[::10]
