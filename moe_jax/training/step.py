"""One optimizer step as a pure function of state and batch.

Gradient accumulation is exact, router losses included. They are functions of sums over the whole batch, and couple
micro-batches through them. A forward pass over all micro-batches finds the sums first, and the slope of the losses at
these sums; with the slope fixed, each micro-batch adds its own sums times the slope, and the gradients add up to that
of the whole batch. (Averaging the balance losses of micro-batches, as is common, optimises a different and stricter
loss; see 2501.11873.) One micro-batch needs no extra pass.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.losses import cross_entropy, load_balancing_loss, load_fractions, router_z_loss
from moe_jax.nn.moe import Balance
from moe_jax.routing import get_balancer
from moe_jax.types import Array, ArrayTree, RouterStats, Topology


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross-entropy.

    Attributes:
      balance: weight of the load-balancing loss, averaged over layers.
      z: weight of the router z-loss, averaged over layers.
      balancer: what moves the selection bias after each optimizer step, a name in `routing.BALANCERS`.
      balancer_rate: its step size.
      micro_batches: parts a batch is cut into; the result does not depend on it, memory does.
    """

    balance: float = 0.01
    z: float = 1e-3
    balancer: str = "none"
    balancer_rate: float = 1e-3
    micro_batches: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. A checkpoint is this tree and nothing else."""

    params: nnx.State
    balance: nnx.State
    opt_state: optax.OptState
    step: Array


TrainStep = Callable[[TrainState, Array, Array, Topology | None], tuple[TrainState, dict[str, Array]]]


def init_state(
    make_model: Callable[[Array], nnx.Module], key: Array, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """Initialises model and optimizer in one program, compiled without optimisation since it runs once.

    Args:
      make_model: builds the model from a key.
      key: consumed.
      optimizer: acts on the parameters only.

    Returns:
      The model's structure and the state at step 0.
    """

    @jax.jit(compiler_options={"xla_backend_optimization_level": 0})
    def initialise(key: Array) -> TrainState:
        model = make_model(key)
        params = nnx.state(model, nnx.Param)
        return TrainState(params, nnx.state(model, Balance), optimizer.init(params), jnp.zeros((), jnp.int32))

    return nnx.graphdef(jax.eval_shape(make_model, key)), initialise(key)


def merge_model(graphdef: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model that a training state stands for."""
    return nnx.merge(graphdef, state.params, state.balance)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: LossConfig, key: Array | None = None
) -> TrainStep:
    """The step as a pure function, to be jitted with a donated state.

    Args:
      graphdef: structure of a model called as `model(tokens, token_mask, topology, key=key) -> (logits, RouterOutput)`;
        if it routes, with `update_balance` and `router_penalty` as in `models.decoder.Decoder`.
      optimizer: acts on the parameters only.
      config: loss weights and micro-batches.
      key: what routers draw from, a fresh one for each step; None trains without their noise.

    Returns:
      A function of the state, `tokens [B, S+1]` int32, `mask [B, S+1]` bool and the topology to train under (`keep
      [L, 1, E]`; None for everything open). Metrics: scalars `loss`,
      `cross_entropy` (nats per token), `grad_norm`, and per MoE layer `balance_loss [L]`, `z_loss [L]`, `load [L, E]`
      (assignment shares) and `dropped [L]` (share of the choices lost to full experts).

    Raises:
      ValueError: an unknown balancer.
    """
    balancer = get_balancer(config.balancer, config.balancer_rate)

    def train_step(
        state: TrainState, tokens: Array, mask: Array, topology: Topology | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        def forward(
            params: nnx.State, tokens: Array, mask: Array, key: Array | None
        ) -> tuple[Array, RouterStats | None]:
            model = nnx.merge(graphdef, params, state.balance)
            logits, routed = model(tokens[:, :-1], mask[:, :-1], topology, key=key)
            return jnp.sum(cross_entropy(logits, tokens[:, 1:]) * _is_target(mask)), routed.stats

        def router_loss(stats: RouterStats | None) -> Array:
            if stats is None:  # a model without MoE layers has nothing to balance
                return jnp.float32(0)
            loss = config.balance * load_balancing_loss(stats) + config.z * router_z_loss(stats)
            return jnp.mean(loss + nnx.merge(graphdef, state.params, state.balance).router_penalty(stats))

        targets = jnp.maximum(_is_target(mask).sum(dtype=jnp.float32), 1.0)
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        if config.micro_batches == 1:

            def objective(params: nnx.State) -> tuple[Array, tuple[Array, RouterStats | None]]:
                nll, stats = forward(params, tokens, mask, step_key)
                return nll / targets + router_loss(stats), (nll, stats)

            grads, (nll, stats) = jax.grad(objective, has_aux=True)(state.params)
        else:
            keys = None if step_key is None else jax.random.split(step_key, config.micro_batches)
            parts = (*(_micro_batches(x, config.micro_batches) for x in (tokens, mask)), keys)
            slope = jax.grad(router_loss)(_sum_over(lambda *part: forward(state.params, *part)[1], parts))

            def share(params: nnx.State, *part: Array) -> tuple[Array, tuple[Array, RouterStats | None]]:
                nll, stats = forward(params, *part)
                return nll / targets + optax.tree.vdot(slope, stats), (nll, stats)

            grads, (nll, stats) = _sum_over(lambda *part: jax.grad(share, has_aux=True)(state.params, *part), parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": nll / targets + router_loss(stats),
            "cross_entropy": nll / targets,
            "grad_norm": optax.tree.norm(grads),
        }
        balance = state.balance
        if stats is not None:
            metrics |= {
                "balance_loss": load_balancing_loss(stats),
                "z_loss": router_z_loss(stats),
                "load": load_fractions(stats),
                "dropped": stats.dropped_capacity / jnp.maximum(stats.chosen.sum(-1), 1.0),
            }
            model = nnx.merge(graphdef, state.params, state.balance)
            model.update_balance(stats, balancer)
            balance = nnx.state(model, Balance)
        return TrainState(optax.apply_updates(state.params, updates), balance, opt_state, state.step + 1), metrics

    return train_step


def _is_target(mask: Array) -> Array:
    """`[B, S+1]` token mask to `[B, S]`: a prediction counts if both its input and its target are real."""
    return mask[:, :-1] & mask[:, 1:]


def _micro_batches(x: Array, parts: int) -> Array:
    """`(A*B, ...) -> (A, B, ...)`."""
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} sequences cannot be cut into micro_batches={parts} equal parts")
    return x.reshape(parts, -1, *x.shape[1:])


def _sum_over(function: Callable[..., ArrayTree], parts: tuple[Array | None, ...]) -> ArrayTree:
    """Sum of `function(*part)` over the leading axis of `parts`, holding one result and one running sum."""
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *jax.tree.map(lambda p: p[0], parts))
    )
    total, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, function(*part)), None), zeros, parts)
    return total
