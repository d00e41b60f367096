"""Groups of parameters, told by the path of a leaf: who decays, and who learns faster or slower than the rest.

A path reads like `stacks/1/feed_forward/router/kernel`. Leaves of one stack belong together, since the layers of a run
share their arrays.
"""

import dataclasses
from fnmatch import fnmatchcase

import jax
import optax

from moe_jax.runs import ConfigError
from moe_jax.types import Array, ArrayTree

VECTORS = {"scale", "bias", "b", "norm", "sinks"}  # words in the names of what is no matrix


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Settings of the parameters whose path matches; the first group that matches a path has it.

    Attributes:
      pattern: of the whole path, with `*` and `?`, such as "*router*".
      learning_rate_factor: multiplies their update, decay included.
      weight_decay: in place of the optimizer's; also for scales and biases. None leaves it.
    """

    pattern: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


def path_of(path: tuple) -> str:
    """The path of a leaf, as patterns see it."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def is_vector(path: tuple) -> bool:
    """Whether a leaf is a scale, a bias or a sink; they carry a stacking axis and so cannot be told by their rank."""
    return any(VECTORS & set(str(getattr(entry, "key", "")).split("_")) for entry in path)


def decay_weights(weight_decay: float, groups: tuple[ParameterGroup, ...] = ()) -> optax.GradientTransformation:
    """Adds each parameter times its decay to its update; scales and biases have none unless a group says so."""

    def decay(path: tuple, update: Array, parameter: Array) -> Array:
        group = _group_of(path, groups)
        factor = None if is_vector(path) else weight_decay  # a traced number in a population
        if group is not None and group.weight_decay is not None:
            factor = group.weight_decay
        return update if factor is None else update + factor * parameter

    def update_fn(updates: ArrayTree, state: optax.OptState, params: ArrayTree | None = None) -> tuple:
        return jax.tree_util.tree_map_with_path(decay, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def scale_groups(groups: tuple[ParameterGroup, ...]) -> optax.GradientTransformation:
    """Multiplies each update by its group's factor.

    Its `init` raises ConfigError for a pattern that has no parameter, naming the paths that there are.
    """

    def check(params: ArrayTree) -> optax.EmptyState:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        used = [_group_of(path, groups) for path in paths]
        for group in groups:
            if group not in used:
                known = ", ".join(map(path_of, paths))
                raise ConfigError(
                    f"optimizer.groups: the pattern {group.pattern!r} matches no parameter that an earlier one left; "
                    f"parameters: {known}"
                )
        return optax.EmptyState()

    def scale(path: tuple, update: Array) -> Array:
        group = _group_of(path, groups)
        return update if group is None else update * group.learning_rate_factor

    def update_fn(updates: ArrayTree, state: optax.OptState, params: ArrayTree | None = None) -> tuple:
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(check, update_fn)


def _group_of(path: tuple, groups: tuple[ParameterGroup, ...]) -> ParameterGroup | None:
    """The first group that matches."""
    return next((group for group in groups if fnmatchcase(path_of(path), group.pattern)), None)
