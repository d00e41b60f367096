"""A rule's level steered towards a mean number of experts a token: the PI controller of DTop-p (2512.13996).

After optimizer step t, with `a_t` the mean number of experts that a token chose and `e_t = (target - a_t) / E`,

    level_{t+1} = start + kp * e_t + ki * sum_{s <= t} e_s

The first term answers a deviation, the second removes what would remain of it. The gains are positive where a higher
level means more experts, and negative where it means fewer. With g the slope of `a / E` in the level, the loop is
stable for `|kp| g < 1` and `(2 |kp| + |ki|) g < 2`, and its error decays in about `1 / (|ki| g)` steps; the rules'
gains suit logits of standard deviation 0.5 to 2.

Here each layer has a level of its own, which the paper has as a variant; in its main form all layers share one, and a
learned factor on each layer's normalised logits lets them differ.
"""

from functools import partial

import jax.numpy as jnp

from moe_jax.routing.rule import Controller
from moe_jax.types import Array, RouterStats


def pi_controller(start: float, low: float, high: float, kp: float, ki: float) -> Controller:
    """A controller with these defaults; see `steer_mean_choices`."""
    return Controller(start, partial(steer_mean_choices, start=start, low=low, high=high, kp=kp, ki=ki))


def steer_mean_choices(
    level: Array,
    integral: Array,
    stats: RouterStats,
    num_choices: int,
    *,
    start: float,
    low: float,
    high: float,
    kp: float,
    ki: float,
    target: float | None = None,
) -> tuple[Array, Array]:
    """The next level. What counts is what tokens chose, whether or not a full expert then dropped it.

    Args:
      level: `[]` float32.
      integral: `[]` float32, `ki * sum e`, in units of the level. It is clipped so that the level without its first
        term stays in range: an unreachable target winds nothing up.
      stats: sums over one optimizer step; without tokens nothing moves.
      num_choices: K, the most experts of a token.
      start: the level before the first step.
      low: the lowest level.
      high: the highest level.
      kp: gain of the deviation.
      ki: gain of its sum.
      target: the mean number of experts to reach; None leaves the level where it is.

    Raises:
      ValueError: a target outside `[1, K]`.
    """
    if target is None:
        return level, integral
    if not 1 <= target <= num_choices:
        raise ValueError(f"target is a mean number of experts in [1, {num_choices}], the num_choices; got {target}")
    error = (target - stats.chosen.sum() / jnp.maximum(stats.num_tokens, 1.0)) / stats.chosen.shape[-1]
    moved_integral = jnp.clip(integral + ki * error, low - start, high - start)
    moved = jnp.clip(start + moved_integral + kp * error, low, high)
    has_tokens = stats.num_tokens > 0
    return jnp.where(has_tokens, moved, level), jnp.where(has_tokens, moved_integral, integral)
