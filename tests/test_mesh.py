"""A mesh in the config, what it refuses, where the arrays of a training state lie, and that they are created there."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs import ConfigError, section
from moe_jax.training.mesh import AXES, MeshConfig, check_mesh, make_mesh, place_batch, state_shardings
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import init_state, state_of

CONFIG = DecoderConfig(
    vocab_size=64, width=32, layers=("dense", "moe", "moe"), dense_hidden=48, num_experts=4, expert_hidden=16
)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes))


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def abstract_state(config=CONFIG):
    return jax.eval_shape(lambda key: state_of(Decoder(config, key=key), OPTIMIZER), jax.random.key(0))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, 1, 1), (1, 1, 1)), ((-1, 2, 1), (2, 2, 1)), ((1, -1, 1), (1, 4, 1)), ((2, 1, -1), (2, 1, 2))],
)
def test_one_axis_may_take_the_rest(sizes, shape):
    mesh = mesh_of(*sizes)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert {kind.name for kind in mesh.axis_types} == {"Auto"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "config.mesh: data=0, expert=1, tensor=1 must be positive, but for one -1"),
        ({"data": -1, "expert": -1}, "must be positive, but for one -1"),
        ({"data": -1, "expert": 3}, "needs a multiple of 3 devices, there are 4; change the other axes to divisors"),
        ({"data": 2, "expert": 4}, "takes 8 devices, there are 4; give one axis -1 .*device_count=8"),
        ({"dada": 2}, "did you mean 'data'"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_advice(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(section(MeshConfig, sizes, "config.mesh"))


@pytest.mark.parametrize(
    ("sizes", "changes", "batch", "message"),
    [
        ((2, 2, 1), {}, (6, 1), r"batch_size=6 does not divide over mesh.data=2 x mesh.expert=2 devices; take 4 or 8"),
        ((4, 1, 1), {}, (4, 2), r"in each of loss.micro_batches=2; take 8"),
        ((1, 4, 1), {"num_experts": 6}, (8, 1), r"num_experts=6 .* mesh.expert=4; take a multiple of 4, or .*expert=3"),
        ((1, 1, 4), {}, (8, 1), r"model.num_kv_heads=2 does not divide over mesh.tensor=4; take a multiple of 4"),
        ((1, 1, 2), {"num_heads": 1, "num_kv_heads": 1}, (8, 1), "model.num_heads=1"),
        ((1, 1, 2), {"dense_hidden": 33}, (8, 1), "model.dense_hidden=33"),
        ((1, 1, 2), {"expert_hidden": 15}, (8, 1), "model.expert_hidden=15"),
        ((1, 1, 2), {"shared_hidden": 7}, (8, 1), "model.shared_hidden=7"),
        ((1, 1, 2), {"expert": "deep"}, (8, 1), "model.expert='deep' is not a sum over hidden units"),
    ],
)
def test_what_does_not_divide_is_refused_with_advice(sizes, changes, batch, message):
    with pytest.raises(ConfigError, match=message):
        check_mesh(mesh_of(*sizes), dataclasses.replace(CONFIG, **changes), *batch)


def test_what_divides_is_taken():
    for sizes in ((1, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 2)):
        check_mesh(mesh_of(*sizes), CONFIG, 8, 2)
    check_mesh(mesh_of(1, 1, 2), dataclasses.replace(CONFIG, expert="deep", rule="soft", allow_noncausal=True), 8)


def test_places_by_hand():
    shardings = named(state_shardings(abstract_state(), mesh_of(1, 2, 2)))
    expected = {
        "embedding": P(None, "tensor", "expert"),  # [1, V, D]
        "read_out": P("expert", "tensor"),  # [D, V]
        "norm/scale": P(),
        "stacks/0/attention/qkv": P(None, "expert", "tensor", None),  # [L, D, heads, Dh]
        "stacks/1/attention/out": P(None, "tensor", None, "expert"),  # [L, H, Dh, D]
        "stacks/0/feed_forward/experts/w_in": P(None, None, "expert", "tensor"),  # [L, 1, D, 2F]: one dense network
        "stacks/1/feed_forward/experts/w_in": P(None, "expert", None, "tensor"),  # [L, E, D, 2F]
        "stacks/1/feed_forward/experts/w_out": P(None, "expert", "tensor", None),  # [L, E, F, D]
        "stacks/1/feed_forward/router/kernel": P(),
    }
    for name, spec in expected.items():
        for prefix in ("params/", "opt_state/1/0/mu/", "opt_state/1/0/nu/"):  # moments lie with their parameters
            assert shardings[prefix + name].spec == spec, prefix + name
    assert shardings["step"].spec == shardings["opt_state/1/0/count"].spec == P()


def test_what_is_split_over_data_and_experts():
    config = dataclasses.replace(CONFIG, width=48, vocab_size=66, num_experts=6, expert_settings={"use_bias": True})
    shardings = named(state_shardings(abstract_state(config).params, mesh_of(2, 2, 1)))
    assert shardings["stacks/0/attention/qkv"].spec == P(None, ("data", "expert"), None, None)
    assert shardings["stacks/1/feed_forward/experts/w_in"].spec == P(None, "expert", "data", None)
    assert shardings["stacks/1/feed_forward/experts/b_in"].spec == P(None, "expert", None)
    # 6 wide: four parts do not divide it, two do, and they are those of the first axis.
    narrow = jax.ShapeDtypeStruct((2, 6, 8, 4), np.float32)
    assert state_shardings({"attention": {"qkv": narrow}}, mesh_of(2, 2, 1))["attention"]["qkv"].spec[1] == "data"


def test_large_arrays_without_a_line_are_split_and_small_ones_are_not():
    """As the row and column moments of Adafactor, which have the name of a parameter and less axes."""
    tree = {"v_row": {"w_in": jax.ShapeDtypeStruct((2, 256, 512), np.float32)}, "w_in": np.zeros((3, 5), np.float32)}
    shardings = state_shardings(tree, mesh_of(4, 1, 1))
    assert shardings["v_row"]["w_in"].spec == P(None, None, "data")
    assert shardings["w_in"].spec == P()


WIDE = dataclasses.replace(CONFIG, layers=("moe", "moe"), width=256, vocab_size=256, expert_hidden=256)


def build(key):
    return Decoder(WIDE, key=key)


def test_a_state_is_created_where_it_lies():
    mesh = mesh_of(1, 2, 2)
    _, state = init_state(build, jax.random.key(0), OPTIMIZER, mesh)
    _, whole = init_state(build, jax.random.key(0), OPTIMIZER)
    shardings = named(state_shardings(state, mesh))
    for name, leaf in named(state).items():
        assert leaf.sharding == shardings[name]
        if leaf.size >= 2**14:
            assert all(shard.data.size == leaf.size / 4 for shard in leaf.addressable_shards), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state, whole)


def test_no_device_ever_holds_a_whole_matrix():
    """Of the arrays in the program that creates a state, the largest is a quarter of the largest matrix."""

    def create(key):
        return state_of(build(key), OPTIMIZER)

    shardings = state_shardings(jax.eval_shape(create, jax.random.key(0)), mesh_of(2, 2, 1))
    program = jax.jit(create, out_shardings=shardings, compiler_options={"xla_backend_optimization_level": 0})
    text = program.lower(jax.random.key(0)).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"[fsu](?:32|64)\[([\d,]+)\]", text)]
    assert max(sizes) == 2 * 4 * 256 * 2 * 256 / 4  # w_in [L, E, D, 2F]


def test_the_batch_is_split_over_data_and_experts_and_repeated_over_tensor():
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = place_batch(mesh_of(1, 2, 2), rows)
    np.testing.assert_array_equal(placed, rows)
    assert [shard.data[0, 0].item() for shard in placed.addressable_shards] == [0, 0, 12, 12]
