"""A stack of E experts of one kind: it owns their parameters and runs them on a routing plan."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.experts import ExpertKind, get_expert_kind
from moe_jax.types import Array, DispatchFn, Expert, RoutingPlan

Setting = bool | int | float | str | tuple[float, ...]


class ExpertStack(nnx.Module):
    """Parameters of E experts, each an attribute with leading `[E]` under the name that the kind gives it."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        kind: str = "swiglu",
        settings: Mapping[str, Setting] | None = None,
        hidden_sizes: Sequence[int] = (),
        output_scale: float = 1.0,
        key: Array,
    ):
        """Draws the parameters.

        Args:
          num_experts: E.
          width: D.
          hidden: F of one expert.
          kind: a name in `experts.EXPERTS`.
          settings: settings of the kind.
          hidden_sizes: F_e of each expert, at most F, for experts of different sizes; empty means F for all. What
            expert e computes from its hidden units past F_e is multiplied by zero, so it equals a smaller expert in
            values and gradients; memory and time are those of F.
          output_scale: factor on what writes the output, for depth-scaled initialisation.
          key: consumed.

        Raises:
          ValueError: an unknown kind or setting, sizes that do not fit, a kind that changes the rows' width.
        """
        self.kind, self.settings = kind, tuple(sorted((settings or {}).items()))
        self.hidden_sizes = tuple(hidden_sizes)
        made = get_expert_kind(kind, **dict(self.settings))
        params = made.draw(key, num_experts, width, hidden, output_scale)
        _check_shapes(kind, made, params, num_experts, width)
        if self.hidden_sizes:
            _check_sizes(kind, params, self.hidden_sizes, num_experts, hidden)
            fan_in = jnp.array(self.hidden_sizes).reshape(-1, *(1,) * (params["w_out"].ndim - 1))
            params["w_out"] *= (hidden / fan_in) ** 0.5
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    @property
    def expert(self) -> Expert:
        """The network of one expert."""
        return get_expert_kind(self.kind, **dict(self.settings)).expert

    @property
    def num_experts(self) -> int:
        """E."""
        return next(iter(self._variables().values())).shape[0]

    def parameters(self, dtype: jnp.dtype) -> dict[str, Array]:
        """The stacked parameters cast for computing; what a dispatch backend takes."""
        params = {name: variable[...].astype(dtype) for name, variable in self._variables().items()}
        if self.hidden_sizes:
            # A hidden unit that nothing reads gives nothing and gets no gradient.
            w_out = params["w_out"]  # [E, ..., F, D]
            is_read = jnp.arange(w_out.shape[-2])[None, :] < jnp.array(self.hidden_sizes)[:, None]
            middle = (1,) * (w_out.ndim - 3)
            params["w_out"] = w_out * is_read.reshape(w_out.shape[0], *middle, w_out.shape[-2], 1)
        return params

    def mix(self, x: Array, plan: RoutingPlan, dispatch: DispatchFn, token_mask: Array | None = None) -> Array:
        """Runs each token through the experts of its plan.

        Args:
          x: `[B, S, D]`.
          plan: of the `T = B*S` tokens.
          dispatch: the backend.
          token_mask: without effect here: the plan of a masked token is empty.

        Returns:
          `[B, S, D]`.
        """
        del token_mask
        tokens = x.reshape(-1, x.shape[-1])
        return dispatch(tokens, plan, self.expert, self.parameters(x.dtype)).reshape(x.shape)

    def _variables(self) -> dict[str, nnx.Param]:
        return {name: value for name, value in vars(self).items() if isinstance(value, nnx.Param)}


def _check_shapes(name: str, kind: ExpertKind, params: dict[str, Array], num_experts: int, width: int) -> None:
    """Refuses a kind of one's own that stacks wrongly or changes the width."""
    shapes = {leaf: value.shape for leaf, value in params.items()}
    if not shapes or any(shape[:1] != (num_experts,) for shape in shapes.values()):
        raise ValueError(f"expert kind {name!r} must draw arrays with leading [E={num_experts}], got {shapes}")
    one = {leaf: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for leaf, value in params.items()}
    rows = jax.ShapeDtypeStruct((2, width), jnp.float32)
    output = jax.eval_shape(lambda p, x: kind.expert.outer(p, kind.expert.inner(p, x)), one, rows)
    if output.shape != rows.shape:
        raise ValueError(f"expert kind {name!r} must map rows {rows.shape} to the same shape, got {output.shape}")


def _check_sizes(
    name: str, params: dict[str, Array], hidden_sizes: tuple[int, ...], num_experts: int, hidden: int
) -> None:
    """Refuses sizes that are not one width of each expert, and kinds without a `w_out` that reads the hidden units."""
    if len(hidden_sizes) != num_experts or not all(1 <= size <= hidden for size in hidden_sizes):
        raise ValueError(
            f"hidden_sizes={hidden_sizes} must be one width in [1, {hidden}] for each of {num_experts} experts"
        )
    if "w_out" not in params or params["w_out"].shape[-2] != hidden:
        raise ValueError(f"hidden_sizes needs an expert kind with w_out [E, ..., F={hidden}, D]; {name!r} has none")
