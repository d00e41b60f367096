"""Texts packed into one row against the same texts one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.models.decoder import Decoder
from moe_jax.nn.routers import REMEMBERING_ROUTERS
from moe_jax.ops.attention import segment_positions, usable_keys
from moe_jax.training.step import LossConfig, init_state, make_train_step
from tests.tiny_model import TINY

LATENT = {"latent_width": 8, "content_width": 4, "rotary_width": 4, "value_width": 6}
FAR = {"far_scale": 0.5, "far_length": 2}
SMALL = dataclasses.replace(TINY, layers=("dense", "moe"))
CONFIGS = {
    "context": dataclasses.replace(SMALL, context=2),
    "patterns": dataclasses.replace(
        SMALL, windows=(3, 0), chunks=(0, 3), turns=(True, False), attention_settings=FAR, backend="blocked"
    ),
    "sinks": dataclasses.replace(SMALL, attention_settings={"use_sinks": True}),
    "latent": dataclasses.replace(SMALL, attention="latent", attention_settings=LATENT),
}
# Rows of 12: texts of 5, 1 and 3 tokens; 4 and 7; one of 11. Padding at the end, so that every token is an input.
SEGMENTS = np.array([[1] * 5 + [2] + [3] * 3 + [0] * 3, [1] * 4 + [2] * 7 + [0], [1] * 11 + [0]], np.int32)
LENGTHS = np.array([5, 1, 3, 4, 7, 11])


def draw_texts(rng):
    """The same texts twice: packed `[3, 12]`, and each in a row of its own `[6, 12]` with the mask of its tokens."""
    tokens = rng.integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)
    mask = np.arange(12)[None, :] < LENGTHS[:, None]
    alone = np.zeros(mask.shape, np.int32)
    alone[mask] = tokens[SEGMENTS > 0]
    return tokens, alone, mask


def test_positions_and_keys_by_hand():
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 2, 0]])
    own = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(usable_keys(segments > 0, segments)[0, 0, :5, :5], own)
    assert not usable_keys(segments > 0, segments)[0, 0, :, 5].any()  # nobody sees padding
    assert usable_keys(None, None) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_are_those_of_the_texts_alone(name, rng):
    model = Decoder(CONFIGS[name], key=jax.random.key(0))
    tokens, alone, mask = draw_texts(rng)
    forward = jax.jit(lambda *arguments: model(*arguments[:2], segments=arguments[2], trace="off")[0])
    packed = forward(tokens, SEGMENTS > 0, SEGMENTS)
    np.testing.assert_allclose(packed[SEGMENTS > 0], forward(alone, mask, None)[mask], atol=1e-5)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize(("name", "micro_batches"), [("context", 3), ("patterns", 1), ("latent", 1)])
def test_a_packed_step_is_that_of_the_texts_alone(name, micro_batches, rng):
    """Loss, routing statistics and gradient, which a step of plain descent shows; no target crosses a boundary."""
    optimizer = optax.sgd(1.0)
    graphdef, state = init_state(lambda key: Decoder(CONFIGS[name], key=key), jax.random.key(0), optimizer)
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig(balance=1.0, micro_batches=micro_batches)))
    tokens, alone, mask = draw_texts(rng)
    ours = step(state, tokens, SEGMENTS > 0, None, SEGMENTS)
    theirs = step(state, alone, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_texts_in_a_row_are_strangers(rng):
    """What one text says changes nothing in another."""
    model = Decoder(CONFIGS["context"], key=jax.random.key(0))
    tokens = draw_texts(rng)[0]
    other = np.where(SEGMENTS == 1, (tokens + 1) % TINY.vocab_size, tokens)
    forward = jax.jit(lambda rows: model(rows, SEGMENTS > 0, segments=SEGMENTS, trace="off")[0])
    before, after = forward(tokens), forward(other)
    np.testing.assert_array_equal(before[SEGMENTS == 2], after[SEGMENTS == 2])
    assert not np.allclose(before[SEGMENTS == 1], after[SEGMENTS == 1], atol=1e-2)


@pytest.mark.parametrize("router", REMEMBERING_ROUTERS)
def test_a_router_that_remembers_is_refused(router, rng):
    model = Decoder(dataclasses.replace(SMALL, router=router), key=jax.random.key(0))
    with pytest.raises(ValueError, match=f"router='{router}' keeps a state along the sequence.*data.packing='crop'"):
        model(draw_texts(rng)[0], segments=SEGMENTS)
