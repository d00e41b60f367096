"""Expert networks of two matrices: plain, gated, and gpt-oss's; rows `[C, D]` to `[C, D]`.

    mlp      act(x W + b) V + c                              relu^2: Primer (2109.08668); gelu: V-MoE (2106.05974)
    gated    (act(x W_gate + b_gate) * (x W_up + b_up)) V + c            GLU variants, Shazeer (2002.05202)
    gpt_oss  ((u + 1) * g * sigmoid(alpha g)) V + c, with g = min(x W_gate + b_gate, limit) and
             u = clip(x W_up + b_up, -limit, limit)                     gpt-oss (2508.10925)

Parameters of E experts: `w_in [E, D, F]`, or `[E, D, 2F]` with [W_gate, W_up] fused; `w_out [E, F, D]` is V; with
biases also `b_in [E, F]` or `[E, 2F]` and `b_out [E, D]`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.nn.experts.kind import ExpertKind
from moe_jax.ops.linear import linear
from moe_jax.ops.low_precision import Precision, check_precision
from moe_jax.types import Array, Expert


def mlp(*, activation: str = "gelu", use_bias: bool = False, precision: Precision = "full") -> ExpertKind:
    """Two matrices with an activation between.

    Args:
      activation: a key of `ACTIVATIONS`.
      use_bias: whether both matrices have one; it starts at zero.
      precision: of the matmuls' factors; see `ops.low_precision`.
    """
    return ExpertKind(_network(1, _activation(activation), precision), functools.partial(_draw, 1, use_bias))


def gated(*, activation: str = "silu", use_bias: bool = False, precision: Precision = "full") -> ExpertKind:
    """The activation of one projection gates another: SwiGLU with silu, GeGLU with gelu.

    Args:
      activation: a key of `ACTIVATIONS`.
      use_bias: whether the matrices have one; it starts at zero.
      precision: of the matmuls' factors; see `ops.low_precision`.
    """
    gate = functools.partial(_gate, _activation(activation))
    return ExpertKind(_network(2, gate, precision), functools.partial(_draw, 2, use_bias))


def gpt_oss(*, alpha: float = 1.702, limit: float = 7.0, precision: Precision = "full") -> ExpertKind:
    """Gated with biases, clamped, and with one added to the ungated half; checkpoints interleave the two halves.

    Args:
      alpha: slope of the gate's sigmoid.
      limit: bound of the gate from above and of the other half on both sides.
      precision: of the matmuls' factors; see `ops.low_precision`.
    """
    gate = functools.partial(_clamped_gate, alpha, limit)
    return ExpertKind(_network(2, gate, precision), functools.partial(_draw, 2, True))


def _network(num_halves: int, activate: Callable[[Array], Array], precision: Precision) -> Expert:
    """The network; in low precision without the form for grouped matmuls, whose kernels know none."""
    check_precision(precision)
    return Expert(
        functools.partial(_into_hidden, precision),
        functools.partial(_out_of_hidden, activate, precision),
        functools.partial(_of_all_experts, activate) if precision == "full" else None,
        functools.partial(_split_hidden, num_halves),
    )


def _into_hidden(precision: Precision, params: dict[str, Array], rows: Array) -> Array:
    hidden = linear(rows, params["w_in"], precision=precision)
    return hidden + params["b_in"][None] if "b_in" in params else hidden


def _out_of_hidden(
    activate: Callable[[Array], Array], precision: Precision, params: dict[str, Array], hidden: Array
) -> Array:
    rows = linear(activate(hidden), params["w_out"], precision=precision)
    return rows + params["b_out"][None] if "b_out" in params else rows


def _of_all_experts(
    activate: Callable[[Array], Array], params: dict[str, Array], rows: Array, matmul: Callable, spread: Callable
) -> Array:
    """The network for rows of all experts at once; see `types.Expert`."""
    hidden = matmul(rows, params["w_in"])
    hidden = hidden + spread(params["b_in"]) if "b_in" in params else hidden
    rows = matmul(activate(hidden), params["w_out"])
    return rows + spread(params["b_out"]) if "b_out" in params else rows


def _split_hidden(num_halves: int, params: dict[str, Array], parts: int) -> dict[str, Array]:
    """Networks of F / parts hidden units each; the first has the output's bias. See `types.Expert`."""

    def cut(units: Array) -> Array:  # (E, ..., halves*F) -> (E, parts, ..., halves*F/parts), each half cut by itself
        shape = units.shape[:-1]
        halves = units.reshape(*shape, num_halves, parts, -1)
        return jnp.moveaxis(halves, -2, 1).reshape(shape[0], parts, *shape[1:], -1)

    w_out = params["w_out"]
    split = {name: cut(value) for name, value in params.items() if name in ("w_in", "b_in")}
    split["w_out"] = w_out.reshape(w_out.shape[0], parts, -1, w_out.shape[-1])
    if "b_out" in params:
        is_first = jnp.arange(parts)[None, :, None] == 0
        split["b_out"] = jnp.where(is_first, params["b_out"][:, None], 0)
    return split


def _gate(activate: Callable[[Array], Array], hidden: Array) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return activate(gate) * up


def _clamped_gate(alpha: float, limit: float, hidden: Array) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))


def _draw(
    num_halves: int, use_bias: bool, key: Array, num_experts: int, width: int, hidden: int, output_scale: float
) -> dict[str, Array]:
    """Normal weights scaled by the inverse root of their fan-in; biases of zero."""
    in_key, out_key = jax.random.split(key)
    num_units = num_halves * hidden
    params = {
        "w_in": jax.random.normal(in_key, (num_experts, width, num_units)) * width**-0.5,
        "w_out": jax.random.normal(out_key, (num_experts, hidden, width)) * output_scale * hidden**-0.5,
    }
    if use_bias:
        params |= {"b_in": jnp.zeros((num_experts, num_units)), "b_out": jnp.zeros((num_experts, width))}
    return params


def _activation(name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


# x Phi(x) is what 2002.05202 calls GELU; checkpoints in the line of T5 1.1 use the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": _relu_squared,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
