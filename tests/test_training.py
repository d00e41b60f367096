"""The training step: exact accumulation, exact gradients, a real decrease, and a stop on non-finite numbers."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.models.decoder import Decoder
from moe_jax.routing import get_balancer
from moe_jax.training.loop import NonFiniteError, train
from moe_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from moe_jax.training.step import LossConfig, init_state, make_train_step, merge_model
from moe_jax.types import RouterStats
from tests.tiny_model import TINY

CONFIG = dataclasses.replace(TINY, vocab_size=32)


def setup(loss=LossConfig(), optimizer=OptimizerConfig(warmup_steps=1), config=CONFIG):  # noqa: B008
    rule = make_optimizer(optimizer, 50)
    graphdef, state = init_state(lambda key: Decoder(config, key=key), jax.random.key(0), rule)
    return graphdef, state, make_train_step(graphdef, rule, loss)


def batch(seed=0, size=8, length=13):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (size, length)).astype(np.int32)
    mask = np.arange(length)[None, :] < rng.integers(3, length + 1, (size, 1))
    return tokens, mask


# Every loss at once, each heavy enough that leaving it out or scaling it wrongly would show.
ALL_LOSSES = LossConfig(
    balance=1.0,
    balance_sequence=0.7,
    balance_token=0.4,
    importance=0.5,
    load=0.5,
    entropy=-0.3,
    global_entropy=0.6,
    z=0.1,
    balancer="quantile",
    balancer_settings={"rate": 0.5},
)
FINE = dataclasses.replace(CONFIG, layers=("moe",), stats_level="token", bias_bins=50)


def two_steps(loss, config, place=lambda x: x):
    """Parameters, balance state and metrics after two steps."""
    _, state, step = setup(loss, config=config)
    step = jax.jit(step)
    for seed in range(2):
        state, metrics = step(state, *map(place, batch(seed)))
    return state.params, state.balance, metrics


@pytest.fixture(scope="module")
def all_losses():
    """Two steps with every loss, the batch in one piece on one device."""
    return two_steps(ALL_LOSSES, FINE)


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, theirs)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_equals_one_large_batch_losses_included(micro_batches):
    """Padding is uneven over micro-batches, so a wrong mean would show."""
    loss = LossConfig(balance=1.0, z=0.1, balancer="sign", balancer_settings={"rate": 0.01})
    parts = dataclasses.replace(loss, micro_batches=micro_batches)
    assert_same(two_steps(loss, CONFIG), two_steps(parts, CONFIG))


def test_accumulation_is_exact_for_all_losses_at_once(all_losses):
    assert np.abs(jax.tree.leaves(all_losses[1])[0]).max() > 0  # the quantiles moved the bias
    assert_same(all_losses, two_steps(dataclasses.replace(ALL_LOSSES, micro_batches=4), FINE))


def test_a_batch_over_devices_gives_the_step_of_one_device(all_losses):
    """Every loss is of the global batch: sums over devices come first, whatever the padding on each of them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert_same(all_losses, two_steps(ALL_LOSSES, FINE, place=lambda x: jax.device_put(x, spread)))


@pytest.mark.parametrize("weight", ["balance_sequence", "balance_token"])
def test_coarse_statistics_are_refused(weight):
    level = weight.removeprefix("balance_")
    coarser = {"sequence": "batch", "token": "sequence"}[level]
    _, state, step = setup(LossConfig(**{weight: 0.1}), config=dataclasses.replace(CONFIG, stats_level=coarser))
    with pytest.raises(ValueError, match=f"loss.{weight}=0.1 needs statistics of each {level}.*stats_level='{level}'"):
        jax.jit(step)(state, *batch())


def test_quantile_balancing_needs_a_histogram():
    _, state, step = setup(LossConfig(balancer="quantile"))
    with pytest.raises(ValueError, match="build the model with bias_bins=1000"):
        jax.jit(step)(state, *batch())
    with pytest.raises(ValueError, match="bias_bins=10 needs a rule that takes the K best of scores plus bias"):
        dataclasses.replace(CONFIG, rule="top_p", bias_bins=10)
    with pytest.raises(ValueError, match="balancer 'sign' has no setting 'speed'; it has: rate"):
        setup(LossConfig(balancer="sign", balancer_settings={"speed": 1}))


def test_metrics_name_every_loss_and_the_violation(all_losses):
    _, _, metrics = all_losses
    weights = [f.name for f in dataclasses.fields(LossConfig) if f.type in ("float", float)]
    assert {f"{name}_loss" for name in weights} <= set(metrics)
    load = np.asarray(metrics["load"])
    np.testing.assert_allclose(metrics["max_violation"], load.max(1) / load.mean(1) - 1, rtol=1e-5)
    penalties = sum(getattr(ALL_LOSSES, name) * np.asarray(metrics[f"{name}_loss"]) for name in weights)
    np.testing.assert_allclose(metrics["loss"], metrics["cross_entropy"] + penalties.mean(), rtol=1e-5)


def test_the_compiled_initialisation_is_the_models_own():
    rule = optax.adam(0.1)
    graphdef, state = init_state(lambda key: Decoder(CONFIG, key=key), jax.random.key(7), rule)
    model = Decoder(CONFIG, key=jax.random.key(7))
    assert graphdef == nnx.graphdef(model)
    params = nnx.state(model, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, rule.init(params))
    assert int(state.step) == 0


def test_step_is_the_gradient_of_the_stated_loss():
    """One step of plain gradient descent equals the loss written out from the model's output."""
    config, tokens_mask = LossConfig(balance=0.5, balance_sequence=0.3, z=0.1), batch(3)
    rule = optax.sgd(1.0)
    by_sequence = dataclasses.replace(CONFIG, stats_level="sequence")
    graphdef, state = init_state(lambda key: Decoder(by_sequence, key=key), jax.random.key(0), rule)
    after, _ = jax.jit(make_train_step(graphdef, rule, config))(state, *tokens_mask)

    def stated(params):
        tokens, mask = (jnp.asarray(x) for x in tokens_mask)
        logits, routed = nnx.merge(graphdef, params, state.balance)(tokens[:, :-1], mask[:, :-1], trace="full")
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
        is_target = mask[:, 1:]
        loss = -jnp.where(is_target, picked, 0).sum() / is_target.sum()
        for layer in range(2):
            p = jax.nn.softmax(routed.logits[layer])[mask[:, :-1].reshape(-1)]
            ids = routed.plan.expert_ids[layer][mask[:, :-1].reshape(-1)]
            f = jnp.stack([(ids == e).mean() for e in range(4)])
            z = jax.nn.logsumexp(routed.logits[layer][mask[:, :-1].reshape(-1)], -1)
            loss += 0.5 * 4 * jnp.sum(f * p.mean(0)) / 2 + 0.1 * jnp.square(z).mean() / 2
            ends = np.cumsum(tokens_mask[1][:, :-1].sum(1))
            for p_own, ids_own in zip(jnp.split(p, ends[:-1]), jnp.split(ids, ends[:-1]), strict=True):
                f_own = jnp.stack([(ids_own == e).mean() for e in range(4)])
                share = len(ids_own) / len(ids)
                loss += 0.3 * share * 4 * jnp.sum(f_own * p_own.mean(0)) / 2
        return loss

    expected = jax.tree.map(lambda p, g: p - g, state.params, jax.grad(stated)(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after.params, expected)


def test_padding_changes_nothing():
    _, state, step = setup(LossConfig(balance=1.0))
    tokens, mask = batch(4)
    garbage = np.where(mask, tokens, 31)
    first, second = jax.jit(step)(state, tokens, mask), jax.jit(step)(state, garbage, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, second)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_memorises_a_batch(optimizer):
    settings = OptimizerConfig(name=optimizer, learning_rate=1e-2, warmup_steps=5)
    _, state, step = setup(optimizer=settings)
    step = jax.jit(step)
    losses = []
    for _ in range(50):
        state, metrics = step(state, *batch(5))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 50


def test_a_model_without_moe_layers_trains():
    _, state, step = setup(config=dataclasses.replace(CONFIG, layers=("dense",)))
    _, metrics = jax.jit(step)(state, *batch(7))
    assert set(metrics) == {"loss", "cross_entropy", "grad_norm"} and metrics["loss"] == metrics["cross_entropy"]


def test_bias_rule_updates_once_per_step_and_stays_out_of_the_optimizer():
    graphdef, state, step = setup(LossConfig(balancer="sign", balancer_settings={"rate": 0.01}))
    after, _ = jax.jit(step)(state, *batch(6))
    biases = np.asarray(merge_model(graphdef, after).stacks[1].feed_forward.bias[...])
    assert biases.shape == (2, 4) and np.abs(biases).max() > 0
    np.testing.assert_allclose(biases.mean(-1), 0, atol=1e-7)
    assert "bias" not in str(jax.tree.structure(after.params))


def test_balance_update_takes_layers_in_order():
    """Two routed layers on either side of a dense one: the first overloads expert 0, the second expert 1."""
    model = Decoder(dataclasses.replace(CONFIG, layers=("moe", "dense", "moe")), key=jax.random.key(0))
    chosen, zeros = jnp.array([[4.0, 0, 2, 2], [0.0, 4, 2, 2]]), jnp.zeros(2)
    stats = RouterStats(chosen, chosen, chosen, *([zeros] * 6), chosen, chosen)
    model.update_balance(stats, get_balancer("sign", rate=0.1))
    first, second = (model.stacks[i].feed_forward.bias[...] for i in (0, 2))
    np.testing.assert_allclose(first, [[-0.1, 0.1, 0, 0]], atol=1e-7)
    np.testing.assert_allclose(second, [[0.1, -0.1, 0, 0]], atol=1e-7)


def test_schedule_by_hand():
    # 10 warm-up steps to the peak of 1, then a cosine over 90 steps down to 0.1; half way it is at (1 + 0.1) / 2.
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, heal_fraction=0.5)
    schedule = learning_rate_schedule(config, 100)
    values = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 120)]
    np.testing.assert_allclose(values, [0, 0.5, 1.0, 0.55, 0.1, 0.1], atol=1e-6)
    schedule = learning_rate_schedule(config, 100, heal_steps=20)
    values = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 110, 120)]
    np.testing.assert_allclose(values, [0, 0.5, 1.0, 0.55, 0.5, 0.3, 0.1], atol=1e-6)


def test_norm_scales_do_not_decay():
    rule = make_optimizer(OptimizerConfig(weight_decay=1.0, warmup_steps=0, learning_rate=0.1), 10)
    params = nnx.state(Decoder(CONFIG, key=jax.random.key(0)), nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(zeros, rule.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_scale = "scale" in jax.tree_util.keystr(path)
        assert (np.abs(update).max() == 0) == is_scale, path


def batches(count, poison=None):
    for number in range(count):
        tokens, mask = batch(number)
        yield types.SimpleNamespace(
            tokens=tokens if number != poison else np.full_like(tokens, 31), mask=mask, segments=None
        )


def test_loop_records_every_step_and_saves_on_time():
    _, state, step = setup()
    saved, recorded = [], []
    train(
        state,
        step,
        batches(7),
        checkpoint_every=3,
        save=lambda number, _: saved.append(number),
        record=lambda number, metrics: recorded.append((number, float(metrics["loss"]))),
    )
    assert saved == [3, 6, 7] and [number for number, _ in recorded] == list(range(1, 8))


def test_non_finite_loss_stops_with_step_cause_and_checkpoint():
    """An embedding row that is infinite is reached only by batch 5, which consists of that token."""
    _, state, step = setup()
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["embedding"] = params["embedding"].replace(params["embedding"][...].at[:, 31].set(jnp.inf))
    clean = [
        types.SimpleNamespace(tokens=np.minimum(b.tokens, 30) if n != 4 else b.tokens, mask=b.mask, segments=None)
        for n, b in enumerate(batches(7, poison=4))
    ]
    saved = []
    with pytest.raises(NonFiniteError, match="cross_entropy is nan at step 5; the last good checkpoint is step 4"):
        train(
            dataclasses.replace(state, params=params),
            step,
            clean,
            checkpoint_every=2,
            save=lambda number, _: saved.append(number),
            record=lambda *_: None,
        )
    assert saved == [2, 4]
