"""Experts take tokens, one expert at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, softmax


def expert_choice(case, num_choices, per_sequence=False):
    num_tokens, num_experts = case.logits.shape
    scores = [softmax({e: case.logits[t, e] for e in case.open_experts(t)}) for t in range(num_tokens)]
    taken = [{} for _ in range(num_tokens)]
    group = num_tokens // case.num_sequences if per_sequence else num_tokens
    for start in range(0, num_tokens, group):
        tokens = [t for t in range(start, start + group) if scores[t]]
        capacity = -(-num_choices * len(tokens) // num_experts)
        for e in range(num_experts):
            for t in best({t: scores[t][e] for t in tokens if e in scores[t]}, capacity):
                taken[t][e] = scores[t][e]
    chosen = [[(e, taken[t][e]) for e in best(taken[t], case.limit[t])] for t in range(num_tokens)]
    probabilities = np.array([[s.get(e, 0.0) for e in range(num_experts)] for s in scores])
    return *to_slots(chosen, num_experts, num_experts), probabilities
