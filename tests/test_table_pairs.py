"""Tables whose tensors have rotary coordinates side by side."""

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
