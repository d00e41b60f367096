"""One optimizer step as a pure function of state and batch.

Gradient accumulation is exact, router losses included. They are functions of sums over the whole batch, and couple
micro-batches through them. A forward pass over all micro-batches finds the sums first, and the slope of the losses at
these sums; with the slope fixed, each micro-batch adds its own sums times the slope, and the gradients add up to that
of the whole batch. (Averaging the balance losses of micro-batches, as is common, optimises a different and stricter
loss; see 2501.11873.) One micro-batch needs no extra pass. Losses of sequences and tokens do not couple micro-batches
except by the number of tokens that their mean divides by; they are sums of another kind and treated alike.

Sums over devices come before the formulas too: under `jax.jit` with a sharded batch the step is that of one device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh

from moe_jax.analysis import max_violation
from moe_jax.losses import (
    cross_entropy,
    global_entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_fractions,
    load_loss,
    router_entropy_loss,
    router_z_loss,
    sum_over_groups,
)
from moe_jax.routing import get_balancer
from moe_jax.training.mesh import state_shardings
from moe_jax.types import Array, ArrayTree, RouterStats, Topology


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross-entropy: any of these at once, each by its weight, averaged over layers.

    Attributes:
      balance: weight of the load-balancing loss of the whole batch, over all micro-batches and devices.
      balance_sequence: weight of the load-balancing loss of each sequence, averaged over tokens; needs a model with
        `stats_level` "sequence" or "token".
      balance_token: weight of the load-balancing loss of each token; needs `stats_level` "token".
      importance: weight of the CV^2 of the experts' summed gates.
      load: weight of the CV^2 of the experts' estimated loads; without effect under rules that only count them.
      entropy: weight of the mean entropy of a token's probabilities: positive makes the router decided, negative keeps
        it undecided.
      global_entropy: weight of ln E less the entropy of the mean probabilities.
      z: weight of the router z-loss.
      balancer: what moves the selection bias after each optimizer step, a name in `routing.BALANCERS`.
      balancer_settings: its settings, such as `{"rate": 0.01}`.
      micro_batches: parts a batch is cut into; the result does not depend on it, memory does.
    """

    balance: float = 0.01
    balance_sequence: float = 0.0
    balance_token: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    entropy: float = 0.0
    global_entropy: float = 0.0
    z: float = 1e-3
    balancer: str = "none"
    balancer_settings: Mapping[str, int | float] = FrozenDict()
    micro_batches: int = 1


# weight in `LossConfig` -> loss of the sums over a batch
BATCH_LOSSES: dict[str, Callable[[RouterStats], Array]] = {
    "balance": load_balancing_loss,
    "importance": importance_loss,
    "load": load_loss,
    "entropy": router_entropy_loss,
    "global_entropy": global_entropy_loss,
    "z": router_z_loss,
}


class RouterSums(NamedTuple):
    """What the router losses of a batch are made of; all of it adds over micro-batches.

    Attributes:
      stats: sums over tokens, with a leading `[L]`.
      of_groups: tokens times loss, summed over sequences or tokens, `[L]`, by the weight's name.
    """

    stats: RouterStats
    of_groups: dict[str, Array]


UNTRAINED = nnx.Not(nnx.Param)  # balance state, and facts of the architecture that are arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. A checkpoint is this tree and nothing else.

    `spikes` is what `training.spikes` remembers, if it watches.
    """

    params: nnx.State
    balance: nnx.State
    opt_state: optax.OptState
    step: Array
    spikes: ArrayTree | None = None


TrainStep = Callable[[TrainState, Array, Array, Topology | None, Array | None], tuple[TrainState, dict[str, Array]]]


def init_state(
    make_model: Callable[[Array], nnx.Module],
    key: Array,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Initialises model and optimizer in one program, compiled without optimisation since it runs once.

    On a mesh every array is created in its parts: no device ever holds the whole of one that is split.

    Args:
      make_model: builds the model from a key.
      key: consumed.
      optimizer: acts on the parameters only.
      mesh: where the state lies, as in `training.mesh.state_shardings`; None for one device.

    Returns:
      The model's structure and the state at step 0.
    """

    def initialise(key: Array) -> TrainState:
        return state_of(make_model(key), optimizer)

    shardings = None if mesh is None else state_shardings(jax.eval_shape(initialise, key), mesh)
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(initialise, out_shardings=shardings, compiler_options=options)
    return nnx.graphdef(jax.eval_shape(make_model, key)), compiled(key)


def state_of(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0 of training a model that is there already, whose arrays it shares."""
    params = nnx.state(model, nnx.Param)
    return TrainState(params, nnx.state(model, UNTRAINED), optimizer.init(params), jnp.zeros((), jnp.int32))


def merge_model(graphdef: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model that a training state stands for."""
    return nnx.merge(graphdef, state.params, state.balance)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: LossConfig, key: Array | None = None
) -> TrainStep:
    """The step as a pure function, to be jitted with a donated state.

    Args:
      graphdef: structure of a model called as `model(tokens, token_mask, topology, key=key) -> (logits, RouterOutput)`,
        with `segments=segments` besides if batches have them; if it routes, with `update_balance` and `router_penalty`
        as in `models.decoder.Decoder`.
      optimizer: acts on the parameters only.
      config: loss weights and micro-batches.
      key: what routers draw from, a fresh one for each step; None trains without their noise.

    Returns:
      A function of the state, `tokens [B, S+1]` int32, `mask [B, S+1]` bool, the topology to train under (`keep
      [L, 1, E]`; None for everything open) and `segments [B, S+1]` int32, the texts that share a row (None where none
      do; no text predicts the next). Metrics: scalars `loss`,
      `cross_entropy` (nats per token), `grad_norm`, and per MoE layer `load [L, E]` (assignment shares),
      `max_violation [L]` (2408.15664: the busiest expert's load over the mean load, less 1), `dropped [L]` (share of
      the choices lost to full experts) and each router loss without its weight, `balance_loss [L]`, `z_loss [L]` and so
      on; those of sequences and tokens only if they have a weight.

    Raises:
      ValueError: an unknown balancer or setting; when first called, a weight or balancer for which the model's
        statistics are too coarse.
    """
    balancer = get_balancer(config.balancer, **config.balancer_settings)

    def train_step(
        state: TrainState,
        tokens: Array,
        mask: Array,
        topology: Topology | None = None,
        segments: Array | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        def forward(
            params: nnx.State, tokens: Array, mask: Array, segments: Array | None, key: Array | None
        ) -> tuple[Array, RouterSums | None]:
            model = nnx.merge(graphdef, params, state.balance)
            packed = {} if segments is None else {"segments": segments[:, :-1]}
            logits, routed = model(tokens[:, :-1], mask[:, :-1], topology, key=key, **packed)
            nll = jnp.sum(cross_entropy(logits, tokens[:, 1:]) * _is_target(mask, segments))
            if routed.stats is None:
                return nll, None
            num_sequences, length, _ = logits.shape
            return nll, _router_sums(routed.stats, num_sequences, length, config)

        def router_loss(sums: RouterSums | None) -> Array:
            if sums is None:  # a model without MoE layers has nothing to balance
                return jnp.float32(0)
            losses = _router_losses(sums)
            loss = sum(getattr(config, name) * losses[name] for name in losses if _acts(getattr(config, name)))
            return jnp.mean(loss + nnx.merge(graphdef, state.params, state.balance).router_penalty(sums.stats))

        targets = jnp.maximum(_is_target(mask, segments).sum(dtype=jnp.float32), 1.0)
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        if config.micro_batches == 1:

            def objective(params: nnx.State) -> tuple[Array, tuple[Array, RouterSums | None]]:
                nll, sums = forward(params, tokens, mask, segments, step_key)
                return nll / targets + router_loss(sums), (nll, sums)

            grads, (nll, sums) = jax.grad(objective, has_aux=True)(state.params)
        else:
            keys = None if step_key is None else jax.random.split(step_key, config.micro_batches)
            rows = jax.tree.map(lambda x: _micro_batches(x, config.micro_batches), (tokens, mask, segments))
            parts = (*rows, keys)
            slope = jax.grad(router_loss)(_sum_over(lambda *part: forward(state.params, *part)[1], parts))

            def share(params: nnx.State, *part: Array) -> tuple[Array, tuple[Array, RouterSums | None]]:
                nll, sums = forward(params, *part)
                return nll / targets + optax.tree.vdot(slope, sums), (nll, sums)

            grads, (nll, sums) = _sum_over(lambda *part: jax.grad(share, has_aux=True)(state.params, *part), parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": nll / targets + router_loss(sums),
            "cross_entropy": nll / targets,
            "grad_norm": optax.tree.norm(grads),
        }
        balance = state.balance
        if sums is not None:
            stats = sums.stats
            metrics |= {f"{name}_loss": loss for name, loss in _router_losses(sums).items()}
            metrics |= {
                "load": load_fractions(stats),
                "max_violation": max_violation(stats.chosen),
                "dropped": stats.dropped_capacity / jnp.maximum(stats.chosen.sum(-1), 1.0),
            }
            model = nnx.merge(graphdef, state.params, state.balance)
            model.update_balance(stats, balancer)
            balance = nnx.state(model, UNTRAINED)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(
            state, params=params, balance=balance, opt_state=opt_state, step=state.step + 1
        ), metrics

    return train_step


def _router_sums(stats: RouterStats, num_sequences: int, length: int, config: LossConfig) -> RouterSums:
    """Sums over a batch of `num_sequences` times `length` tokens, and over its groups for the losses with a weight.

    Raises:
      ValueError: statistics too coarse for a weight.
    """
    if stats.num_tokens.ndim == 1:
        stats = jax.tree.map(lambda x: x[:, None], stats)  # (L, ...) -> (L, 1, ...): the batch is the only group
    num_layers, num_groups = stats.num_tokens.shape
    of_groups = {}
    for name, level, groups in (
        ("balance_sequence", "sequence", num_sequences),
        ("balance_token", "token", num_sequences * length),
    ):
        if not _acts(getattr(config, name)):
            continue
        if num_groups % groups:
            raise ValueError(
                f"loss.{name}={getattr(config, name)} needs statistics of each {level}, and the model sums over more; "
                f"build it with stats_level={level!r}"
            )
        # (L, N, ...) -> (L, groups, N / groups, ...)
        part = jax.tree.map(lambda x, n=groups: x.reshape(num_layers, n, -1, *x.shape[2:]).sum(2), stats)
        of_groups[name] = sum_over_groups(load_balancing_loss(part), part)
    return RouterSums(jax.tree.map(lambda x: x.sum(1), stats), of_groups)


def _router_losses(sums: RouterSums) -> dict[str, Array]:
    """Every router loss `[L]` without its weight, by the weight's name."""
    tokens = jnp.maximum(sums.stats.num_tokens, 1.0)
    losses = {name: loss(sums.stats) for name, loss in BATCH_LOSSES.items()}
    return losses | {name: total / tokens for name, total in sums.of_groups.items()}


def _acts(weight: float | Array) -> bool:
    """Whether a weight is not 0; one that is traced, as in a population, may be anything."""
    return isinstance(weight, jax.Array) or weight != 0


def _is_target(mask: Array, segments: Array | None) -> Array:
    """`[B, S+1]` token mask to `[B, S]`: a prediction counts if its input and its target are real and of one text."""
    is_target = mask[:, :-1] & mask[:, 1:]
    return is_target if segments is None else is_target & (segments[:, :-1] == segments[:, 1:])


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
