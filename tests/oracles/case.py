"""What an oracle is given, and the loops around it."""

import math
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """The fields of `RoutingInputs` in float64, nothing missing: open everywhere, no limit and no bias if not given."""

    logits: np.ndarray
    is_open: np.ndarray
    limit: np.ndarray
    bias: np.ndarray
    level: float
    token_ids: np.ndarray
    num_sequences: int

    def open_experts(self, token):
        """Ids of the experts open to a token."""
        return [e for e in range(self.logits.shape[1]) if self.is_open[token, e]]


def make_case(
    logits,
    *,
    is_open=None,
    limit=None,
    bias=None,
    level=0.0,
    token_ids=None,
    num_sequences=1,
    token_mask=None,
):
    """A case from what the test gives; masked tokens have nothing open."""
    num_tokens, num_experts = logits.shape
    is_open = np.ones((num_tokens, num_experts), bool) if is_open is None else np.array(is_open)
    if token_mask is not None:
        is_open &= np.asarray(token_mask)[:, None]
    return Case(
        logits=np.asarray(logits, np.float64),
        is_open=is_open,
        limit=np.full(num_tokens, num_experts) if limit is None else np.asarray(limit),
        bias=np.zeros(num_experts) if bias is None else np.asarray(bias, np.float64),
        level=float(level),
        token_ids=np.zeros(num_tokens, int) if token_ids is None else np.asarray(token_ids),
        num_sequences=num_sequences,
    )


def to_slots(chosen, num_slots, num_experts):
    """Ids and gates `[T, K]` from one list of (expert, gate) per token, in slot order."""
    ids, gates = np.full((len(chosen), num_slots), num_experts), np.zeros((len(chosen), num_slots))
    for t, pairs in enumerate(chosen):
        for slot, (expert, gate) in enumerate(pairs):
            ids[t, slot], gates[t, slot] = expert, gate
    return ids, gates


def route_loop(oracle, logits, num_choices, *, token_mask=None, capacity=None, fixed_count=True, num_null=0, **given):
    """Ids, gates and statistics of `route`, with dictionaries and loops; `given` are arguments of `make_case`.

    The last `num_null` experts are null: the choices of them are counted in equal shares, and dispatched nowhere.
    """
    case = make_case(logits, token_mask=token_mask, **given)
    num_tokens, num_experts = logits.shape
    token_mask = np.ones(num_tokens, bool) if token_mask is None else np.asarray(token_mask)
    ids, gates, probabilities, *priority = oracle(case, num_choices)
    served = sorted(range(num_tokens), key=lambda t: (-priority[0][t] if priority else 0.0, t))
    chosen_gates = gates.copy()
    entropy, z = 0.0, 0.0
    for t in range(num_tokens):
        experts = case.open_experts(t)
        entropy -= sum(p * math.log(p) for p in probabilities[t] if p > 0)
        if experts:
            z += math.log(sum(math.exp(case.logits[t, e]) for e in experts)) ** 2
    asked = sum(min(case.limit[t], num_choices) for t in range(num_tokens) if token_mask[t])
    chosen = np.array([(ids == e).sum() for e in range(num_experts)], float)
    importance = np.array([chosen_gates[ids == e].sum() for e in range(num_experts)])
    is_null = np.arange(num_experts) >= num_experts - num_null
    ids[np.isin(ids, np.flatnonzero(is_null))] = num_experts
    room = dict.fromkeys(range(num_experts), num_tokens if capacity is None else capacity)
    for slot in range(ids.shape[1]):
        for t in served:
            e = ids[t, slot]
            if e == num_experts:
                continue
            if room[e] == 0:
                ids[t, slot], gates[t, slot] = num_experts, 0.0
            else:
                room[e] -= 1
    kept = np.array([(ids == e).sum() for e in range(num_experts)], float)
    stats = {
        "chosen": np.where(is_null, chosen[is_null].sum() / max(num_null, 1), chosen),
        "kept": kept,
        "prob_sums": probabilities.sum(0),
        "entropy_sum": entropy,
        "z_sum": z,
        "dropped_capacity": (chosen - kept)[~is_null].sum(),
        "dropped_topology": asked - chosen.sum() if fixed_count else 0.0,
        "num_tokens": float(token_mask.sum()),
        "num_masked": float((~token_mask).sum()),
        "gate_sums": importance,
    }
    return ids, gates, stats
