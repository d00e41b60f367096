"""Averages of parameters over training, kept in the optimizer's state, and which parameters to evaluate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.training.step import TrainState
from moe_jax.types import Array, ArrayTree


class AverageState(NamedTuple):
    """The average so far, `average`, of `num_steps` steps; before the first, the initial parameters."""

    num_steps: Array
    average: ArrayTree


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Leaves updates alone and keeps an exponential moving average of the parameters that they lead to.

    After t steps, the parameters of step i weigh (1 - decay) decay^(t - i) / (1 - decay^t): the weights sum to one
    without the initial parameters, as in Adam's bias correction (1412.6980, section 3). Last in a chain, since it must
    see the update that is applied.

    Args:
      decay: in (0, 1); 1 / (1 - decay) steps are remembered.
    """

    def init(params: ArrayTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: ArrayTree, state: AverageState, params: ArrayTree | None = None) -> tuple:
        num_steps = state.num_steps + 1
        weight = (1 - decay) / (1 - jnp.float32(decay) ** num_steps)
        average = jax.tree.map(
            lambda mean, leaf: mean + (weight * (leaf - mean)).astype(mean.dtype),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(num_steps, average)

    return optax.GradientTransformation(init, update)


def evaluated(state: TrainState) -> ArrayTree:
    """The parameters to evaluate and to keep, in place of `state.params`.

    Returns:
      The moving average if the optimizer keeps one; under a schedule-free optimizer its averaged sequence x, since
      gradients are taken at another point (2405.15682, eq. 1-3); otherwise the parameters themselves.
    """
    kinds = (AverageState, optax.contrib.ScheduleFreeState)
    for found in jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(found, AverageState):
            return found.average
        if isinstance(found, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(found, state.params)
    return state.params
