"""Rules without logits, one token at a time."""

import math
from fractions import Fraction

import numpy as np

from tests.oracles.case import to_slots
from tests.oracles.top_k import best


def numbers(case):
    """A token's place among the unmasked of its sequence."""
    length = len(case.logits) // case.num_sequences
    return [sum(case.is_open[s].any() for s in range(t - t % length, t)) for t in range(len(case.logits))]


def weighed_alike(case, num_choices, preference):
    """`preference(token)` is a list of all experts, the most wanted first."""
    num_tokens, num_experts = case.logits.shape
    chosen, probabilities = [], np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        experts = [e for e in preference(t) if case.is_open[t, e]][: min(num_choices, case.limit[t])]
        chosen.append([(e, 1 / len(experts)) for e in experts])
        probabilities[t, experts] = 1 / max(len(experts), 1)
    return *to_slots(chosen, num_choices, num_experts), probabilities


def mix(x):
    """MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def by_hash(value, num_experts, seed):
    row = mix((int(value) + mix((seed + 0x9E3779B9) % 2**32)) % 2**32)
    return best({e: mix(row ^ mix((e + 1) * 0x9E3779B9 % 2**32)) >> 8 for e in range(num_experts)}, num_experts)


def hash_token_ids(case, num_choices, seed=0):
    num_experts = case.logits.shape[1]
    return weighed_alike(case, num_choices, lambda t: by_hash(case.token_ids[t], num_experts, seed))


def random_experts(case, num_choices):
    place = numbers(case)
    return weighed_alike(case, num_choices, lambda t: by_hash(place[t], case.logits.shape[1], seed=0))


def rotated(start, num_experts):
    return [(start + i) % num_experts for i in range(num_experts)]


def forced_uniform(case, num_choices):
    place = numbers(case)
    return weighed_alike(case, num_choices, lambda t: rotated(num_choices * place[t], case.logits.shape[1]))


def forced(case, num_choices, shares):
    """Experts side by side on [0, K), a token at K points one apart."""
    length, num_experts, place = len(case.logits) // case.num_sequences, len(shares), numbers(case)
    by_fraction = sorted(range(length), key=lambda i: i * (math.sqrt(5) - 1) / 2 % 1)
    ends = [sum(shares[: e + 1]) for e in range(num_experts)]

    def preference(t):
        u = (by_fraction.index(place[t]) + Fraction(1, 2)) / length
        wanted = {next(e for e in range(num_experts) if u + j < ends[e]) for j in range(num_choices)}
        order = rotated(num_choices * place[t], num_experts)
        return [e for e in order if e in wanted] + [e for e in order if e not in wanted]

    return weighed_alike(case, num_choices, preference)


def zipf_shares(num_experts, num_choices):
    """Of the tokens: 1 / rank, scaled to K in all; with more than one for the head, the head has one."""
    for head in range(num_experts + 1):
        tail = [Fraction(1, e + 1) for e in range(head, num_experts)]
        shares = [Fraction(1)] * head + [(num_choices - head) * w / sum(tail) for w in tail]
        if max(shares) <= 1:
            return shares
    raise AssertionError


def forced_zipf(case, num_choices):
    return forced(case, num_choices, zipf_shares(case.logits.shape[1], num_choices))


def forced_skewed(case, num_choices, share=Fraction(3, 5)):
    others = case.logits.shape[1] - 1
    return forced(case, num_choices, [share] + [(num_choices - share) / others] * others)
