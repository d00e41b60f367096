"""The training script with trackers, averages and spikes: what it writes, and that a restart finds all of it."""

import numpy as np
from rich.progress import Progress

from experiments.train import train_model
from moe_jax.runs import RunFolder, load_config, override, read_metrics

SIZES = {
    "data.domains": "python",
    "data.domain_weights": "1.0",
    "data.python_bytes": "60000",
    "data.sequence_length": "16",
    "data.batch_size": "4",
    "model.width": "16",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.num_experts": "4",
    "model.expert_hidden": "8",
    "training.steps": "6",
    "training.checkpoint_every": "3",
    "training.spikes": "{'window': 100}",
    "optimizer.average_decay": "0.5",
    "optimizer.schedule": "wsd",
    "tracking.tensorboard": "true",
    "tracking.every": "2",
}


def test_a_run_with_everything(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = override(load_config("configs/train.py"), SIZES)
    with RunFolder(tmp_path / "run", config) as run, Progress(disable=True) as display:
        results = train_model(run, display)
    with RunFolder(tmp_path / "run", config) as run, Progress(disable=True) as display:
        again = train_model(run, display)  # from the last checkpoint, which has the average too
    assert again == results
    assert read_metrics(run.path, "train")["num_skipped"].tolist() == [0.0] * 6
    timing = read_metrics(run.path, "timing")
    assert timing["step"].tolist() == [2, 4, 6]
    assert (timing["mfu"] > 0).all() and (timing["tokens_per_second"] > 0).all()
    events = EventAccumulator(str(run.path / "tracking" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "mfu", "tokens_per_second", "load_p95/layer_1", "entropy_loss/layer_0", "z_loss/layer_1"} <= tags
    losses = events.Scalars("cross_entropy")
    assert [event.step for event in losses] == [2, 4, 6]
    recorded = read_metrics(run.path, "train")["cross_entropy"][[1, 3, 5]]
    np.testing.assert_allclose([event.value for event in losses], recorded, rtol=1e-6)
