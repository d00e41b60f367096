"""Generation by an encoder-decoder: equal to the model called on ever longer targets, and to one source at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.generate_target import generate_target, greedy
from tests.tiny_encoder_decoder import NLLB, SWITCH, apply, dropless, make, tokens_of

TEXT = dataclasses.replace(SWITCH, tie_embeddings=False, scale_logits=False)
SOURCES = tokens_of(3, 9)
MASK = jnp.arange(9)[None, :] < jnp.array([[9], [4], [6]])
NEVER = (-1,)


def writer(config):
    """A model with weights at which its texts vary: with small ones, or when tied, tiny models repeat a token."""
    return make(config, weight_noise=0.6 if config.positions == "relative" else 0.3)


@pytest.mark.parametrize("config", [dropless(TEXT), dropless(NLLB)], ids=["switch", "nllb"])
def test_equals_the_whole_model_token_by_token(config):
    model = writer(config)
    target = generate_target(model, SOURCES, MASK, max_tokens=6, stop_ids=NEVER)
    np.testing.assert_array_equal(target.tokens[:, 0], config.start_id)
    np.testing.assert_array_equal(target.lengths, [7] * 3)
    logits, *_ = apply(model, SOURCES, target.tokens[:, :-1], MASK)
    np.testing.assert_array_equal(target.tokens[:, 1:], logits.argmax(-1))
    assert len(np.unique(target.tokens[:, 1:])) > 4


@pytest.mark.parametrize("config", [TEXT, dropless(NLLB)], ids=["switch", "nllb"])
def test_a_batch_of_different_lengths_equals_one_at_a_time(config):
    model = writer(config)
    together = generate_target(model, SOURCES, MASK, max_tokens=8, stop_ids=NEVER)
    for b, length in enumerate((9, 4, 6)):
        alone = generate_target(model, SOURCES[b : b + 1, :length], max_tokens=8, stop_ids=NEVER)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])


def test_stop_tokens_end_a_target_and_not_the_others():
    model = writer(TEXT)
    free = np.asarray(generate_target(model, SOURCES, MASK, max_tokens=10, stop_ids=NEVER).tokens)
    stop = int(next(token for token in free[0, 3:] if token not in free[0, :3] and token not in free[1]))
    ended = generate_target(model, SOURCES, MASK, max_tokens=10, stop_ids=(22, stop))
    length = list(free[0]).index(stop, 1) + 1
    np.testing.assert_array_equal(ended.tokens[0], [*free[0, :length], *[0] * (11 - length)])
    np.testing.assert_array_equal(ended.tokens[1], free[1])
    np.testing.assert_array_equal(ended.lengths[:2], [length, 11])
    by_config = writer(dataclasses.replace(TEXT, stop_ids=(22, stop)))
    np.testing.assert_array_equal(generate_target(by_config, SOURCES, MASK, max_tokens=10).tokens, ended.tokens)


def test_given_tokens_come_first_and_do_not_stop():
    model = writer(TEXT)
    free = generate_target(model, SOURCES, MASK, max_tokens=8, stop_ids=NEVER)
    given = free.tokens[:, :4]
    rest = generate_target(model, SOURCES, MASK, max_tokens=5, given=given, stop_ids=NEVER)
    np.testing.assert_array_equal(rest.tokens, free.tokens)
    stopped = generate_target(model, SOURCES, MASK, max_tokens=5, given=given, stop_ids=given[0].tolist())
    assert stopped.lengths.min() >= 5


def draw(logits, key):
    return jax.random.categorical(key, logits)


def test_samplers_get_a_key_of_each_step():
    model = writer(TEXT)
    texts = [
        generate_target(model, SOURCES, MASK, max_tokens=12, stop_ids=NEVER, sample=draw, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(texts[0].tokens, texts[1].tokens)
    assert (texts[0].tokens != texts[2].tokens).mean() > 0.5
    tied = jnp.array([[1.0, 3.0, 3.0]])
    assert greedy(tied) == 1


def test_ended_targets_take_no_place_in_routing():
    """Two equal texts and room for one token an expert: the second is dropped, until the first has ended."""
    model = writer(dataclasses.replace(TEXT, capacity=1, capacity_per_sequence=False))
    source = jnp.tile(SOURCES[:1], (2, 1))
    encoded, _ = model.encode(source)
    decode = jax.jit(lambda *args: model.decode(*args))

    def second_text(is_first_masked):
        cache, tokens, text = model.start_cache(encoded, None, 6), jnp.zeros((2, 1), int), []
        for step in range(6):
            mask = jnp.array([[not (is_first_masked and step)], [True]])
            logits, cache, _ = decode(tokens, cache, mask)
            tokens = logits[:, -1:].argmax(-1)
            text.append(tokens.tolist())
        return text[0][0][0], [second for (_,), (second,) in text]

    first_token, expected = second_text(True)
    assert first_token not in expected and expected != second_text(False)[1]
    target = generate_target(model, source, max_tokens=6, stop_ids=(first_token,))
    np.testing.assert_array_equal(target.lengths, [2, 7])
    np.testing.assert_array_equal(target.tokens[1, 1:], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 1, "given": jnp.zeros((2, 1), int)}, r"each of 3 sources, got shape \(2, 1\)"),
        ({"max_tokens": 1, "given": jnp.zeros((3, 0), int)}, r"got shape \(3, 0\)"),
        ({"max_tokens": 1, "given": jnp.zeros(3, int)}, r"got shape \(3,\)"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_target(writer(TEXT), SOURCES, **arguments)
