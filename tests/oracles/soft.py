"""Soft MoE, one slot and one token at a time: dictionaries, loops, and nothing of the fast version."""

import math

import numpy as np


def softmax(values):
    """Of a dictionary of logits."""
    total = sum(math.exp(z) for z in values.values())
    return {name: math.exp(z) / total for name, z in values.items()}


def soft_plan(logits, is_open, num_sequences):
    """Dispatch and combine weights `[T, E, C]`; masked tokens are those with nothing open."""
    num_tokens, num_experts, num_slots = logits.shape
    dispatch, combine = np.zeros(logits.shape), np.zeros(logits.shape)
    length = num_tokens // num_sequences
    for start in range(0, num_tokens, length):
        for e in range(num_experts):
            for c in range(num_slots):
                readable = {t: logits[t, e, c] for t in range(start, start + length) if is_open[t, e]}
                for t, weight in softmax(readable).items():
                    dispatch[t, e, c] = weight
    for t in range(num_tokens):
        slots = {(e, c): logits[t, e, c] for e in range(num_experts) if is_open[t, e] for c in range(num_slots)}
        for slot, weight in softmax(slots).items():
            combine[t, *slot] = weight
    return dispatch, combine


def soft_outputs(tokens, dispatch, combine, num_sequences, experts):
    """`[T, D]` outputs; `experts` is a list of functions of one row."""
    num_tokens, num_experts, num_slots = dispatch.shape
    length = num_tokens // num_sequences
    outputs = np.zeros_like(tokens)
    for start in range(0, num_tokens, length):
        sequence = range(start, start + length)
        for e in range(num_experts):
            for c in range(num_slots):
                slot = experts[e](sum(dispatch[t, e, c] * tokens[t] for t in sequence))
                for t in sequence:
                    outputs[t] += combine[t, e, c] * slot
    return outputs


def soft_stats(logits, is_open, dispatch, combine):
    """Sums over tokens, as `RouterStats` has them."""
    num_tokens, num_experts, _ = logits.shape
    entropy, z = 0.0, 0.0
    for t in range(num_tokens):
        shares = [combine[t, e].sum() for e in range(num_experts)]
        entropy -= sum(p * math.log(p) for p in shares if p > 0)
        powers = [math.exp(value) for e in range(num_experts) if is_open[t, e] for value in logits[t, e]]
        z += math.log(sum(powers)) ** 2 if powers else 0.0
    rows, mass = dispatch.sum((0, 2)), combine.sum((0, 2))
    return {
        "chosen": rows,
        "kept": rows,
        "load_sums": rows,
        "prob_sums": mass,
        "gate_sums": mass,
        "entropy_sum": entropy,
        "z_sum": z,
        "dropped_capacity": 0.0,
        "dropped_topology": 0.0,
    }
