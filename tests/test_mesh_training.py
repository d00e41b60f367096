"""Training over a mesh gives the numbers of one device, whose experts run on the dense oracle, step by step."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.execution import Execution
from moe_jax.training.loop import train
from moe_jax.training.mesh import MeshConfig, check_mesh, make_mesh, place_batch
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, init_state, make_train_step

CONFIG = DecoderConfig(
    vocab_size=32,
    width=16,
    layers=("dense", "moe"),
    num_heads=4,
    num_kv_heads=2,
    dense_hidden=16,
    num_experts=4,
    expert_hidden=8,
    shared_hidden=8,
)
LOSS = LossConfig(balance=0.1, z=0.01, balancer="sign", balancer_settings={"rate": 0.01})
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch as `train` takes it."""

    tokens: np.ndarray
    mask: np.ndarray
    segments: None = None


def batch(seed, size=8, length=13):
    """Padding is uneven over sequences, and so over devices."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length)[None, :] < rng.integers(3, length + 1, (size, 1))
    return Rows(rng.integers(0, 32, (size, length)).astype(np.int32), mask)


def setup(sizes=None, config=CONFIG, remat="none", loss=LOSS, optimizer=None):
    """The mesh, the state on it and the step; on one device without sizes, with the oracle for a backend."""
    mesh = None if sizes is None else make_mesh(MeshConfig(*sizes))
    if mesh is None:
        config = dataclasses.replace(config, backend="dense")
    else:
        check_mesh(mesh, config, 8, loss.micro_batches)
    rule = optimizer or make_optimizer(OptimizerConfig(warmup_steps=5), STEPS)
    execution = Execution(mesh, remat)
    graphdef, state = init_state(
        lambda key: Decoder(config, key=key, execution=execution), jax.random.key(0), rule, mesh
    )
    return mesh, state, make_train_step(graphdef, rule, loss, jax.random.key(1))


def metrics_of_a_run(sizes=None):
    """The metrics of every step, and the placement of the state at the end."""
    mesh, state, step = setup(sizes)
    before = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, state)
    recorded = []
    state = train(
        state,
        step,
        map(batch, range(STEPS)),
        checkpoint_every=STEPS,
        save=lambda number, state: None,
        record=lambda number, metrics: recorded.append(metrics),
        mesh=mesh,
    )
    if mesh is not None:
        assert before == jax.tree.map(lambda leaf: leaf.sharding, state)
    return recorded


def assert_runs_agree(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=2e-5, err_msg=f"{name} at step {step}")


@pytest.fixture(scope="module")
def oracle():
    return metrics_of_a_run()


@pytest.mark.parametrize("sizes", [(2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2)], ids=str)
def test_fifty_steps_equal_those_of_one_device(sizes, oracle):
    assert len(oracle) == STEPS
    assert_runs_agree(metrics_of_a_run(sizes), oracle)


@pytest.mark.slow
def test_fifty_steps_on_eight_devices():
    """All three axes at once, in a process with twice the devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    program = (
        "from tests.test_mesh_training import *\nassert_runs_agree(metrics_of_a_run((2, 2, 2)), metrics_of_a_run())"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parent.parent, env=environment, timeout=600)


def one_step(sizes=None, config=CONFIG, **settings):
    """Parameters after a step of plain gradient descent at rate 1, so that their change is the gradient."""
    mesh, state, step = setup(sizes, config, optimizer=optax.sgd(1.0), **settings)
    rows = batch(3)
    tokens, mask = (x if mesh is None else place_batch(mesh, x) for x in (rows.tokens, rows.mask))
    state, metrics = jax.jit(step)(state, tokens, mask, None)
    return state.params, metrics


LATENT = {"latent_width": 8, "content_width": 4, "rotary_width": 4, "value_width": 4}
ARCHITECTURES = {
    "soft": {"rule": "soft", "allow_noncausal": True, "shared_hidden": 0, "expert": "deep"},
    "everything": {
        "attention": "latent",
        "attention_settings": LATENT,
        "shared_gate": True,
        "expert": "gpt_oss",
        "expert_hidden_sizes": (8, 4, 2, 8),
        "latent_width": 8,
        "zero_compute": ("constant", "copy"),
        "capacity_factor": 0.5,
        "router_settings": {"jitter": 0.1},
        "context": 1,
        "tie_embeddings": True,
        "stats_level": "sequence",
    },
}


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_gradients_equal_the_oracle(changes):
    """Over experts and hidden units at once; capacity drops the same tokens, since routing sees the global batch."""
    config = dataclasses.replace(CONFIG, layers=("moe",), **changes)
    (ours, metrics), (theirs, expected) = one_step((1, 2, 2), config), one_step(None, config)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), metrics, expected)
    if "capacity_factor" in changes:
        assert metrics["dropped"].min() > 0


def test_accumulation_over_a_mesh_equals_one_batch_on_one_device():
    loss = dataclasses.replace(LOSS, balance_sequence=0.2)
    config = dataclasses.replace(CONFIG, layers=("moe",), stats_level="sequence")
    parts = dataclasses.replace(loss, micro_batches=2)
    ours, theirs = one_step((2, 2, 1), config, loss=parts), one_step(None, config, loss=loss)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, theirs)
