"""Routing one token at a time in plain Python: slow, obvious, and the judge of the fast version."""

import math

import numpy as np


def route_loop(logits, rule, num_choices, *, is_open=None, limit=None, token_mask=None, bias=None, capacity=None):
    """The same as `moe_jax.routing.route` for `logits [T, E]`, with dictionaries and loops."""
    num_tokens, num_experts = logits.shape
    is_open = np.ones_like(logits, bool) if is_open is None else is_open
    limit = np.full(num_tokens, num_choices) if limit is None else limit
    token_mask = np.ones(num_tokens, bool) if token_mask is None else token_mask
    bias = np.zeros(num_experts) if bias is None else bias
    ids = np.full((num_tokens, num_choices), num_experts)
    gates = np.zeros((num_tokens, num_choices))
    sums = {"prob_sums": np.zeros(num_experts), "entropy_sum": 0.0, "z_sum": 0.0, "dropped_topology": 0.0}
    for t in range(num_tokens):
        if not token_mask[t]:
            continue
        experts = [e for e in range(num_experts) if is_open[t, e]]
        asked = min(limit[t], num_choices)
        sums["dropped_topology"] += asked - min(asked, len(experts))
        if not experts:
            continue
        normalizer = sum(math.exp(logits[t, e]) for e in experts)
        p = {e: math.exp(logits[t, e]) / normalizer for e in experts}
        chosen = sorted(experts, key=lambda e: (-(p[e] + bias[e]), e))[:asked]
        total = sum(p[e] for e in chosen)
        for slot, e in enumerate(chosen):
            ids[t, slot] = e
            gates[t, slot] = p[e] if rule in ("softmax_top_k", "switch_top_1") else p[e] / total
        for e in experts:
            sums["prob_sums"][e] += p[e]
            sums["entropy_sum"] -= p[e] * math.log(p[e])
        sums["z_sum"] += math.log(normalizer) ** 2
    chosen_counts = np.array([(ids == e).sum() for e in range(num_experts)], float)
    room = dict.fromkeys(range(num_experts), num_tokens if capacity is None else capacity)
    for slot in range(num_choices):
        for t in range(num_tokens):
            e = ids[t, slot]
            if e == num_experts:
                continue
            if room[e] == 0:
                ids[t, slot], gates[t, slot] = num_experts, 0.0
            else:
                room[e] -= 1
    kept = np.array([(ids == e).sum() for e in range(num_experts)], float)
    stats = sums | {
        "chosen": chosen_counts,
        "kept": kept,
        "dropped_capacity": (chosen_counts - kept).sum(),
        "num_tokens": float(token_mask.sum()),
        "num_masked": float((~token_mask).sum()),
    }
    return ids, gates, stats
