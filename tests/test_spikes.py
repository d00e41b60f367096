"""A planted spike is left out, counted and recorded; the rest of training does not notice."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.decoder import Decoder
from moe_jax.runs import ConfigError, section
from moe_jax.training.loop import NonFiniteError, TrainingConfig, train
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.spikes import SpikeConfig, skip_spikes, watch_spikes
from moe_jax.training.step import LossConfig, init_state, make_train_step
from tests.tiny_model import TINY

WINDOW = SpikeConfig(window=5, deviations=6.0, most_in_a_row=2)


def counting_step(state, value, norm, topology=None, segments=None):
    """A step whose losses are given, and which adds 1 to everything it may change."""
    added = {name: getattr(state, name) + 1 for name in ("params", "balance", "opt_state", "step")}
    return dataclasses.replace(state, **added), {"loss": value, "grad_norm": norm}


def follow(losses, norms=None, config=WINDOW):
    """Skipped or not, for each step, and the last state."""
    zero = jnp.zeros(())
    state = watch_spikes(Numbers(zero, zero, zero, jnp.int32(0)), config)
    step, skipped = jax.jit(skip_spikes(counting_step, config)), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        state, metrics = step(state, jnp.float32(loss), jnp.float32(norm))
        skipped.append(int(metrics["skipped"]))
        assert int(metrics["num_skipped"]) == sum(skipped)
    return skipped, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """A training state of one number each."""

    params: jax.Array
    balance: jax.Array
    opt_state: jax.Array
    step: jax.Array
    spikes: tuple | None = None


def test_the_limit_by_hand():
    # Losses 2, 4, 3, 5, 1: median 3, deviations 1, 1, 0, 2, 2 with median 1: limit 3 + 6 * 1.4826 = 11.8956.
    # Gradient norms 1: median 1, no deviation: limit 1 + 6 * 0.01.
    before = [2, 4, 3, 5, 1]
    assert follow([*before, 11.8])[0] == [0] * 6
    assert follow([*before, 12.0])[0] == [0] * 5 + [1]
    assert follow([*before, 3], [1.0] * 5 + [1.05])[0] == [0] * 6
    assert follow([*before, 3], [1.0] * 5 + [1.07])[0] == [0] * 5 + [1]


def test_until_the_window_is_full_only_numbers_that_are_not_finite_are_spikes():
    assert follow([1, 1000, 1, np.nan, 1])[0] == [0, 0, 0, 1, 0]
    assert follow([1, 1], [np.inf, 1])[0] == [1, 0]


def test_a_skipped_step_changes_nothing_but_the_number():
    skipped, state = follow([1, 1, 1, 1, 1, 90, 1])
    assert sum(skipped) == 1
    assert [float(x) for x in (state.params, state.balance, state.opt_state, state.step)] == [6, 6, 6, 7]
    assert int(state.spikes.accepted) == 6 and float(state.spikes.values.max()) == 1


def test_a_plateau_is_accepted_after_the_most_in_a_row():
    assert follow([1] * 5 + [90] * 5)[0] == [0] * 5 + [1, 1, 0, 1, 1]
    assert follow([1] * 5 + [90, 1, 90, 1])[0] == [0] * 5 + [1, 0, 1, 0]


SHAPES = {"embedding": (1, 19, 1), "read_out": (1, 19)}


def train_tiny(spikes, name, poison, steps=9):
    """State and metrics after training in which batch 7 consists of token 18, whose vector in `name` is poisoned."""
    rule = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-3), steps)
    graphdef, state = init_state(lambda key: Decoder(TINY, key=key), jax.random.key(0), rule)
    step = make_train_step(graphdef, rule, LossConfig())
    if spikes:
        state, step = watch_spikes(state, spikes), skip_spikes(step, spikes)
    params = jax.tree.map(lambda leaf: leaf, state.params)
    table = params[name][...]
    is_token = (jnp.arange(19) == 18).reshape(SHAPES[name])
    params[name] = params[name].replace(jnp.where(is_token, jnp.broadcast_to(poison, table.shape), table))
    state = dataclasses.replace(state, params=params)
    batches, recorded = [], []
    for number in range(steps):
        tokens = np.random.default_rng(number).integers(0, 18, (8, 13)).astype(np.int32)
        mask = np.ones((8, 13), bool)
        rows = np.full_like(tokens, 18) if number == 6 else tokens
        batches.append(types.SimpleNamespace(tokens=rows, mask=mask, segments=None))
    record = lambda number, metrics: recorded.append(metrics)  # noqa: E731
    state = train(state, step, batches, checkpoint_every=99, save=lambda *_: None, record=record)
    return state, recorded


def test_a_planted_spike_in_training():
    """The read-out finds the token unlikely."""
    state, recorded = train_tiny(SpikeConfig(window=4, deviations=20.0), "read_out", -9.0)
    assert [int(m["skipped"]) for m in recorded] == [0] * 6 + [1, 0, 0]
    assert recorded[6]["loss"] > 2 * recorded[5]["loss"] and recorded[-1]["num_skipped"] == 1
    assert int(state.step) == 9
    unguarded, _ = train_tiny(None, "read_out", -9.0)
    assert not np.allclose(unguarded.params["read_out"][...], state.params["read_out"][...], atol=1e-5)


def test_a_loss_that_is_not_finite_is_left_out_too():
    state, recorded = train_tiny(SpikeConfig(window=4, deviations=20.0), "embedding", np.inf)
    assert not np.isfinite(recorded[6]["loss"]) and np.isfinite(recorded[7]["loss"])
    assert [int(m["skipped"]) for m in recorded] == [0] * 6 + [1, 0, 0]
    assert np.isfinite(state.params["read_out"][...]).all()


def test_losses_that_stay_not_finite_end_the_run():
    with pytest.raises(NonFiniteError, match="cross_entropy is nan at step 3; there is no checkpoint yet"):
        train_tiny(SpikeConfig(window=4, most_in_a_row=2), "read_out", np.nan)


def test_configuration():
    assert section(TrainingConfig, {"steps": 5}).spikes is None
    assert section(TrainingConfig, {"spikes": {"window": 7}}).spikes == SpikeConfig(window=7)
    with pytest.raises(ConfigError, match=r"spikes.window must be positive, got 0"):
        section(TrainingConfig, {"spikes": {"window": 0}}, "config.training")
