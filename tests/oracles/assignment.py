"""BASE by the exact assignment of scipy, Sinkhorn by normalising a matrix in turn."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from tests.oracles.case import to_slots
from tests.oracles.top_k import best, sigmoid, softmax


def exact_assignment(affinities, seats, is_open):
    """The expert of each token, or E, for the largest sum; a column of the problem is a seat."""
    num_tokens, num_experts = affinities.shape
    experts = np.full(num_tokens, num_experts)
    tokens = np.flatnonzero(is_open.any(1))
    if not len(tokens):
        return experts
    spread = np.ptp(affinities[is_open])
    closed = affinities[is_open].min() - (num_experts + 1) * spread
    owner_of_seat = np.repeat(np.arange(num_experts), seats)
    worths = np.where(is_open, affinities, closed)[np.ix_(tokens, owner_of_seat)]
    rows, columns = linear_sum_assignment(worths, maximize=True)
    experts[tokens[rows]] = owner_of_seat[columns]
    return np.where(is_open[np.arange(num_tokens), np.minimum(experts, num_experts - 1)], experts, num_experts)


def equal_seats(favorites, is_open):
    """One more seat for the experts that most tokens like best, where the seats cannot be equal."""
    num_tokens, num_experts = int(is_open.any(1).sum()), is_open.shape[1]
    experts = [e for e in range(num_experts) if is_open[:, e].any()]
    by_popularity = best({e: favorites.count(e) for e in experts}, len(experts))
    seats = np.zeros(num_experts, int)
    for place, e in enumerate(by_popularity):
        seats[e] = num_tokens // len(experts) + (place < num_tokens % len(experts))
    return seats


def base(case, num_choices):
    num_tokens, num_experts = case.logits.shape
    affinities = case.logits + case.bias
    favorites = [
        next(iter(best({e: affinities[t, e] for e in case.open_experts(t)}, 1)), num_experts) for t in range(num_tokens)
    ]
    experts = exact_assignment(affinities, equal_seats(favorites, case.is_open), case.is_open)
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        scores = sigmoid({e: case.logits[t, e] for e in case.open_experts(t)})
        for e, s in scores.items():
            probabilities[t, e] = s / sum(scores.values())
        expert = experts[t] if experts[t] < num_experts else favorites[t]
        chosen.append([(expert, scores[expert])] if scores else [])
    return *to_slots(chosen, num_choices, num_experts), probabilities


def balanced_matrix(logits, is_open, num_iterations=100, tolerance=1e-4):
    """exp(logits) with its rows and its columns normalised in turn, columns last, until the columns rest."""
    matrix = np.where(is_open, np.exp(logits - logits.max()), 0.0)
    rows, columns = is_open.any(1), is_open.any(0)
    for _ in range(num_iterations):
        matrix[rows] /= matrix[rows].sum(1, keepdims=True)
        factors = rows.sum() / columns.sum() / matrix[:, columns].sum(0)
        matrix[:, columns] *= factors
        if np.abs(np.log(factors)).max() <= tolerance:
            break
    return matrix


def sinkhorn(case, num_choices):
    num_tokens, num_experts = case.logits.shape
    matrix = balanced_matrix(case.logits + case.bias, case.is_open)
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        z = {e: case.logits[t, e] for e in case.open_experts(t)}
        gates, p = (sigmoid if num_choices == 1 else softmax)(z), softmax(z)
        probabilities[t, list(p)] = list(p.values())
        chosen.append([(e, gates[e]) for e in best({e: matrix[t, e] for e in z}, min(num_choices, case.limit[t]))])
    return *to_slots(chosen, num_choices, num_experts), probabilities
