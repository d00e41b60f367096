"""Group-limited top-k, one token at a time."""

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, sigmoid, softmax


def group_limited(case, num_choices, score, num_counted, renormalize, num_groups=2, open_groups=1):
    """A group counts by the sum of its `num_counted` best open experts; a group with none comes last."""
    num_tokens, num_experts = case.logits.shape
    size = num_experts // num_groups
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        scores = score({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, s in scores.items():
            probabilities[t, e] = s / sum(scores.values())
        groups = {}
        for g in range(num_groups):
            members = sorted((s + case.bias[e] for e, s in scores.items() if e // size == g), reverse=True)
            groups[g] = sum(members[:num_counted]) if members else -np.inf
        visited = best(groups, open_groups)
        reachable = {e: s + case.bias[e] for e, s in scores.items() if e // size in visited}
        ids = best(reachable, min(num_choices, case.limit[t]))
        total = sum(scores[e] for e in ids) if renormalize else 1.0
        chosen.append([(e, scores[e] / total) for e in ids])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def group_limited_softmax_top_k(case, num_choices, **settings):
    return group_limited(case, num_choices, softmax, num_counted=1, renormalize=False, **settings)


def group_limited_sigmoid_top_k(case, num_choices, **settings):
    return group_limited(case, num_choices, sigmoid, num_counted=2, renormalize=True, **settings)
