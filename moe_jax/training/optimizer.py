"""The optimizer, put together from optax.

    clip -> direction -> + decay -> * -rate of the schedule -> * factor of the group [-> average]

A direction is what an optimizer makes of gradients, before rate and decay: decay is decoupled in all of them
(1711.05101), and both are the same code for each.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import optax

from moe_jax.training.averaging import average_parameters
from moe_jax.training.parameter_groups import ParameterGroup, decay_weights, is_vector, path_of, scale_groups
from moe_jax.types import Array, ArrayTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings.

    Attributes:
      name: "adamw" (1711.05101); "muon" (Jordan 2024, kellerjordan.github.io/posts/muon) for the matrices with Adam for
        the rest; "adafactor" (1804.04235), whose rate is relative to a parameter's root mean square; "schedule_free"
        (2405.15682) with Adam's second moment, evaluated at its average (see `averaging.evaluated`).
      learning_rate: peak, reached after `warmup_steps`.
      warmup_steps: linear warm-up from 0.
      schedule: after it, "cosine" to the end; "wsd", the peak and then a linear fall (2404.06395, 2405.18392); or
        "constant", which "schedule_free" asks for.
      final_fraction: "cosine" and "wsd" end at this fraction of the peak.
      decay_fraction: the part of the steps in which "wsd" falls.
      heal_fraction: where the rate of a continuation starts, as a fraction of the peak; it falls to the same end.
      weight_decay: decoupled; acts on matrices, not on scales and biases.
      clip_norm: global gradient norm above which gradients are scaled down.
      b1: decay of the first moment; under "schedule_free" the place of the gradient between average and iterate.
      b2: decay of the second moment; "adafactor" has its own.
      groups: parameters with settings of their own, such as `({"pattern": "*router*", "learning_rate_factor": 0.1},)`.
      average_decay: of a moving average of the parameters, which is then what is evaluated; 0 keeps none.
    """

    name: Literal["adamw", "muon", "adafactor", "schedule_free"] = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final_fraction: float = 0.01
    decay_fraction: float = 0.2
    heal_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    groups: tuple[ParameterGroup, ...] = ()
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay={self.average_decay} must be in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must be in (0, 1]")
        if self.name == "schedule_free" and (self.schedule != "constant" or self.average_decay):
            raise ValueError(
                "name='schedule_free' averages instead of lowering the rate: give schedule='constant' (got "
                f"{self.schedule!r}) and average_decay=0 (got {self.average_decay})"
            )


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, heal_steps: int = 0) -> optax.Schedule:
    """Linear warm-up, the schedule until step `num_steps`, then a linear fall over `heal_steps` more."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup_steps = min(config.warmup_steps, max(num_steps - 1, 0))
    if config.schedule == "cosine":
        # What optax.warmup_cosine_decay_schedule puts together, but for a learning rate that may be traced.
        fall = optax.cosine_decay_schedule(peak, max(num_steps, 1) - warmup_steps, alpha=config.final_fraction)
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), fall], [warmup_steps])
    else:
        pieces, marks = [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)], [warmup_steps]
        if config.schedule == "wsd":
            fall_steps = min(round(config.decay_fraction * num_steps), num_steps - warmup_steps)
            pieces.append(optax.linear_schedule(peak, end, fall_steps))
            marks.append(num_steps - fall_steps)
        schedule = optax.join_schedules(pieces, marks)
    if not heal_steps:
        return schedule
    heal = optax.linear_schedule(config.learning_rate * config.heal_fraction, end, heal_steps)
    return optax.join_schedules([schedule, heal], [num_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int, heal_steps: int = 0) -> optax.GradientTransformation:
    """Clipping, then the optimizer under the schedule.

    Its `init` raises ConfigError for a group that has no parameter.
    """
    schedule = learning_rate_schedule(config, num_steps, heal_steps)
    rule = optax.chain(
        DIRECTIONS[config.name](config),
        decay_weights(config.weight_decay, config.groups),
        optax.scale_by_learning_rate(schedule),
        *([scale_groups(config.groups)] if config.groups else []),
    )
    if config.name == "schedule_free":
        rule = optax.contrib.schedule_free(rule, schedule, b1=config.b1)
    average = [average_parameters(config.average_decay)] if config.average_decay else []
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule, *average)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2)


def _adam_without_momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    """The averages of schedule-free stand in for the first moment."""
    return optax.scale_by_adam(b1=0.0, b2=config.b2)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.contrib.muon(
        -1.0,  # optax turns a rate's sign; its direction is wanted
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrix_dimensions,
        consistent_rms=0.2,
    )


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Factored second moments, clipped, and relative to the parameter (1804.04235, algorithm 5), of each matrix."""
    del config
    return _each_matrix(
        optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    )


def _each_matrix(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a rule to each layer and expert of a stacked leaf as if it were a leaf of its own."""

    def rules(tree: ArrayTree) -> dict[str, tuple[Array, optax.GradientTransformation]]:
        """Path -> leaf, and the rule over its stacking axes."""
        return {path_of(path): (leaf, over_stack(path)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def over_stack(path: tuple) -> optax.GradientTransformation:
        init, update = rule.init, rule.update
        for name in ("experts", "stacks"):
            if any(getattr(entry, "key", None) == name for entry in path):
                init, update = jax.vmap(init), jax.vmap(update)
        return optax.GradientTransformation(init, update)

    def init(params: ArrayTree) -> dict[str, optax.OptState]:
        return {name: own.init(leaf) for name, (leaf, own) in rules(params).items()}

    def update(updates: ArrayTree, state: dict[str, optax.OptState], params: ArrayTree | None = None) -> tuple:
        parameters = jax.tree.leaves(params)
        moved = {
            name: own.update(leaf, state[name], parameter)
            for (name, (leaf, own)), parameter in zip(rules(updates).items(), parameters, strict=True)
        }
        changed = jax.tree.unflatten(jax.tree.structure(updates), [update for update, _ in moved.values()])
        return changed, {name: after for name, (_, after) in moved.items()}

    return optax.GradientTransformation(init, update)


def _matrix_dimensions(params: ArrayTree) -> ArrayTree:
    """Which axes of a leaf form its matrix for Muon; None leaves embedding, read-out, scales and biases to AdamW.

    Stacked matrices `[L, ..., in, out]` are orthogonalised one by one. Attention projections join their head axes:
    `qkv [L, D, heads, Dh]`, `out [L, H, Dh, D]`.
    """

    def dimensions(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 3 or is_vector(path) or "embedding" in name:
            return None
        if "qkv" in name:
            return optax.contrib.MuonDimensionNumbers((1,), (2, 3))
        if "attention" in name:
            return optax.contrib.MuonDimensionNumbers((1, 2), (3,))
        return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)


DIRECTIONS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
    "adafactor": _adafactor,
    "schedule_free": _adam_without_momentum,
}
