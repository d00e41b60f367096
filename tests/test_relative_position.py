"""T5's buckets of distances and fairseq's sinusoids, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.relative_bias import RelativeBias
from moe_jax.ops.relative_position import relative_position_buckets
from moe_jax.ops.sinusoid import sinusoidal_positions


def test_buckets_of_a_decoder_by_hand():
    # 8 buckets, 4 of them exact: from distance 4 on, 4 + floor(4 log(n / 4) / log(16 / 4)) = 4 + floor(2 log2(n / 4)).
    expected = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 5, 7: 5, 8: 6, 11: 6, 12: 7, 15: 7, 16: 7, 1000: 7, -1: 0, -9: 0}
    buckets = relative_position_buckets(
        -jnp.array(list(expected)), num_buckets=8, max_distance=16, is_bidirectional=False
    )
    np.testing.assert_array_equal(buckets, list(expected.values()))


def test_buckets_of_an_encoder_by_hand():
    # 4 buckets a side, 2 of them exact: from 2 on, 2 + floor(2 log(n / 2) / log(8 / 2)) = 2 + floor(log2(n / 2)).
    expected = {0: 0, -1: 1, -2: 2, -3: 2, -4: 3, -8: 3, -99: 3, 1: 5, 2: 6, 3: 6, 4: 7, 8: 7, 99: 7}
    buckets = relative_position_buckets(jnp.array(list(expected)), num_buckets=8, max_distance=8, is_bidirectional=True)
    np.testing.assert_array_equal(buckets, list(expected.values()))


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "is_bidirectional"),
    [(3, 9, True), (1, 9, False), (8, 4, False), (16, 4, True), (8, 2**40, True)],
)
def test_too_few_buckets_or_too_near_a_distance_are_refused(num_buckets, max_distance, is_bidirectional):
    with pytest.raises(ValueError, match=f"num_buckets={num_buckets} must leave .* max_distance={max_distance}"):
        relative_position_buckets(
            jnp.arange(3), num_buckets=num_buckets, max_distance=max_distance, is_bidirectional=is_bidirectional
        )


def test_bias_is_the_table_at_the_bucket_of_key_minus_query():
    bias = RelativeBias(8, 16, 2, is_bidirectional=False, key=jnp.zeros(2, jnp.uint32))
    bias.table[...] = jnp.arange(16.0).reshape(8, 2)
    scores = bias(jnp.array([6, 7]), jnp.arange(8))
    assert scores.shape == (1, 2, 2, 8)
    # Query 6 is 6, 5, ..., 0 behind keys 0 to 6, whose buckets are as above; key 7 lies ahead.
    np.testing.assert_array_equal(scores[0, 0, 0], 2 * np.array([5, 4, 4, 3, 2, 1, 0, 0]))
    np.testing.assert_array_equal(scores[0, 1, 1], 2 * np.array([5, 5, 4, 4, 3, 2, 1, 0]) + 1)


def test_sinusoids_by_hand():
    # Width 4 has the frequencies 10000^0 and 10000^-1, sines first.
    expected = [np.sin(3), np.sin(3e-4), np.cos(3), np.cos(3e-4)]
    np.testing.assert_allclose(sinusoidal_positions(jnp.array([[0, 3]]), 4)[0, 1], expected, rtol=1e-6)
    np.testing.assert_array_equal(sinusoidal_positions(jnp.array(0), 6), [0, 0, 0, 1, 1, 1])
