"""Routing by uncertainty, one token at a time."""

import math

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def free_energy(logits):
    return -math.log(sum(math.exp(z) for z in logits.values()))


def entropy(logits):
    if len(logits) == 1:
        return 0.0
    return -sum(p * math.log(p) for p in softmax(logits).values() if p > 0) / math.log(len(logits))


def spend(case, num_choices, uncertainty, few=1):
    """`uncertainty` takes the logits of a token's open experts, as a dictionary, to a number."""
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        logits = {e: case.logits[t, e] for e in case.open_experts(t)}
        if not logits:
            chosen.append([])
            continue
        p = softmax(logits)
        for e, value in p.items():
            probabilities[t, e] = value
        count = num_choices if uncertainty(logits) > case.level else few
        ranked = best({e: value + case.bias[e] for e, value in p.items()}, min(count, case.limit[t]))
        chosen.append([(e, p[e]) for e in ranked])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def free_energy_top_k(case, num_choices):
    return spend(case, num_choices, free_energy)


def entropy_top_k(case, num_choices):
    return spend(case, num_choices, entropy)
