"""Router modules, one token and one expert at a time: parameters (float64, by name) and a sequence to its logits."""

import math

import numpy as np


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def columns(kernel):
    """The weight vector of each output."""
    return [kernel[:, i] for i in range(kernel.shape[1])]


def linear(params, x, mask, temperature=1.0, **_):
    bias = params.get("bias", np.zeros(params["kernel"].shape[1]))
    return [
        [(token @ weight + b) / temperature for weight, b in zip(columns(params["kernel"]), bias, strict=True)]
        for token in x
    ]


def cosine(params, x, mask, **_):
    rows = []
    for token in x:
        small = token @ params["projection"]
        angles = [
            small @ prototype / (math.sqrt(small @ small) * math.sqrt(prototype @ prototype))
            for prototype in columns(params["prototypes"])
        ]
        rows.append([float(params["scale"]) * angle for angle in angles])
    return rows


def mlp(params, x, mask, **_):
    rows = []
    for token in x:
        sums = [token @ weight for weight in columns(params["w_in"])]
        hidden = np.array([s * 0.5 * (1 + math.erf(s / math.sqrt(2))) for s in sums])
        rows.append([hidden @ weight for weight in columns(params["w_out"])])
    return rows


def attention(params, x, mask, **_):
    num_experts = params["qkv"].shape[1] // 3
    rows = []
    for token in x:
        numbers = token @ params["qkv"]
        query, key, value = (numbers[i * num_experts : (i + 1) * num_experts] for i in range(3))
        row = []
        for e in range(num_experts):
            weights = softmax([query[e] * key[f] for f in range(num_experts)])
            row.append(sum(weights[f] * value[f] for f in range(num_experts)))
        rows.append(row)
    return rows


def hierarchical(params, x, mask, num_groups, **_):
    size = params["kernel"].shape[1] // num_groups
    rows = []
    for token in x:
        groups = softmax([token @ weight for weight in columns(params["group_kernel"])])
        row = []
        for g in range(num_groups):
            inside = softmax([token @ weight for weight in columns(params["kernel"])[g * size : (g + 1) * size]])
            row += [math.log(groups[g] * p) for p in inside]
        rows.append(row)
    return rows


def recurrent(params, x, mask, hidden, **_):
    state = np.zeros(hidden)
    rows = []
    for token, is_token in zip(x, mask, strict=True):
        if is_token:
            for h in range(hidden):
                renewal = sigmoid(token @ params["w_in"][:, h])
                state[h] = (1 - renewal) * state[h] + renewal * (token @ params["w_in"][:, hidden + h])
        rows.append(
            [token @ w + state @ u for w, u in zip(*map(columns, (params["kernel"], params["w_out"])), strict=True)]
        )
    return rows


def load_aware(params, x, mask, strength, decay, **_):
    num_experts = params["kernel"].shape[1]
    load = [1 / num_experts] * num_experts
    rows = []
    for token, is_token in zip(x, mask, strict=True):
        wishes = [token @ weight for weight in columns(params["kernel"])]
        row = [wish - strength * (num_experts * m - 1) for wish, m in zip(wishes, load, strict=True)]
        if is_token:
            load = [decay * m + (1 - decay) * p for m, p in zip(load, softmax(row), strict=True)]
        rows.append(row)
    return rows


ROUTER_ORACLES = {
    "linear": linear,
    "cosine": cosine,
    "mlp": mlp,
    "attention": attention,
    "hierarchical": hierarchical,
    "recurrent": recurrent,
    "load_aware": load_aware,
}
