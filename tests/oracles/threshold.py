"""Rules that use every expert that is good enough, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, sigmoid, softmax


def threshold(case, num_choices, score=sigmoid, renormalize=False):
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        scores = score({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, s in scores.items():
            probabilities[t, e] = s / sum(scores.values())
        moved = {e: s + case.bias[e] for e, s in scores.items()}
        ranked = best(moved, min(num_choices, case.limit[t]))
        used = [e for rank, e in enumerate(ranked) if rank == 0 or moved[e] > case.level]
        total = sum(scores[e] for e in used) if renormalize else 1.0
        chosen.append([(e, scores[e] / total) for e in used])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def top_p(case, num_choices, renormalize=False):
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        p = softmax({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, value in p.items():
            probabilities[t, e] = value
        used, reached = [], 0.0
        for e in best({e: value + case.bias[e] for e, value in p.items()}, min(num_choices, case.limit[t])):
            if used and reached >= case.level:
                break
            used.append(e)
            reached += p[e]
        total = reached if renormalize else 1.0
        chosen.append([(e, p[e] / total) for e in used])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def fixed_threshold(case, num_choices, minimum=0.3):
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        p = softmax({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, value in p.items():
            probabilities[t, e] = value
        moved = {e: value + case.bias[e] for e, value in p.items() if value + case.bias[e] > minimum}
        chosen.append([(e, p[e]) for e in best(moved, min(num_choices, case.limit[t]))])
    return *to_slots(chosen, num_choices, num_experts), probabilities
