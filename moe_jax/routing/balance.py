"""Balance by a bias on the selection instead of a loss (Wang et al. 2408.15664; DeepSeek-V3 2412.19437).

After every optimizer step an expert that got more than the mean is made less attractive, and the reverse. The state
is one array per layer, never a parameter: the optimizer does not see it.
"""

import jax.numpy as jnp

from moe_jax.types import Array, RouterStats


def update_bias(bias: Array, stats: RouterStats, rate: float) -> Array:
    """`b_e + rate * sign(mean load - load_e)`, then centred (a common shift does not change any choice).

    Args:
      bias: `[..., E]` float32.
      stats: sums over one whole optimizer step, with the same leading axes.
      rate: step size in probability units; the paper uses 0.001.
    """
    mean = stats.chosen.mean(-1, keepdims=True)
    moved = bias + rate * jnp.sign(mean - stats.chosen)
    return moved - moved.mean(-1, keepdims=True)
