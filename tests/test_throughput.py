"""The figures of a run's speed: the MFU formula by hand, rows at their time, cut on a restart."""

import time
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.models.config import DecoderConfig
from moe_jax.runs import MetricsWriter, read_metrics
from moe_jax.training.throughput import PEAK_FLOPS, Meter, peak_flops, peak_memory, useful_flops

CONFIG = DecoderConfig(
    vocab_size=100, width=8, layers=("dense", "moe"), num_heads=2, num_kv_heads=1, dense_hidden=6, num_experts=5,
    expert_hidden=4, num_choices=3,
)  # fmt: skip


def test_useful_flops_by_hand():
    # Per token and layer: queries, keys, values 8 x (2 + 2) x 4 and out 8 x 8: 2 (128 + 64) = 384.
    # Scores and values: 2 heads x (4 + 4) wide, over (9 + 1) / 2 = 5 keys, 2 FLOPs each: 160.
    # Dense: 3 matrices 8 x 6: 288. Experts: 3 x 3 matrices 8 x 4: 576. Read-out: 2 x 8 x 100 = 1600.
    # The router's 2 x 8 x 5 = 80 are left out.
    forward = 2 * (384 + 160) + 288 + 576 + 1600
    assert useful_flops(CONFIG, sequence_length=9) == 3 * forward


def test_soft_moe_has_no_figure():
    soft = DecoderConfig(rule="soft", allow_noncausal=True, rule_settings={"slots_per_expert": 1})
    assert np.isnan(useful_flops(soft, 8))


def test_the_table_comes_before_a_measurement():
    class Device(NamedTuple):
        device_kind: str

    assert peak_flops(Device("NVIDIA H200")) == PEAK_FLOPS["NVIDIA H200"] == 989e12


def test_an_unknown_device_is_measured_once():
    measured = peak_flops(jax.devices()[0])
    assert 1e8 < measured < 1e14
    assert peak_flops(jax.devices()[0]) == measured


def test_rows(tmp_path):
    """Seven steps of 20 ms, one of which waits ten times as long for a checkpoint; a row every third step."""
    meter = Meter(
        MetricsWriter(tmp_path, "timing"),
        tokens_per_step=50,
        flops_per_token=100.0,
        every=3,
        num_devices=2,
    )
    meter.start(0)
    rows = {}
    for step in range(1, 8):
        time.sleep(0.2 if step == 2 else 0.02)
        rows[step] = meter.record(step)
    meter.flush()
    columns = read_metrics(tmp_path, "timing")
    assert columns["step"].tolist() == [3, 6] == [step for step, row in rows.items() if row]
    assert (columns["seconds_per_step"] >= 0.02).all() and (columns["seconds_per_step"] < 0.2).all()
    np.testing.assert_allclose(columns["tokens_per_second"], 50 / columns["seconds_per_step"])
    np.testing.assert_allclose(columns["mfu"], columns["tokens_per_second"] * 100 / (2 * peak_flops(jax.devices()[0])))
    assert rows[3]["mfu"] == columns["mfu"][0]
    meter.start(4)
    meter.flush()
    assert read_metrics(tmp_path, "timing")["step"].tolist() == [3]


def test_memory_is_that_of_the_process_on_cpu():
    block = np.ones(2**25)
    assert peak_memory() >= block.nbytes
