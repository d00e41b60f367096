"""The dense twin: exact where whole numbers allow, nearest otherwise, and a model that runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.models.decoder import Decoder
from moe_jax.models.twin import Pair, dense_twin, receipt
from tests.tiny_model import TINY

CONFIGS = {
    "default": DecoderConfig(),
    "tiny": TINY,
    "fine-grained": dataclasses.replace(TINY, num_experts=33, num_choices=5, layers=("moe", "dense", "moe", "moe")),
    "all MoE": dataclasses.replace(TINY, layers=("moe",) * 3, num_experts=3, num_choices=1, context=2),
}


def test_equal_flops_by_hand():
    # One dense layer of 256 and three of 2 experts of 48; a router of 16 experts is as much as 16 / 3 hidden units:
    # (256 + 3 * (96 + 16 / 3)) / 4 = 140, with nothing left over.
    twin = dense_twin(DecoderConfig())
    assert twin.layers == ("dense",) * 4
    assert twin.dense_hidden == 140
    bill = receipt(DecoderConfig(), twin, sequence_length=256)
    assert bill.flops.ratio == bill.active_parameters.ratio == 1
    assert bill.flops.original == bill.flops.twin == model_cost(DecoderConfig(), 256).flops


def test_equal_parameters_by_hand():
    # All 16 experts: (256 + 3 * (16 * 48 + 16 / 3)) / 4 = 644.
    twin = dense_twin(DecoderConfig(), "parameters")
    assert twin.dense_hidden == 644
    assert receipt(DecoderConfig(), twin, 256).parameters.ratio == 1


def test_receipt_says_what_is_left():
    # (12 + 2 * (12 + 4 / 3)) / 3 = 12.9 becomes 13: three layers of 3 x 16 x 13 parameters instead of the 576 of the
    # dense layer, two routers of 64 and four experts of 288.
    twin = dense_twin(TINY)
    assert twin.dense_hidden == 13
    active = receipt(TINY, twin, 5).active_parameters
    assert active.twin - active.original == 3 * 624 - (576 + 2 * 64 + 4 * 288) == 16
    assert active == Pair(active.original, active.original + 16, 1 + 16 / active.original)


@pytest.mark.parametrize("match", ["flops", "active_parameters", "parameters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_other_width_is_nearer(name, match):
    config = CONFIGS[name]
    twin = dense_twin(config, match)
    target = getattr(model_cost(config, 7), match)

    def distance(hidden):
        return abs(getattr(model_cost(dataclasses.replace(twin, dense_hidden=hidden), 7), match) - target)

    assert distance(twin.dense_hidden) <= min(distance(twin.dense_hidden - 1), distance(twin.dense_hidden + 1))
    assert twin == dataclasses.replace(config, layers=twin.layers, dense_hidden=twin.dense_hidden)


@pytest.mark.parametrize("match", ["flops", "parameters"])
def test_twin_runs_and_has_the_parameters_of_its_receipt(match):
    twin = dense_twin(TINY, match)
    model = Decoder(twin, key=jax.random.key(0))
    logits, routed = model(jnp.arange(10).reshape(2, 5))
    assert logits.shape == (2, 5, TINY.vocab_size)
    assert jnp.isfinite(logits).all()
    assert routed.stats is None
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert receipt(TINY, twin, 5).parameters.twin == parameters


def test_mean_choices_shrink_the_twin():
    # (12 + (6 + 4 / 3) + (9 + 4 / 3)) / 3 = 9.9.
    twin = dense_twin(TINY, mean_choices=[1.0, 1.5])
    assert twin.dense_hidden == 10
    assert receipt(TINY, twin, 5, [1.0, 1.5]).flops.ratio == pytest.approx(1, rel=0.01)
    assert dense_twin(TINY, mean_choices=[0.0, 0.0]).dense_hidden == 5  # (12 + 8 / 3) / 3 = 4.9


def test_receipt_is_json():
    bill = dataclasses.asdict(receipt(TINY, dense_twin(TINY, "parameters"), 5))
    assert json.loads(json.dumps(bill)) == bill
    assert bill["flops"]["ratio"] > 1


def test_refuses():
    with pytest.raises(ValueError, match="are all dense already"):
        dense_twin(dense_twin(TINY))
    with pytest.raises(ValueError, match="unknown match 'bytes'; known: flops, active_parameters, parameters"):
        dense_twin(TINY, "bytes")
