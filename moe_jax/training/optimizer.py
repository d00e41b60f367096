"""The optimizer, put together from optax."""

import dataclasses
from typing import Literal

import jax
import optax

from moe_jax.types import Array, ArrayTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings.

    Attributes:
      name: "adamw" (1711.05101), or "muon" (Jordan 2024, kellerjordan.github.io/posts/muon) for the matrices with
        AdamW for the rest.
      learning_rate: peak, reached after `warmup_steps`.
      warmup_steps: linear warm-up from 0.
      final_fraction: the cosine ends at this fraction of the peak.
      heal_fraction: where the rate of a continuation starts, as a fraction of the peak; it falls to the same end.
      weight_decay: decoupled; acts on matrices, not on scales and biases.
      clip_norm: global gradient norm above which gradients are scaled down.
      b1: decay of the first moment.
      b2: decay of the second moment.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_fraction: float = 0.01
    heal_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, heal_steps: int = 0) -> optax.Schedule:
    """Linear warm-up, a cosine that ends at step `num_steps`, then a linear fall over `heal_steps` more."""
    end = config.learning_rate * config.final_fraction
    warmup_steps = min(config.warmup_steps, max(num_steps - 1, 0))
    # What optax.warmup_cosine_decay_schedule puts together, but for a learning rate that may be traced.
    cosine = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup_steps),
            optax.cosine_decay_schedule(
                config.learning_rate, max(num_steps, 1) - warmup_steps, alpha=config.final_fraction
            ),
        ],
        [warmup_steps],
    )
    if not heal_steps:
        return cosine
    heal = optax.linear_schedule(config.learning_rate * config.heal_fraction, end, heal_steps)
    return optax.join_schedules([cosine, heal], [num_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int, heal_steps: int = 0) -> optax.GradientTransformation:
    """Clipping, then the optimizer under the schedule."""
    schedule = learning_rate_schedule(config, num_steps, heal_steps)
    if config.name == "muon":
        rule = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrix_dimensions,
            consistent_rms=0.2,
        )
    else:
        rule = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_decays)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _is_vector(path: tuple) -> bool:
    """Whether a leaf is a scale or a bias; they carry a stacking axis and so cannot be told by their rank."""
    return any(str(getattr(entry, "key", "")).split("_")[0] in ("scale", "bias", "b") for entry in path)


def _matrix_dimensions(params: ArrayTree) -> ArrayTree:
    """Which axes of a leaf form its matrix for Muon; None leaves embedding, read-out, scales and biases to AdamW.

    Stacked matrices `[L, ..., in, out]` are orthogonalised one by one. Attention projections join their head axes:
    `qkv [L, D, heads, Dh]`, `out [L, H, Dh, D]`.
    """

    def dimensions(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 3 or _is_vector(path):
            return None
        if "qkv" in name:
            return optax.contrib.MuonDimensionNumbers((1,), (2, 3))
        if "attention" in name:
            return optax.contrib.MuonDimensionNumbers((1, 2), (3,))
        return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _decays(params: ArrayTree) -> ArrayTree:
    """True for everything but scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)
