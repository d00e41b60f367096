"""Balance by a bias on the selection instead of a loss (Wang et al. 2408.15664; DeepSeek-V3 2412.19437).

After every optimizer step an expert that got more than its share is made less attractive, and the reverse. The state
is one array per layer, never a parameter: the optimizer does not see it. With loads c, their mean m, rate u:

    sign             b_e += u sign(m - c_e)                      2408.15664, algorithm 1
    sign_in_groups   b_e += u sign(m_g - c_e) + v sign(m - m_g)  the same, with m_g the mean load of e's group
    proportional     b_e += u (m - c_e) / m                      a variant in 2408.15664, there without the division
    quantile         b_e += u (q_e - b_e)                        q_e from `required_bias`; u = 1 is the published rule

Each is centred afterwards: a common shift changes no choice, but would grow without bound. `proportional` is also the
stochastic-gradient form of `quantile`: the derivative of the pinball loss of r_te at b_e is c_e / T - K/E. Without
tokens nothing moves. All but `quantile` take an expert that a topology closes to every token for a starving one, and
raise its bias for as long as it is closed.

A balancer's keyword-only arguments are its settings. Rates are in units of the scores, so they depend on the score
function: a softmax over many experts has smaller scores than a sigmoid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from moe_jax.routing.required_bias import histogram_quantile, histogram_range
from moe_jax.routing.rule import check_settings, settings_of
from moe_jax.types import Array, RouterStats

# (bias [E], stats of one optimizer step) -> bias [E]
Balancer = Callable[[Array, RouterStats], Array]


def keep_bias(bias: Array, stats: RouterStats, *, rate: float = 0.0) -> Array:
    """Leaves the bias as it is, whatever the rate: balance is left to the losses, or to nobody."""
    del stats, rate
    return bias


def move_bias_by_sign(bias: Array, stats: RouterStats, *, rate: float = 1e-3) -> Array:
    """A step of fixed size towards balance (2408.15664, algorithm 1).

    Args:
      bias: `[..., E]` float32.
      stats: sums over one whole optimizer step, with the same leading axes.
      rate: step size; the paper's, and DeepSeek-V3's, is 0.001.
    """
    mean = stats.chosen.mean(-1, keepdims=True)
    return _centred(bias + rate * jnp.sign(mean - stats.chosen))


def move_bias_by_sign_in_groups(
    bias: Array, stats: RouterStats, *, num_groups: int = 1, rate: float = 1e-3, group_rate: float = 1e-3
) -> Array:
    """Balances groups of experts and the experts within each group, at rates of their own.

    For experts that share a device, or rules that choose groups first. A rate of 0 balances the groups' totals alone
    and leaves the experts of a group to themselves; a group rate of 0 balances only within groups. This project's
    form: the published loss-free rule knows no groups, and one group is that rule.

    Args:
      bias: `[..., E]` float32.
      stats: sums over one whole optimizer step, with the same leading axes.
      num_groups: G, a divisor of E; groups are runs of E / G neighbouring experts.
      rate: step size of an expert towards its group's mean load.
      group_rate: step size of a group towards the mean load.

    Raises:
      ValueError: groups of unequal size.
    """
    num_experts = bias.shape[-1]
    if num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_experts} experts into equal groups")
    load = stats.chosen.reshape(*bias.shape[:-1], num_groups, -1)  # (..., E) -> (..., G, E/G)
    group_mean = load.mean(-1, keepdims=True)
    step = rate * jnp.sign(group_mean - load) + group_rate * jnp.sign(load.mean((-2, -1), keepdims=True) - group_mean)
    return _centred(bias + step.reshape(bias.shape))


def move_bias_in_proportion(bias: Array, stats: RouterStats, *, rate: float = 1e-2) -> Array:
    """A step that shrinks with the imbalance, so that it can come to rest.

    Args:
      bias: `[..., E]` float32.
      stats: sums over one whole optimizer step, with the same leading axes.
      rate: the step of an expert that got nothing; the error is relative to the mean load, so that neither batch size
        nor K changes its meaning.
    """
    mean = stats.chosen.mean(-1, keepdims=True)
    return _centred(bias + rate * (mean - stats.chosen) / jnp.maximum(mean, 1.0 / bias.shape[-1]))


def move_bias_to_quantile(bias: Array, stats: RouterStats, *, rate: float = 1.0) -> Array:
    """Quantile balancing: the bias with which each expert would have got the mean load (see `required_bias`).

    The rank is what was assigned, over the number of experts that are open to anyone: T K / E without a topology. An
    expert open to fewer tokens gets the bias with which all of these would take it; one open to none keeps its own.

    Args:
      bias: `[..., E]` float32, the one that `stats` was recorded under.
      stats: sums over one whole optimizer step, with the same leading axes and with `bias_histogram`.
      rate: 1 forgets the old bias, as published; less is a moving average.

    Raises:
      ValueError: no histogram was recorded.
    """
    histogram = stats.bias_histogram
    if histogram is None:
        raise ValueError(
            'balancer "quantile" reads stats.bias_histogram, which is missing: build the model with bias_bins=1000 '
            "and a rule that reports its selection scores, such as sigmoid_top_k"
        )
    is_open = histogram.sum(-1) > 0
    num_open = jnp.maximum(is_open.sum(-1, keepdims=True), 1)
    quantile = histogram_quantile(histogram, stats.chosen.sum(-1) / num_open[..., 0], *histogram_range(bias))
    moved = bias + rate * (quantile - bias)
    mean = jnp.where(is_open, moved, 0.0).sum(-1, keepdims=True) / num_open
    return jnp.where(is_open, moved - mean, bias)


def get_balancer(name: str, **settings: Any) -> Balancer:
    """The balancer of that name, with settings.

    Args:
      name: a key of `BALANCERS`.
      settings: values for the balancer's own settings, such as `rate=0.01`.

    Raises:
      ValueError: an unknown name or setting; the message lists the known ones.
    """
    if name not in BALANCERS:
        raise ValueError(f"unknown balancer {name!r}; known: {', '.join(BALANCERS)}")
    check_settings(settings, settings_of(BALANCERS[name]), f"balancer {name!r}")
    return partial(BALANCERS[name], **settings)


def _centred(bias: Array) -> Array:
    return bias - bias.mean(-1, keepdims=True)


BALANCERS: dict[str, Callable[..., Array]] = {
    "none": keep_bias,
    "sign": move_bias_by_sign,
    "sign_in_groups": move_bias_by_sign_in_groups,
    "proportional": move_bias_in_proportion,
    "quantile": move_bias_to_quantile,
}
