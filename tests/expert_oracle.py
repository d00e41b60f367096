"""Expert networks in float64 NumPy, one row at a time, written from the papers' equations."""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """x times the normal distribution function."""
    return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x):
    return x * sigmoid(x)


def relu(x):
    return np.where(x > 0, x, 0.0)


def two_matrices(activate):
    def network(params, x):
        hidden = x @ params["w_in"] + params.get("b_in", 0.0)
        return activate(hidden) @ params["w_out"] + params.get("b_out", 0.0)

    return network


def gate_by(activation):
    def activate(hidden):
        gate, up = np.split(hidden, 2)
        return activation(gate) * up

    return activate


def gpt_oss_gate(hidden):
    gate, up = np.split(hidden, 2)
    gate = np.array([min(g, 7.0) for g in gate])
    up = np.array([max(-7.0, min(u, 7.0)) for u in up])
    return (up + 1) * gate * sigmoid(1.702 * gate)


def deep_swiglu(params, x):
    stream = x.copy()
    for w_in, w_out in zip(params["w_in"], params["w_out"], strict=True):
        stream = stream + two_matrices(gate_by(silu))({"w_in": w_in, "w_out": w_out}, stream)
    return stream - x


# (kind, settings) of `nn.experts.EXPERTS`, and the network of one row.
NETWORKS = {
    ("swiglu", ()): two_matrices(gate_by(silu)),
    ("swiglu", (("use_bias", True),)): two_matrices(gate_by(silu)),
    ("geglu", ()): two_matrices(gate_by(gelu)),
    ("geglu", (("activation", "gelu_tanh"),)): two_matrices(gate_by(gelu_tanh)),
    ("mlp", ()): two_matrices(gelu),
    ("mlp", (("activation", "relu"), ("use_bias", True))): two_matrices(relu),
    ("relu2", ()): two_matrices(lambda hidden: relu(hidden) ** 2),
    ("gpt_oss", ()): two_matrices(gpt_oss_gate),
    ("deep", (("num_layers", 3),)): deep_swiglu,
}


def finite_differences(function, x, step=1e-6):
    """Gradient of a scalar function of one float64 array by central differences."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient
