"""Top-k over true and null experts, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def null_experts(case, num_choices, renormalize=False, num_null=1):
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        p = softmax({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, value in p.items():
            probabilities[t, e] = value
        selected = best({e: value + case.bias[e] for e, value in p.items()}, min(num_choices, case.limit[t]))
        true = [e for e in selected if e < num_experts - num_null]
        total = sum(p[e] for e in true) if renormalize else 1.0
        chosen.append([(e, p[e] / total if e in true else 0.0) for e in selected])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def null_experts_renormalized(case, num_choices):
    return null_experts(case, num_choices, renormalize=True)
