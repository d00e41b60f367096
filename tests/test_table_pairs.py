"""Tables whose tensors are arranged otherwise than ours: rotary pairs side by side, halves that take turns."""

import tracemalloc

import numpy as np

from moe_jax.checkpoints.hub.table import Entry, bind


def test_rotary_pairs_change_places_and_back():
    # One head of two coordinates that do not turn and the pairs (a, a'), (b, b'), (c, c'): theirs lie side by side.
    entry = Entry("theirs", "ours", "d h k -> (h k) d", pairs=(2, 2))
    (binding,) = bind([entry], {})
    ours = np.array([[[0, 1, 10, 20, 30, 11, 21, 31]]])
    theirs = np.array([[0], [1], [10], [11], [20], [21], [30], [31]])
    np.testing.assert_array_equal(binding.export(ours), theirs)
    filled = np.zeros_like(ours)
    binding.fill(filled, theirs)
    np.testing.assert_array_equal(filled, ours)


def test_filling_copies_nothing_in_between(rng):
    """Theirs takes turns, ours has two halves: the tensor goes from one to the other without a third in memory."""
    (binding,) = bind([Entry("theirs", "ours", "e d (two f) -> e d (f two)", sizes={"two": 2})], {})
    theirs = rng.normal(size=(4, 64, 2048)).astype(np.float32)
    ours = np.empty_like(theirs)
    tracemalloc.start()
    binding.fill(ours, theirs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.05 * ours.nbytes
    np.testing.assert_array_equal(ours[:, :, :1024], theirs[:, :, ::2])
    np.testing.assert_array_equal(ours[:, :, 1024:], theirs[:, :, 1::2])
