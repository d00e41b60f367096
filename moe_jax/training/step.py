"""One optimizer step as a pure function of state and batch.

Gradient accumulation is exact, balance loss included. The balance loss `E sum_e f_e P_e` couples micro-batches through
f, the assignment shares of the whole batch; f carries no gradient, so a forward pass over all micro-batches finds it
first, and with f fixed the loss is a plain sum over micro-batches. (Averaging the balance losses of micro-batches, as
is common, optimises a different and stricter loss; see 2501.11873.) One micro-batch needs no extra pass.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.losses import cross_entropy, load_balancing_loss, load_fractions, router_z_loss
from moe_jax.nn.router import Balance
from moe_jax.routing import update_bias
from moe_jax.types import Array, ArrayTree, RouterStats, Topology


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross-entropy.

    Attributes:
      balance: weight of the load-balancing loss, averaged over layers.
      z: weight of the router z-loss, averaged over layers.
      bias_rate: step of the aux-loss-free selection bias per optimizer step; 0 leaves it at zero.
      micro_batches: parts a batch is cut into; the result does not depend on it, memory does.
    """

    balance: float = 0.01
    z: float = 1e-3
    bias_rate: float = 0.0
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


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: LossConfig) -> TrainStep:
    """The step as a pure function, to be jitted with a donated state.

    Args:
      graphdef: structure of a model called as `model(tokens, token_mask) -> (logits, RouterOutput)`.
      optimizer: acts on the parameters only.
      config: loss weights and micro-batches.

    Returns:
      A function of the state, `tokens [B, S+1]` int32, `mask [B, S+1]` bool and the topology to train under (`keep
      [L, 1, E]`; None for everything open). Metrics: scalars `loss`,
      `cross_entropy` (nats per token), `grad_norm`, and per MoE layer `balance_loss [L]`, `z_loss [L]`, `load [L, E]`
      (assignment shares) and `dropped [L]` (share of the choices lost to full experts).
    """

    def forward(
        params: nnx.State, balance: nnx.State, tokens: Array, mask: Array, topology: Topology | None
    ) -> tuple[Array, RouterStats | None]:
        model = nnx.merge(graphdef, params, balance)
        logits, routed = model(tokens[:, :-1], mask[:, :-1], topology)
        return jnp.sum(cross_entropy(logits, tokens[:, 1:]) * _is_target(mask)), routed.stats

    def objective(
        params: nnx.State,
        balance: nnx.State,
        tokens: Array,
        mask: Array,
        topology: Topology | None,
        whole: RouterStats | None,
        targets: Array,
    ) -> tuple[Array, tuple[Array, RouterStats | None]]:
        nll, stats = forward(params, balance, tokens, mask, topology)
        loss = nll / targets
        if stats is not None:  # a model without MoE layers has nothing to balance
            share = stats if whole is None else dataclasses.replace(stats, num_tokens=whole.num_tokens)
            fractions = None if whole is None else load_fractions(whole)
            loss += config.balance * load_balancing_loss(share, fractions).mean()
            loss += config.z * router_z_loss(share).mean()
        return loss, (nll, stats)

    def train_step(
        state: TrainState, tokens: Array, mask: Array, topology: Topology | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        targets = jnp.maximum(_is_target(mask).sum(dtype=jnp.float32), 1.0)
        gradient = jax.value_and_grad(objective, has_aux=True)
        if config.micro_batches == 1:
            (loss, (nll, stats)), grads = gradient(state.params, state.balance, tokens, mask, topology, None, targets)
        else:
            parts = tuple(_micro_batches(x, config.micro_batches) for x in (tokens, mask))
            whole = _sum_over(lambda x, m: forward(state.params, state.balance, x, m, topology)[1], parts)
            (loss, (nll, stats)), grads = _sum_over(
                lambda x, m: gradient(state.params, state.balance, x, m, topology, whole, targets), parts
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        balance = state.balance
        metrics = {"loss": loss, "cross_entropy": nll / targets, "grad_norm": optax.tree.norm(grads)}
        if stats is not None:
            metrics |= {
                "balance_loss": load_balancing_loss(stats),
                "z_loss": router_z_loss(stats),
                "load": load_fractions(stats),
                "dropped": stats.dropped_capacity / jnp.maximum(stats.chosen.sum(-1), 1.0),
            }
            if config.bias_rate:
                balance = update_balance(balance, stats, config.bias_rate)
        return TrainState(optax.apply_updates(state.params, updates), balance, opt_state, state.step + 1), metrics

    return train_step


def update_balance(balance: nnx.State, stats: RouterStats, rate: float) -> nnx.State:
    """Moves every layer's selection bias by `routing.update_bias`.

    Args:
      balance: the model's Balance state, leaves `[L_i, E]` in layer order.
      stats: of the whole optimizer step, with a leading `[L]`, L the sum of the L_i.
      rate: see `routing.update_bias`.
    """
    leaves, structure = jax.tree.flatten(balance)
    moved, start = [], 0
    for bias in leaves:
        stop = start + bias.shape[0]
        moved.append(update_bias(bias, jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], stats), rate))
        start = stop
    return jax.tree.unflatten(structure, moved)


def _is_target(mask: Array) -> Array:
    """`[B, S+1]` token mask to `[B, S]`: a prediction counts if both its input and its target are real."""
    return mask[:, :-1] & mask[:, 1:]


def _micro_batches(x: Array, parts: int) -> Array:
    """`(A*B, ...) -> (A, B, ...)`."""
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} sequences cannot be cut into micro_batches={parts} equal parts")
    return x.reshape(parts, -1, *x.shape[1:])


def _sum_over(function: Callable[[Array, Array], ArrayTree], parts: tuple[Array, ...]) -> ArrayTree:
    """Sum of `function(*part)` over the leading axis of `parts`, holding one result and one running sum."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *(p[0] for p in parts)))
    total, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, function(*part)), None), zeros, parts)
    return total
