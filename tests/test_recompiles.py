"""A second compilation of a function that should have one program is a warning that names its cause."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.models.decoder import Decoder
from moe_jax.training.compiles import RecompileWarning, compile_counter, warn_of_recompiles
from moe_jax.training.loop import train
from moe_jax.training.step import LossConfig, init_state, make_train_step
from tests.tiny_model import TINY


def batch(length, dtype=np.int32):
    return types.SimpleNamespace(tokens=np.ones((2, length), dtype), mask=np.ones((2, length), bool), segments=None)


def run(batches):
    rule = optax.sgd(0.1)
    graphdef, state = init_state(lambda key: Decoder(TINY, key=key), jax.random.key(0), rule)
    step = make_train_step(graphdef, rule, LossConfig())
    return train(state, step, batches, checkpoint_every=9, save=lambda *_: None, record=lambda *_: None)


def test_the_loop_names_the_batch_that_changed_shape():
    cause = r"call 3 compiled the training step again: tokens was int32\[2, 9\] and is int32\[2, 7\]; mask was bool"
    with pytest.warns(RecompileWarning, match=cause):
        run([batch(9), batch(9), batch(7)])


def test_the_loop_is_silent_when_nothing_changes():
    run([batch(9)] * 4)  # a warning is an error here


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        (np.ones(3, np.float16), r"x was float32\[3\] and is float16\[3\]"),
        ([np.ones(3, np.float32)] * 2, r"x was float32\[3\] and is absent; x/0 was absent and is float32\[3\]"),
        (jnp.ones(3) * 1.0, None),
        (1.0, r"x was float32\[3\] and is float32\[\] \(a Python number's weak dtype\)"),
    ],
)
def test_causes(second, cause):
    double = warn_of_recompiles(jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x)), "double", ("x",))
    double(np.ones(3, np.float32))
    if cause is None:
        double(second)
    else:
        with pytest.warns(RecompileWarning, match="call 2 compiled double again: " + cause):
            double(second)


def test_a_new_sharding_is_a_cause():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    double = warn_of_recompiles(jax.jit(lambda x: x * 3), "triple", ("x",))
    double(jnp.ones(8))
    with pytest.warns(RecompileWarning, match=r"and is float32\[8\] on NamedSharding\(.*'data'"):
        double(jax.device_put(jnp.ones(8), spread))


def test_programs_are_counted():
    counter = compile_counter()
    before, seconds = counter.count, counter.seconds
    function = jax.jit(lambda x: jnp.cos(x) * 5)
    function(np.ones(3)), function(np.zeros(3))
    assert counter.count == before + 1 and counter.seconds > seconds
    function(np.ones(4))
    assert counter.count == before + 2
