"""Deep experts: N layers in sequence inside one expert, each adding to the residual stream that entered it.

    y = f_1(x) + f_2(x + f_1(x)) + ... ,   each f_n a network of a simpler kind

The expert's output is the sum of what its layers add, and not the stream itself, since the block around the
mixture-of-experts layer adds x once more. So one layer is the simpler kind itself.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.nn.experts.kind import ExpertKind
from moe_jax.nn.experts.networks import gated
from moe_jax.types import Array, Expert

Params = dict[str, Array]


def deep(*, num_layers: int = 2) -> ExpertKind:
    """Experts of `num_layers` SwiGLU layers; F is the hidden width of each.

    Raises:
      ValueError: fewer than one layer.
    """
    return deepen(gated(), num_layers)


def deepen(layer: ExpertKind, num_layers: int) -> ExpertKind:
    """Puts N networks of one kind in sequence; parameters get an axis `[E, N, ...]`.

    Outputs start smaller by the root of N, so that N layers together start like one.

    Raises:
      ValueError: fewer than one layer.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    first, rest = functools.partial(_first_matmul, layer.expert), functools.partial(_all_the_rest, layer.expert)
    grouped = None if layer.expert.grouped is None else functools.partial(_of_all_experts, layer.expert.grouped)
    return ExpertKind(Expert(first, rest, grouped), functools.partial(_draw, layer, num_layers))


def _first_matmul(layer: Expert, params: Params, rows: Array) -> tuple[Array, Array]:
    """The rows, which later layers add to, and what the first layer keeps."""
    return rows, layer.inner(_layer_of(params, 0), rows)


def _all_the_rest(layer: Expert, params: Params, kept: tuple[Array, Array]) -> Array:
    rows, hidden = kept
    added = layer.outer(_layer_of(params, 0), hidden)
    for n in range(1, len(jax.tree.leaves(params)[0])):
        one = _layer_of(params, n)
        added += layer.outer(one, layer.inner(one, rows + added))
    return added


def _of_all_experts(layer: Callable, params: Params, rows: Array, matmul: Callable, spread: Callable) -> Array:
    """All layers for rows of all experts at once; see `types.Expert`."""
    added = jnp.zeros_like(rows)
    for n in range(jax.tree.leaves(params)[0].shape[1]):
        one = {name: value[:, n] for name, value in params.items()}  # [E, N, ...] -> [E, ...]
        added += layer(one, rows + added, matmul, spread)
    return added


def _layer_of(params: Params, index: int) -> Params:
    return {name: value[index] for name, value in params.items()}


def _draw(
    layer: ExpertKind, num_layers: int, key: Array, num_experts: int, width: int, hidden: int, output_scale: float
) -> Params:
    scale = output_scale * num_layers**-0.5
    layers = [layer.draw(k, num_experts, width, hidden, scale) for k in jax.random.split(key, num_layers)]
    return {name: jnp.stack([one[name] for one in layers], axis=1) for name in layers[0]}
