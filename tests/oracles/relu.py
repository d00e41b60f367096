"""ReLU routing, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def relu(case, num_choices):
    del num_choices
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        logits = {e: case.logits[t, e] for e in case.open_experts(t)}
        for e, p in softmax(logits).items():
            probabilities[t, e] = p
        moved = {e: z + case.bias[e] for e, z in logits.items() if z > 0 and z + case.bias[e] > 0}
        chosen.append([(e, logits[e]) for e in best(moved, case.limit[t])])
    return *to_slots(chosen, num_experts, num_experts), probabilities
