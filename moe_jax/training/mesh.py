"""Three parallel axes over devices, and where each array of a training state lies on them.

    data    splits the batch; parameters and optimizer state are split over it too (FSDP, ZeRO-3 of 1910.02054)
    expert  splits the batch and the experts, between which tokens travel (`dispatch.expert_parallel`)
    tensor  splits attention heads, hidden units and the vocabulary (Megatron, 1909.08053); the batch is repeated

The step stays one pure function: arrays are placed, XLA divides the work, and only the dispatch of tokens to experts
says for itself what each device does (`models.execution`). Sums over devices are sums over the global batch, so every
loss is that of one device up to the order of additions.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from types import EllipsisType

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.models.config import DecoderConfig
from moe_jax.nn.experts import get_expert_kind
from moe_jax.runs import ConfigError
from moe_jax.types import ArrayTree

AXES = ("data", "expert", "tensor")
SMALL = 2**16  # entries below which an array that `PLACES` does not name is repeated on every device

# What splits each axis of a parameter, by the end of its path; the first axis is that of the stacked layers. "rest" is
# what of data and expert the other axes leave, and an axis that does not divide is not split.
PLACES: tuple[tuple[str, tuple[str | EllipsisType | None, ...]], ...] = (
    (r"experts/w_in", (None, "expert", ..., "rest", "tensor")),
    (r"experts/w_out", (None, "expert", ..., "tensor", "rest")),
    (r"experts/b_in", (None, "expert", ..., "tensor")),
    (r"experts/b_out", (None, "expert", ..., None)),
    (r"attention/(qkv|query|up)", (None, "rest", "tensor", None)),
    (r"attention/out", (None, "tensor", None, "rest")),
    (r"(attention/down|attention/query_down|latent/down)", (None, "rest", None)),
    (r"latent/up", (None, None, "rest")),
    (r"embedding", (None, "tensor", "rest")),
    (r"read_out", ("rest", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has.

    Attributes:
      data: parts of the batch, and of parameters and optimizer state; -1, on one of the axes, for all devices that the
        others leave.
      expert: parts of the batch, and of the experts.
      tensor: parts of attention heads, hidden units and vocabulary.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuses sizes that are neither positive nor a single -1."""
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"{self._told} must be positive, but for one -1 that takes the devices left over")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the axes in the order of `AXES`, with -1 as it was given."""
        return self.data, self.expert, self.tensor

    @property
    def _told(self) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))

    def fill(self, num_devices: int, *, must_use_all: bool) -> tuple[int, int, int]:
        """The sizes for a number of devices, without -1.

        Raises:
          ConfigError: the sizes do not fit.
        """
        known = math.prod(size for size in self.sizes if size != -1)
        if -1 in self.sizes and num_devices % known:
            raise ConfigError(
                f"config.mesh: {self._told} needs a multiple of {known} devices, there are {num_devices}; change the "
                "other axes to divisors of that"
            )
        data, expert, tensor = (num_devices // known if size == -1 else size for size in self.sizes)
        total = data * expert * tensor
        if total > num_devices or (must_use_all and total != num_devices):
            raise ConfigError(
                f"config.mesh: {self._told} takes {total} devices, there are {num_devices}; give one axis -1 to take "
                "what the others leave, or try it on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{total}"
            )
        return data, expert, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices along the axes data, expert and tensor, of type Auto.

    Args:
      config: the sizes.
      devices: what to arrange; None for all of all processes. A single process may leave some unused.

    Raises:
      ConfigError: sizes that the number of devices does not allow.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.fill(len(devices), must_use_all=jax.process_count() > 1)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(sizes)])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays with a leading axis of sequences lie: split over data and expert, repeated over tensor."""
    return NamedSharding(mesh, PartitionSpec(("data", "expert")))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["expert"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_batch(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Splits the rows of a global batch, which every process has, over the devices; each process places its own."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def state_shardings(abstract_state: ArrayTree, mesh: Mesh) -> ArrayTree:
    """Where each leaf of a training state lies, by `PLACES`.

    Optimizer moments have the path and shape of their parameters behind a prefix, and so lie with them. A leaf that no
    line fits is split along its largest axis that divides over data and expert, if it is large, and repeated if not.

    Args:
      abstract_state: tree of arrays or `jax.ShapeDtypeStruct`, such as `jax.eval_shape` gives for a `TrainState`.
      mesh: from `make_mesh`.

    Returns:
      A tree of the same structure with a `NamedSharding` for each leaf.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, _partition(name, leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def _partition(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The partition of one leaf."""
    for pattern, places in PLACES:
        if re.search(rf"(^|/){pattern}$", name) and len(shape) >= len(places) - places.count(...):
            return _divide(_fit(places, len(shape)), shape, sizes)
    if math.prod(shape) >= SMALL:
        for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
            divided = _divide(["rest" if other == axis else None for other in range(len(shape))], shape, sizes)
            if any(divided):
                return divided
    return PartitionSpec()


def _fit(places: Sequence[str | EllipsisType | None], rank: int) -> list[str | None]:
    """Replaces an ellipsis by as many unsplit axes as the rank asks for."""
    fitted: list[str | None] = []
    for place in places:
        if isinstance(place, EllipsisType):
            fitted += [None] * (rank - len(places) + 1)
        else:
            fitted.append(place)
    return fitted


def _divide(places: Sequence[str | None], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The mesh axes of each array axis, those left out that do not divide it."""
    parts: list[tuple[str, ...]] = []
    for place, length in zip(places, shape, strict=True):
        is_split = place in sizes and length % sizes[place] == 0
        parts.append((place,) if is_split and place is not None else ())
    used = {axis for part in parts for axis in part if sizes[axis] > 1}
    rest = tuple(axis for axis in ("data", "expert") if axis not in used)
    for axis, place in enumerate(places):
        if place == "rest":
            choices = [rest, *((one,) for one in rest)]
            parts[axis] = next((c for c in choices if shape[axis] % math.prod(sizes[a] for a in c) == 0), ())
    kept = [tuple(axis for axis in part if sizes[axis] > 1) for part in parts]
    return PartitionSpec(*(part or None for part in kept)) if any(kept) else PartitionSpec()


def check_mesh(mesh: Mesh, model: DecoderConfig, batch_size: int, micro_batches: int = 1) -> None:
    """Refuses what cannot be divided, before anything is compiled.

    Args:
      mesh: from `make_mesh`.
      model: the architecture.
      batch_size: sequences of a step, over all processes.
      micro_batches: parts the batch is cut into.

    Raises:
      ConfigError: naming the two numbers that disagree and what to change.
    """
    data, expert, tensor = (mesh.shape[axis] for axis in AXES)
    step = batch_parts(mesh) * micro_batches
    if batch_size % step:
        each = f" in each of loss.micro_batches={micro_batches}" if micro_batches > 1 else ""
        below, above = batch_size // step * step, -(-batch_size // step) * step
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide over mesh.data={data} x mesh.expert={expert} devices{each}; "
            f"take {f'{below} or ' if below else ''}{above}"
        )
    if "moe" in model.layers and model.num_experts % expert:
        fitting = [size for size in range(1, expert) if model.num_experts % size == 0]
        raise ConfigError(
            f"model.num_experts={model.num_experts} does not divide over mesh.expert={expert}; take a multiple of "
            f"{expert}, or mesh.expert={fitting[-1]} and more of mesh.data"
        )
    if tensor > 1:
        _check_tensor(model, tensor)


def _check_tensor(model: DecoderConfig, tensor: int) -> None:
    """Refuses what cannot be split over the tensor axis."""
    widths = {"num_heads": model.num_heads}
    if model.attention == "grouped_query":
        widths["num_kv_heads"] = model.num_kv_heads
    if "dense" in model.layers:
        widths["dense_hidden"] = model.dense_hidden
    if "moe" in model.layers:
        widths |= {"expert_hidden": model.expert_hidden, "shared_hidden": model.shared_hidden}
        kind = get_expert_kind(model.expert, **model.expert_settings)
        if not model.is_soft and kind.expert.split is None:
            raise ConfigError(
                f"model.expert={model.expert!r} is not a sum over hidden units, so its experts cannot be split over "
                f"mesh.tensor={tensor}; take mesh.tensor=1 and more of mesh.expert or mesh.data"
            )
    for name, width in widths.items():
        if width % tensor:
            raise ConfigError(
                f"model.{name}={width} does not divide over mesh.tensor={tensor}; take a multiple of {tensor}, or a "
                "smaller mesh.tensor and more of mesh.data"
            )
