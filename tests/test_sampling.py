"""Sampling filters against NumPy written out, and against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.sampling import (
    FILTERS,
    GREEDY,
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalize_repetition,
)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def top_k_oracle(row, k):
    return row >= sorted(row)[-min(k, len(row))]


def top_p_oracle(row, p):
    order = np.argsort(-row, kind="stable")
    before = np.append(0, np.cumsum(softmax(row.astype(np.float64))[order])[:-1])
    return row >= row[order][before < p].min()


def min_p_oracle(row, ratio):
    return softmax(row) >= ratio * softmax(row).max()


ORACLES = {
    "top_k": (top_k_oracle, (1, 3, 40, 99)),
    "top_p": (top_p_oracle, (1e-6, 0.3, 0.9)),
    "min_p": (min_p_oracle, (0.02, 0.5)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_the_oracle_keeps(name, rng):
    """Rows of different spread, with negative and repeated logits; what stays is unchanged."""
    logits = (rng.normal(size=(4, 40)) * np.array([[0.1], [1], [3], [30]])).astype(np.float32)
    logits[2, 5] = logits[2, 6] = logits[2].max()
    oracle, values = ORACLES[name]
    for value in values:
        kept = np.asarray(jax.jit(FILTERS[name])(logits, value))
        expected = np.stack([oracle(row, value) for row in logits])
        np.testing.assert_array_equal(kept, np.where(expected, logits, -np.inf))


def test_filters_by_hand():
    # Probabilities 0.1, 0.2, 0.4, 0.3: the two largest sum to 0.7, and a quarter of 0.4 is 0.1.
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.4, 0.3]])) - 5
    for kept, expected in [
        (keep_top_k(logits, 3), [0, 1, 1, 1]),
        (keep_top_p(logits, 0.69), [0, 0, 1, 1]),
        (keep_top_p(logits, 0.71), [0, 1, 1, 1]),
        (keep_min_p(logits, 0.26), [0, 1, 1, 1]),
    ]:
        np.testing.assert_array_equal(np.isfinite(kept[0]), expected)
    penalized = penalize_repetition(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 4.0)
    np.testing.assert_array_equal(penalized, [[0.5, -8.0, 2.0]])


def test_nothing_that_is_closed_comes_back():
    """Rows with minus infinity, and a sum of probabilities that rounding keeps below p."""
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]])
    for kept in (keep_top_k(logits, 3), keep_top_p(logits, 0.9999999), keep_min_p(logits, 0.01)):
        np.testing.assert_array_equal(kept, logits)


def test_draws_follow_the_distribution():
    """20,000 draws: frequencies within four standard deviations of what temperature and top-k leave."""
    row, count = jnp.log(jnp.array([0.5, 0.2, 0.2, 0.1])), 20_000
    settings = Sampling(temperature=0.5, top_k=3).settings
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(next_tokens)(jnp.tile(row, (count, 1)), settings, keys, None)
    expected = np.array([0.25, 0.04, 0.04, 0]) / 0.33
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(np.bincount(drawn, minlength=4) / count - expected) <= 4 * deviation).all()


def test_greedy_needs_no_randomness():
    logits, keys = jnp.array([[1.0, 3.0, 3.0]]), jax.random.split(jax.random.key(0), 1)
    assert GREEDY.settings == {}
    assert Sampling(temperature=0, top_k=5, top_p=0.1, repetition_penalty=2).settings == {"repetition_penalty": 2.0}
    assert next_tokens(logits, {}, keys, None).tolist() == [1]  # of equal ones the first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature=-1 must be at least 0 \(0 is greedy\)"),
        ({"top_k": 2.5}, r"top_k=2.5 must be a whole number"),
        ({"top_p": 0}, r"top_p=0 must be in \(0, 1\]"),
        ({"min_p": 1}, r"min_p=1 must be in \[0, 1\)"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
    ],
)
def test_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parity
def test_filters_equal_transformers(rng):
    import torch
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    logits = (3 * rng.normal(size=(5, 200))).astype(np.float32)
    ids = rng.integers(0, 200, (5, 30))
    theirs = {
        "top_k": (TopKLogitsWarper, (1, 7, 500)),
        "top_p": (TopPLogitsWarper, (0.05, 0.5, 0.99)),
        "min_p": (MinPLogitsWarper, (0.001, 0.3)),
    }
    for name, (processor, values) in theirs.items():
        for value in values:
            expected = processor(value)(torch.tensor(ids), torch.tensor(logits)).numpy()
            np.testing.assert_array_equal(FILTERS[name](jnp.asarray(logits), value), expected)
    is_present = np.zeros(logits.shape, bool)
    is_present[np.arange(5)[:, None], ids] = True
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalize_repetition(jnp.asarray(logits), is_present, 1.3), expected, rtol=1e-6)
