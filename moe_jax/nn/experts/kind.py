"""What a kind of expert is, and how a function of one's own becomes an expert."""

from collections.abc import Callable
from typing import NamedTuple

from moe_jax.types import Array, ArrayTree, Expert


class ExpertKind(NamedTuple):
    """A network, and how the parameters of E of them are drawn.

    Attributes:
      expert: the network of one expert.
      draw: (key, E, D, F, output scale) to a dict of arrays with leading `[E]`; the scale is a factor on what writes
        the output, for depth-scaled initialisation.
    """

    expert: Expert
    draw: Callable[[Array, int, int, int, float], dict[str, Array]]


def lift(function: Callable[[ArrayTree, Array], Array]) -> Expert:
    """Makes an expert of any differentiable function of one expert's parameters and rows.

    Stack the parameters of E of them, leaves with leading `[E]`, and every dispatch backend runs them. The whole
    function is `inner`, so a backend with its own VJP keeps its output and computes the function once more in the
    backward pass.

    Args:
      function: (params, rows `[C, D]`) to `[C, D]`. It must treat every row by itself, since backends cut an expert's
        rows into parts and add rows of padding. These are zero, where values and derivatives must be finite.
    """
    return Expert(function, _unchanged)


def _unchanged(params: ArrayTree, rows: Array) -> Array:
    del params
    return rows
