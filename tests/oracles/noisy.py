"""Noisy top-k without noise, one token at a time: the bias is added to the logits."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def noisy_top_k(case, num_choices):
    chosen, probabilities = [], np.zeros(case.logits.shape)
    for t in range(len(case.logits)):
        logits = {e: case.logits[t, e] for e in case.open_experts(t)}
        for e, p in softmax(logits).items():
            probabilities[t, e] = p
        ids = best({e: z + case.bias[e] for e, z in logits.items()}, min(num_choices, case.limit[t]))
        gates = softmax({e: logits[e] for e in ids})
        chosen.append([(e, gates[e]) for e in ids])
    return *to_slots(chosen, num_choices, case.logits.shape[1]), probabilities
