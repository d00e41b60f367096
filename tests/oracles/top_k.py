"""Top-k rules, one token at a time."""

import math

import numpy as np

from tests.oracles.case import to_slots


def softmax(values):
    """Of a dictionary of logits."""
    total = sum(math.exp(z) for z in values.values())
    return {e: math.exp(z) / total for e, z in values.items()}


def best(scores, count):
    """The `count` highest keys of a dictionary, ties to the lower key."""
    return sorted(scores, key=lambda e: (-scores[e], e))[: max(int(count), 0)]


def top_k(case, num_choices, score, renormalize):
    """`score` takes the logits of a token's open experts to their scores, as dictionaries."""
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        scores = score({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, s in scores.items():
            probabilities[t, e] = s / sum(scores.values())
        selected = best({e: s + case.bias[e] for e, s in scores.items()}, min(num_choices, case.limit[t]))
        total = sum(scores[e] for e in selected) if renormalize else 1.0
        chosen.append([(e, scores[e] / total) for e in selected])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def sigmoid(values):
    """Of a dictionary of logits."""
    return {e: 1 / (1 + math.exp(-z)) for e, z in values.items()}


def sqrt_softplus(values):
    """Of a dictionary of logits."""
    return {e: math.sqrt(math.log1p(math.exp(z))) for e, z in values.items()}


def softmax_top_k(case, num_choices):
    return top_k(case, num_choices, softmax, renormalize=False)


def softmax_top_k_renormalized(case, num_choices):
    return top_k(case, num_choices, softmax, renormalize=True)


def sigmoid_top_k(case, num_choices):
    return top_k(case, num_choices, sigmoid, renormalize=True)


def sqrt_softplus_top_k(case, num_choices):
    return top_k(case, num_choices, sqrt_softplus, renormalize=True)
