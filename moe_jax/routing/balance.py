"""Balance by a bias on the selection instead of a loss (Wang et al. 2408.15664; DeepSeek-V3 2412.19437).

After every optimizer step an expert that got more than the mean is made less attractive, and the reverse. The state
is one array per layer, never a parameter: the optimizer does not see it.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from moe_jax.types import Array, RouterStats

# (bias [E], stats of one optimizer step) -> bias [E]
Balancer = Callable[[Array, RouterStats], Array]


def keep_bias(bias: Array, stats: RouterStats, *, rate: float) -> Array:
    """Leaves the bias as it is: balance is left to the losses, or to nobody."""
    del stats, rate
    return bias


def move_bias_by_sign(bias: Array, stats: RouterStats, *, rate: float) -> Array:
    """`b_e + rate * sign(mean load - load_e)`, then centred (a common shift does not change any choice).

    Args:
      bias: `[..., E]` float32.
      stats: sums over one whole optimizer step, with the same leading axes.
      rate: step size in units of the scores; the paper uses 0.001.
    """
    mean = stats.chosen.mean(-1, keepdims=True)
    moved = bias + rate * jnp.sign(mean - stats.chosen)
    return moved - moved.mean(-1, keepdims=True)


def get_balancer(name: str, rate: float) -> Balancer:
    """The balancer of that name with its rate; ValueError with the known names otherwise."""
    if name not in BALANCERS:
        raise ValueError(f"unknown balancer {name!r}; known: {', '.join(BALANCERS)}")
    return partial(BALANCERS[name], rate=rate)


BALANCERS: dict[str, Callable[..., Array]] = {"none": keep_bias, "sign": move_bias_by_sign}
