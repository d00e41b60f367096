"""First flips by hand, and on a decoder whose second MoE layer's router was moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.analysis import find_flips
from moe_jax.models.decoder import Decoder
from moe_jax.types import RouterOutput, RoutingPlan
from tests.tiny_model import TINY


def output(expert_ids, logits):
    expert_ids = jnp.asarray(expert_ids, jnp.int32)
    plan = RoutingPlan(expert_ids, jnp.ones(expert_ids.shape), num_experts=3, capacity=None)
    return RouterOutput(plan, None if logits is None else jnp.asarray(logits, jnp.float32), None)


def test_by_hand():
    """Three layers, four tokens, two of three experts; the margin is the second best logit minus the third."""
    logits = np.zeros((3, 4, 3))
    logits[:] = [5.0, 3.0, 2.0]
    logits[1, 1] = [5.0, 3.0, 2.75]
    before = output([[[0, 1]] * 4] * 3, logits)
    after = output(
        [
            [[1, 0], [0, 1], [0, 1], [0, 2]],  # token 0: another order is no flip; token 3 flips
            [[0, 1], [0, 2], [0, 1], [0, 1]],  # token 1 flips
            [[0, 1], [1, 2], [0, 1], [0, 2]],  # both again, which counts as flipped but not as first
        ],
        None,
    )
    flips = find_flips(before, after)
    np.testing.assert_array_equal(flips.flipped, [1, 1, 2])
    np.testing.assert_array_equal(flips.first, [1, 1, 0])
    np.testing.assert_array_equal(flips.layer, [3, 1, 3, 0])
    np.testing.assert_array_equal(flips.margin, [np.nan, 0.25, np.nan, 1.0])
    masked = find_flips(before, after, [True, True, True, False])
    np.testing.assert_array_equal(masked.flipped, [0, 1, 1])
    np.testing.assert_array_equal(masked.layer, [3, 1, 3, 3])


def test_a_moved_router_flips_its_own_layer_first():
    """Only the last router changes, so nothing before it may, and every flip lies within the change of the logits."""
    model = Decoder(TINY, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, TINY.vocab_size)
    _, before = model(tokens, trace="full")
    kernel = model.stacks[1].feed_forward.router.kernel
    noise = 0.05 * jax.random.normal(jax.random.key(2), kernel.shape[1:])
    kernel[...] = kernel[...].at[-1].add(noise)
    _, after = model(tokens, trace="full")
    flips = find_flips(before, after)
    assert flips.first[0] == 0 and 0 < flips.first[1] < tokens.size
    moved = np.abs(np.asarray(after.logits - before.logits)).max(axis=(0, 2))
    is_flipped = flips.layer == 1
    assert (flips.margin[is_flipped] <= 2 * moved[is_flipped]).all()


def test_the_same_routing_has_no_flips():
    graphdef, state = nnx.split(Decoder(TINY, key=jax.random.key(0)))
    _, routed = nnx.merge(graphdef, state)(jnp.arange(12).reshape(2, 6), trace="full")
    flips = find_flips(routed, routed)
    assert flips.flipped.sum() == 0 and np.isnan(flips.margin).all() and (flips.layer == 2).all()


def test_what_is_missing_is_named():
    ids = [[[0, 1]]]
    with pytest.raises(ValueError, match='trace="full"'):
        find_flips(output(ids, None), output(ids, None))
    with pytest.raises(ValueError, match=r"\(1, 1, 2\) and \(1, 2, 2\)"):
        find_flips(output(ids, np.zeros((1, 1, 3))), output([[[0, 1]] * 2], None))
