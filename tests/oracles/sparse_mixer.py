"""SparseMixer in evaluation, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def sparse_mixer(case, num_choices, jitter=0.01):
    chosen, probabilities = [], np.zeros(case.logits.shape)
    for t in range(len(case.logits)):
        left = {e: case.logits[t, e] + case.bias[e] for e in case.open_experts(t)}
        for e, p in softmax({e: case.logits[t, e] for e in left}).items():
            probabilities[t, e] = p
        pairs = []
        while left and len(pairs) < min(num_choices, case.limit[t]):
            (top,) = best(left, 1)
            m = left[top]
            near = {e for e, z in left.items() if z == m or (m - z) / max(abs(z), m) <= 2 * jitter}
            pairs.append((top, softmax({e: case.logits[t, e] for e in near})[top]))
            del left[top]
        chosen.append(pairs)
    return *to_slots(chosen, num_choices, case.logits.shape[1]), probabilities
