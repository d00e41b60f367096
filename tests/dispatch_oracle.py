"""Dispatch one assignment at a time in float64 NumPy, with a SwiGLU expert and its gradients derived by hand."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def silu_grad(x):
    sigmoid = 1 / (1 + np.exp(-x))
    return sigmoid * (1 + x * (1 - sigmoid))


def dispatch_loop(tokens, expert_ids, gates, params, output_grad):
    """Output `[T, D]` and the gradients of `sum(output * output_grad)` for tokens, gates and parameters.

    With a = x W_gate, b = x W_up, s = silu(a) b, y = s W_down and output += gate * y:
    ds = gate * (dout W_down^T), da = ds * b * silu'(a), db = ds * silu(a), dx = da W_gate^T + db W_up^T.
    """
    tokens, gates, output_grad = (np.asarray(x, np.float64) for x in (tokens, gates, output_grad))
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    num_experts = params["down"].shape[0]
    output, tokens_grad, gates_grad = np.zeros_like(tokens), np.zeros_like(tokens), np.zeros_like(gates)
    params_grad = {name: np.zeros_like(value) for name, value in params.items()}
    for t in range(tokens.shape[0]):
        for k in range(gates.shape[1]):
            e = expert_ids[t, k]
            if e == num_experts:
                continue
            w_gate, w_up = np.split(params["gate_up"][e], 2, axis=1)
            w_down = params["down"][e]
            x, gate = tokens[t], gates[t, k]
            a, b = x @ w_gate, x @ w_up
            s = silu(a) * b
            y = s @ w_down
            output[t] += gate * y
            gates_grad[t, k] = output_grad[t] @ y
            ds = gate * (w_down @ output_grad[t])
            da, db = ds * b * silu_grad(a), ds * silu(a)
            tokens_grad[t] += w_gate @ da + w_up @ db
            params_grad["down"][e] += np.outer(s, gate * output_grad[t])
            params_grad["gate_up"][e] += np.outer(x, np.concatenate([da, db]))
    return output, (tokens_grad, gates_grad, params_grad)
