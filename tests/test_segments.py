"""Texts packed into one row against the same texts one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.losses import cross_entropy
from moe_jax.models.decoder import Decoder
from moe_jax.ops.attention import segment_positions, usable_keys
from moe_jax.training.step import LossConfig, init_state, make_train_step
from tests.tiny_model import TINY

LATENT = {"latent_width": 8, "content_width": 4, "rotary_width": 4, "value_width": 6}
CONFIGS = {
    "plain": TINY,
    "context": dataclasses.replace(TINY, context=2),
    "patterns": dataclasses.replace(
        TINY,
        windows=(3, 0, 0),
        chunks=(0, 3, 0),
        turns=(True, True, False),
        attention_settings={"far_scale": 0.5, "far_length": 2},
    ),
    "sinks": dataclasses.replace(TINY, attention_settings={"use_sinks": True}),
    "latent": dataclasses.replace(TINY, attention="latent", attention_settings=LATENT),
}
# Rows of 11: texts of 5, 1 and 3 tokens and padding; 4 and 7; one of 11.
SEGMENTS = np.array([[1] * 5 + [2] + [3] * 3 + [0] * 2, [1] * 4 + [2] * 7, [1] * 11], np.int32)


def texts(tokens):
    """Each packed text: its row, its place in it, its tokens."""
    for row, ids in enumerate(SEGMENTS):
        for segment in range(1, ids.max() + 1):
            place = np.flatnonzero(ids == segment)
            yield row, place, tokens[row, place]


def test_positions_and_keys_by_hand():
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 2, 0]])
    own = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(usable_keys(segments > 0, segments)[0, 0, :5, :5], own)
    assert not usable_keys(segments > 0, segments)[0, 0, :, 5].any()  # nobody sees padding
    assert usable_keys(None, None) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_equals_its_texts_one_at_a_time(name, rng):
    model = Decoder(CONFIGS[name], key=jax.random.key(0))
    tokens = rng.integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)
    packed = model(tokens, SEGMENTS > 0, segments=SEGMENTS)[0]
    for row, place, text in texts(tokens):
        np.testing.assert_allclose(packed[row, place], model(text[None])[0][0], atol=1e-5)
    assert np.isfinite(packed).all()
    assert not np.allclose(packed[1, 4:], model(tokens, SEGMENTS > 0)[0][1, 4:], atol=1e-3)


@pytest.mark.parametrize(("name", "micro_batches"), [*((name, 1) for name in CONFIGS), ("context", 3)])
def test_the_step_is_that_of_the_texts_alone(name, micro_batches, rng):
    """A step of plain gradient descent shows the gradient; no target lies across a boundary: 4 + 2, 3 + 6, 10."""
    optimizer = optax.sgd(1.0)
    graphdef, state = init_state(lambda key: Decoder(CONFIGS[name], key=key), jax.random.key(0), optimizer)
    step = make_train_step(graphdef, optimizer, LossConfig(balance=0.0, z=0.0, micro_batches=micro_batches))
    tokens = rng.integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)
    after, metrics = jax.jit(step)(state, tokens, SEGMENTS > 0, None, SEGMENTS)

    def mean_loss(params):
        model = nnx.merge(graphdef, params, state.balance)
        alone = [text[None] for _, _, text in texts(tokens) if len(text) > 1]
        return sum(jnp.sum(cross_entropy(model(text[:, :-1])[0], text[:, 1:])) for text in alone) / 25

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    step_taken = jax.tree.map(jnp.subtract, state.params, after.params)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), step_taken, gradient)


def test_texts_in_a_row_are_strangers(rng):
    """What one text says changes nothing in another."""
    model = Decoder(CONFIGS["context"], key=jax.random.key(0))
    tokens = rng.integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)
    other = np.where(SEGMENTS == 1, (tokens + 1) % TINY.vocab_size, tokens)
    before, after = (model(rows, SEGMENTS > 0, segments=SEGMENTS)[0] for rows in (tokens, other))
    np.testing.assert_array_equal(before[SEGMENTS == 2], after[SEGMENTS == 2])
    assert not np.allclose(before[SEGMENTS == 1], after[SEGMENTS == 1], atol=1e-2)
