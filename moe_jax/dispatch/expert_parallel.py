"""Expert parallelism: experts live on different devices, and tokens travel to them and back by two all-to-alls.

The scheme is GShard's (arXiv 2006.16668), with rows by index in place of one-hot tensors. The mesh has a data axis and
an expert axis. Tokens are split over both; the parameters of the E experts are split over the expert axis and
replicated over the data axis, so an exchange stays within the devices that share a place on the data axis:

    tokens [T, D] --pack--> [N*R, D] --all-to-all--> [N*R, D] --a local backend--> [N*R, D] --all-to-all--> sum [T, D]

Here T is one device's share of the tokens, N the size of the expert axis ("shards", with E / N experts each) and R the
rows that a device may send to one shard. Shapes are static, which `all_to_all` needs, so unused rows travel too.

A token travels once to each shard that holds experts of its choice. The local backend weighs and sums there in
float32; what comes back is the shard's part of the token's output. So the received rows are a `RoutingPlan` that any
backend can run, and R never needs more than T, whatever K is: evenly chosen, K = 8 of 64 experts on 4 shards make 3.6
rows a token in place of 8.

Rows move by gathers in both passes (`dispatch.rows`), so that moving them is deterministic.

With a tensor axis the hidden units of each expert are split over it too: devices that differ only there send and
receive the same rows, each computes the part of the outputs that its hidden units give, and the parts are added where
the tokens live. What travels has names, `RECEIVED` and `RETURNED`, so that a rematerialisation policy can keep it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.rows import combine_rows, take_token_rows
from moe_jax.ops.capacity import drop_over_capacity, expert_capacity
from moe_jax.ops.expert_order import rank_in_expert
from moe_jax.types import Array, ArrayTree, DispatchFn, Expert, RoutingPlan

RECEIVED, RETURNED = "dispatch_received", "dispatch_returned"


class ExchangeCounts(NamedTuple):
    """What became of the assignments and rows of an exchange; `[data, expert]` int32, one entry per device.

    Sum a field for the total; assignments that reach an expert are `assigned - dropped_send - dropped_capacity`.

    Attributes:
      assigned: filled slots of the plan, counted on the device that holds the token.
      dropped_send: assignments lost because the token's device had no row left for the expert's shard, counted there.
      dropped_capacity: assignments lost because the expert was full, counted on the expert's device.
      rows: of the N * R rows that a device sends, itself among the receivers, those that carry a token.
      padding: the empty rest.
    """

    assigned: Array
    dropped_send: Array
    dropped_capacity: Array
    rows: Array
    padding: Array


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """A dispatch backend (`types.DispatchFn`) over a mesh; hashable, so it may be a static argument of `jit`.

    Without factors nothing is dropped, and output and gradients are those of one device up to the order of additions.
    Both limits serve first choices before second ones and earlier tokens before later ones, as `ops.capacity`
    does; the first among the T tokens of a device, the second among the N * T of one place on the data axis. So with
    them the result depends on the mesh.

    Attributes:
      mesh: devices with at least the two axes; the work is repeated along any other axis.
      data_axis: name of the axis that splits tokens only.
      expert_axis: name of the axis that splits tokens and experts.
      backend: runs the experts of one device on the rows it received.
      send_factor: R is `ceil(send_factor * T * K / N)`, at most T: 1.0 fits balanced shards even if no token chooses
        two experts of one shard. None means T, which never drops and moves as much as gathering all tokens would.
      capacity_factor: an expert takes `ceil(capacity_factor * N * T * K / E)` rows, at most N * T; 1.0 fits balanced
        experts. None means N * T, which never drops.
      tensor_axis: name of the axis that splits each expert's hidden units; None for no such axis.

    Raises:
      ValueError: an axis that the mesh lacks, the same axis twice, axes of another type than Auto, a factor that is
        not positive.
    """

    mesh: Mesh
    data_axis: str = "data"
    expert_axis: str = "expert"
    backend: DispatchFn = dispatch_blocked
    send_factor: float | None = None
    capacity_factor: float | None = None
    tensor_axis: str | None = None

    def __post_init__(self) -> None:
        """Checks what does not depend on the arguments of a call."""
        axes = (self.data_axis, self.expert_axis, *([] if self.tensor_axis is None else [self.tensor_axis]))
        for axis in axes:
            if axis not in self.mesh.shape:
                raise ValueError(
                    f"the mesh has no axis {axis!r}; its axes: {', '.join(map(str, self.mesh.axis_names))}"
                )
        if self.data_axis == self.expert_axis:
            raise ValueError(
                f"data and expert axis must differ, both are {self.data_axis!r}; use a data axis of size 1"
            )
        if self.tensor_axis in (self.data_axis, self.expert_axis):
            raise ValueError(f"tensor_axis={self.tensor_axis!r} is another axis already; use None for no tensor axis")
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise ValueError(
                f"the mesh's axes must be of type Auto, got {self.mesh.axis_types}; "
                "pass axis_types to jax.make_mesh, whose default is Explicit, or use jax.sharding.Mesh"
            )
        for name in ("send_factor", "capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 0:
                raise ValueError(f"{name} must be positive, got {factor}; use None to drop nothing")

    def __call__(self, tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree) -> Array:
        """The output of `dispatch_and_count` alone."""
        return self.dispatch_and_count(tokens, plan, expert, params)[0]

    def dispatch_and_count(
        self, tokens: Array, plan: RoutingPlan, expert: Expert, params: ArrayTree
    ) -> tuple[Array, ExchangeCounts]:
        """Runs each token through the experts its plan names, wherever they are.

        Arrays may be placed in any way that `jit` accepts; they are moved to where the exchange needs them.

        Args:
          tokens: `[T, D]` of all devices.
          plan: the routing plan of the `T` tokens.
          expert: the expert network; its functions must not close over traced arrays.
          params: its parameters, leaves with leading `[E]`.

        Returns:
          `[T, D]` in the dtype of `tokens`, split over both axes, and the counts.

        Raises:
          ValueError: T does not divide over both axes, or E over the expert axis, or the expert is split over the
            tensor axis and is not a sum over hidden units.
        """
        num_data, num_shards = self.mesh.shape[self.data_axis], self.mesh.shape[self.expert_axis]
        if tokens.shape[0] % (num_data * num_shards):
            raise ValueError(
                f"{tokens.shape[0]} tokens do not divide over {num_data} x {num_shards} devices; "
                f"append tokens whose slots are all empty (expert id {plan.num_experts})"
            )
        if plan.num_experts % num_shards:
            raise ValueError(
                f"{plan.num_experts} experts do not divide over {num_shards} devices of axis {self.expert_axis!r}; "
                "use a smaller expert axis or append experts that no plan names"
            )
        by_token, by_expert = P((self.data_axis, self.expert_axis)), P(self.expert_axis)
        if self.tensor_axis is not None:
            if expert.split is None:
                raise ValueError(
                    "this expert is not a sum over hidden units (Expert.split), so it cannot be split over axis "
                    f"{self.tensor_axis!r}; use tensor_axis=None"
                )
            params = expert.split(params, self.mesh.shape[self.tensor_axis])
            by_expert = P(self.expert_axis, self.tensor_axis)
        # The check of varying axes wants every loop carry of the local backend, zeros included, to be declared as
        # varying, and so would tie the backends to meshes. Without it the transpose still sums the gradient of
        # parameters over the data axis (in their dtype), since their spec does not name that axis.
        exchange = jax.shard_map(
            functools.partial(self._on_one_device, expert),
            mesh=self.mesh,
            in_specs=(by_token, by_token, by_expert),
            out_specs=(by_token, P(self.data_axis, self.expert_axis)),
            check_vma=False,
        )
        return exchange(tokens, plan, params)

    def _on_one_device(
        self, expert: Expert, tokens: Array, plan: RoutingPlan, params: ArrayTree
    ) -> tuple[Array, ExchangeCounts]:
        """Packs, sends, runs the local experts on what arrives, sends back, sums."""
        num_shards = self.mesh.shape[self.expert_axis]
        num_local = plan.num_experts // num_shards
        all_to_all = functools.partial(
            jax.lax.all_to_all, axis_name=self.expert_axis, split_axis=0, concat_axis=0, tiled=True
        )
        num_tokens, num_choices = plan.expert_ids.shape
        room = _rows_for(num_tokens, num_choices, num_shards, self.send_factor)
        assignments, slots = _rows_by_shard(plan.expert_ids // num_local, num_shards, room)
        sent = _pack(tokens, plan, num_shards, assignments, slots)
        received = checkpoint_name(all_to_all(sent), RECEIVED)
        if self.tensor_axis is not None:
            params = jax.tree.map(lambda leaf: leaf.squeeze(1), params)  # the one part of this device

        capacity = _rows_for(num_shards * num_tokens, num_choices, plan.num_experts, self.capacity_factor)
        local_plan = _local_plan(received, num_local, capacity, plan.capacity)
        parts = checkpoint_name(all_to_all(self.backend(received.tokens, local_plan, expert, params)), RETURNED)
        output = combine_rows(parts, jnp.ones(slots.shape, jnp.float32), assignments, slots)
        if self.tensor_axis is not None:
            output = jax.lax.psum(output, self.tensor_axis)

        assigned, num_rows = _count(plan.expert_ids < plan.num_experts), _count(assignments < slots.size)
        counts = ExchangeCounts(
            assigned=assigned,
            dropped_send=assigned - _count(sent.ids < num_local),
            dropped_capacity=_count(received.ids < num_local) - _count(local_plan.expert_ids < num_local),
            rows=num_rows,
            padding=assignments.size - num_rows,
        )
        return output.astype(tokens.dtype), counts


class _Rows(NamedTuple):
    """Rows on their way: tokens `[N*R, D]`, ids among the receiver's experts and all gates, both `[N*R, K]`."""

    tokens: Array
    ids: Array
    gates: Array


def _rows_for(num_tokens: int, num_choices: int, num_bins: int, factor: float | None) -> int:
    """Rows per shard or expert: all tokens without a factor, since a token takes one row of a bin."""
    return num_tokens if factor is None else expert_capacity(num_tokens, num_bins, num_choices, factor)


def _first_come(ids: Array, num_bins: int, room: int) -> Array:
    """Empties the slots of `ids [T, K]` beyond the first `room` of each bin; nothing to do if T fit."""
    return ids if room >= ids.shape[0] else drop_over_capacity(ids, num_bins, room)


def _rows_by_shard(shards: Array, num_shards: int, room: int) -> tuple[Array, Array]:
    """Gives each token a row for every shard it visits, in token order.

    Args:
      shards: `[T, K]` int32 shard of each assignment; N marks an empty slot.
      num_shards: N.
      room: R, rows per shard.

    Returns:
      `assignments [N*R]` and `slots [T, K]` as in `dispatch.rows`. A row belongs to the token's first assignment to
      the shard; the others have no row of their own.
    """
    num_choices, num_rows = shards.shape[1], num_shards * room
    is_earlier = jnp.tri(num_choices, k=-1, dtype=bool)
    is_repeat = jnp.any((shards[:, :, None] == shards[:, None, :]) & is_earlier[None], axis=2)
    visits = _first_come(jnp.where(is_repeat, num_shards, shards), num_shards, room).reshape(-1)
    ranks, _ = rank_in_expert(visits, num_shards)
    slots = jnp.where(visits < num_shards, visits * room + ranks, num_rows)
    numbers = jnp.arange(slots.size, dtype=jnp.int32)
    assignments = jnp.full(num_rows, slots.size, jnp.int32).at[slots].set(numbers, mode="drop")
    return assignments, slots.reshape(shards.shape)


def _pack(tokens: Array, plan: RoutingPlan, num_shards: int, assignments: Array, slots: Array) -> _Rows:
    """Copies tokens, gates and ids to the rows; slots that do not concern the receiver become empty."""
    num_local, num_choices = plan.num_experts // num_shards, slots.shape[1]
    ids = plan.expert_ids.at[assignments // num_choices].get(mode="fill", fill_value=plan.num_experts)
    receivers = jnp.repeat(jnp.arange(num_shards, dtype=jnp.int32), assignments.size // num_shards)
    is_there = ids // num_local == receivers[:, None]
    return _Rows(
        tokens=take_token_rows(tokens, assignments, slots),
        ids=jnp.where(is_there, ids % num_local, num_local),
        gates=take_token_rows(plan.gates, assignments, slots),
    )


def _local_plan(received: _Rows, num_local: int, capacity: int, promised: int | None) -> RoutingPlan:
    """The plan of the received rows, which stand in token order, after drops over capacity."""
    capacity = min(capacity, received.ids.shape[0])
    ids = _first_come(received.ids, num_local, capacity)
    gates = jnp.where(ids < num_local, received.gates, 0)
    return RoutingPlan(ids, gates, num_local, capacity if promised is None else min(capacity, promised))


def _count(is_counted: Array) -> Array:
    """How many are true, as the `[1, 1]` that one device adds to a `[data, expert]` array."""
    return jnp.sum(is_counted, dtype=jnp.int32).reshape(1, 1)
