"""A population of small models, trained in one compiled program: members differ in seed and in numbers, not in shapes.

Each member is the run that it would be alone: its parameters come from its own key, its batches are its own, and its
settings are arrays where a run of its own has constants. The program is the training step of one member under `vmap`,
spread over the process's devices. On a CPU a device takes its members in turn instead: with `vmap` the step of 8
members takes a quarter more CPU time at D=64 and 512 tokens each, presumably since intermediate arrays of all members
leave the cache; at D=32 and 256 tokens both take about the same. What gains there is a device for each core
(`use_all_cores`): small operations find no work for a second core in themselves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, TrainState, make_train_step, state_of
from moe_jax.types import Array

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")

# Settings that a member may have for itself: numbers that enter the program as numbers.
MEMBER_SETTINGS: dict[str, tuple[str, ...]] = {
    "optimizer": ("learning_rate", "final_fraction", "weight_decay", "clip_norm", "b1", "b2"),
    "loss": ("balance", "importance", "load", "entropy", "global_entropy", "z"),
}
AXIS = "population"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members:
    """What members differ in; every array has a leading `[P]`.

    Attributes:
      settings: section -> key of `MEMBER_SETTINGS` -> float32 values.
      init_key: of the parameters.
      noise_key: what routers draw from.
    """

    settings: dict[str, dict[str, Array]]
    init_key: Array
    noise_key: Array


PopulationStep = Callable[[TrainState, Members, Array, Array], tuple[TrainState, dict[str, Array]]]


def stack_members(settings: Sequence[Mapping[str, Mapping[str, Any]]], keys: Sequence[tuple[Array, Array]]) -> Members:
    """Puts members together.

    Args:
      settings: for each member, section -> key -> number; a key is kept if it is in `MEMBER_SETTINGS` and differs
        between members.
      keys: for each member, its initial key and its noise key.

    Returns:
      The members.
    """
    kept: dict[str, dict[str, Array]] = {}
    for section, names in MEMBER_SETTINGS.items():
        columns = {name: [member[section][name] for member in settings] for name in names}
        kept[section] = {
            name: jnp.array(column, jnp.float32) for name, column in columns.items() if len(set(column)) > 1
        }
    init_keys, noise_keys = (jnp.stack(column) for column in zip(*keys, strict=True))
    return Members(kept, init_keys, noise_keys)


def init_population(
    make_model: Callable[[Array], nnx.Module], members: Members, optimizer: OptimizerConfig, num_steps: int
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and every member's state at step 0, with a leading `[P]`."""

    def initialise(member: Members) -> TrainState:
        return state_of(make_model(member.init_key), make_optimizer(_with(optimizer, member, "optimizer"), num_steps))

    graphdef = nnx.graphdef(jax.eval_shape(make_model, members.init_key[0]))
    compiler_options = {"xla_backend_optimization_level": 0}  # it runs once
    return graphdef, jax.jit(jax.vmap(initialise), compiler_options=compiler_options)(members)


def make_population_step(
    graphdef: nnx.GraphDef,
    optimizer: OptimizerConfig,
    loss: LossConfig,
    num_steps: int,
    mesh: jax.sharding.Mesh,
    *,
    in_turn: bool | None = None,
) -> PopulationStep:
    """One step of every member, to be jitted with a donated state.

    Args:
      graphdef: structure of a member's model.
      optimizer: what members do not have for themselves.
      loss: the same for the losses.
      num_steps: length of the schedule.
      mesh: devices along an axis `AXIS`, whose number divides P.
      in_turn: whether a device takes its members one after the other; None for what suits its kind.

    Returns:
      A function of state, members, `tokens [P, B, S+1]` int32 and `mask [P, B, S+1]` bool that gives the next state and
      the metrics of `make_train_step`, with a leading `[P]`.
    """

    def step_of(state: TrainState, member: Members, tokens: Array, mask: Array) -> tuple[TrainState, dict[str, Array]]:
        step = make_train_step(
            graphdef,
            make_optimizer(_with(optimizer, member, "optimizer"), num_steps),
            _with(loss, member, "loss"),
            member.noise_key,
        )
        return step(state, tokens, mask, None, None)

    def one_by_one(*arguments: Any) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.map(lambda one: step_of(*one), arguments)

    if in_turn is None:
        in_turn = mesh.devices.flat[0].platform == "cpu"
    steps = one_by_one if in_turn else jax.vmap(step_of)
    spec = jax.sharding.PartitionSpec(AXIS)
    return jax.shard_map(steps, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def population_mesh(num_members: int) -> jax.sharding.Mesh:
    """This process's devices, no more than there are members."""
    return jax.sharding.Mesh(np.array(jax.local_devices()[:num_members]), (AXIS,))


def use_all_cores() -> None:
    """Makes every CPU core a device, if nothing has asked for devices yet and XLA_FLAGS does not say how many."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def shard_population(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts each member's part of a tree of arrays on the device that trains it."""
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS)))


def member_of(tree: Any, index: int) -> Any:
    """One member's part of a tree with a leading `[P]`."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _with(config: _T, member: Members, section: str) -> _T:
    """A configuration with a member's own numbers; they were checked where they were numbers still."""
    changed = copy.copy(config)
    for name, value in member.settings[section].items():
        object.__setattr__(changed, name, value)
    return changed
