"""GShard's top-2 in evaluation, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def gshard_top_2(case, num_choices):
    chosen, probabilities = [], np.zeros(case.logits.shape)
    for t in range(len(case.logits)):
        g = softmax({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, value in g.items():
            probabilities[t, e] = value
        pair = best({e: value + case.bias[e] for e, value in g.items()}, min(2, case.limit[t]))
        chosen.append([(e, g[e] / sum(g[other] for other in pair)) for e in pair])
    return *to_slots(chosen, num_choices, case.logits.shape[1]), probabilities
