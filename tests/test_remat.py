"""Rematerialisation: the same numbers from less memory, and tokens that need not travel again."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from moe_jax.models.config import DecoderConfig
from moe_jax.models.execution import Execution
from moe_jax.training.mesh import MeshConfig, make_mesh, place_batch
from tests.test_mesh_training import batch, setup

CONFIG = DecoderConfig(
    vocab_size=32, width=64, layers=("moe",) * 4, num_heads=4, num_kv_heads=2, num_experts=4, expert_hidden=64
)
POLICIES = ("none", "dots", "dispatch", "layer")


@functools.cache
def compiled(sizes, remat):
    """One step as a program, with its arguments."""
    mesh, state, step = setup(sizes, CONFIG, remat, optimizer=optax.sgd(0.1))
    rows = batch(0, length=33)
    tokens, mask = (x if mesh is None else place_batch(mesh, x) for x in (rows.tokens, rows.mask))
    return jax.jit(step).lower(state, tokens, mask, None).compile(), (state, tokens, mask, None)


def memory(sizes, remat):
    return compiled(sizes, remat)[0].memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", POLICIES[1:])
def test_values_do_not_depend_on_the_policy(remat):
    program, arguments = compiled((1, 4, 1), remat)
    plain, _ = compiled((1, 4, 1), "none")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, program(*arguments)[1], plain(*arguments)[1])


def test_what_is_kept_and_what_travels():
    """The more is computed again, the less is kept; only "layer" and "dots" send the tokens once more."""
    kept = {remat: memory((1, 4, 1), remat) for remat in POLICIES}
    assert kept["layer"] < kept["dispatch"] < kept["none"] and kept["layer"] < kept["dots"] < kept["none"]
    exchanges = {remat: compiled((1, 4, 1), remat)[0].as_text().count(" all-to-all(") for remat in POLICIES}
    assert exchanges["none"] == exchanges["dispatch"] < exchanges["dots"] == exchanges["layer"]


def test_on_one_device():
    assert memory(None, "dispatch") < memory(None, "none")


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="unknown remat 'all'; known: none, layer, dispatch, dots"):
        Execution(remat="all")


def test_a_mesh_is_part_of_the_structure():
    """Models over equal meshes share one compiled program."""
    one, other = (Execution(make_mesh(MeshConfig(1, 2, 2))) for _ in range(2))
    assert hash(one) == hash(other) and one == other != dataclasses.replace(one, remat="layer")
    assert one.dispatch("blocked") == other.dispatch("blocked")
