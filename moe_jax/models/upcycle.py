"""Sparse upcycling: a mixture of experts that starts from the weights of dense models.

Each feed-forward network becomes E experts and a new router; everything else stays. With f the dense network:

    copy            f_e = f; gates that sum to 1 give y = f(x)                             Komatsuzaki et al. 2212.05055
    noise           every matrix of f_e gets N(0, (noise * std(W))^2) besides
    virtual groups  f's hidden units are cut into G shards, f = sum_s f_s. Expert (c, s) is G f_s, and the G shards of a
                    copy c have one router column, so that the K = G T best columns are T whole copies and
                    y = sum_c sum_s (g_c / G) G f_s(x) = f(x)                              He et al. 2410.07524
    drop            a share of each expert's hidden units is drawn anew from N(mean(W), var(W))     2502.19261
    parents         expert or copy n comes from parent n modulo their number, the rest is the parents' mean; with
                    parents that agree, y = f(x)                                           BTX, 2403.07816

`copy` and virtual groups preserve the function, and so do several equal parents; `receipt` measures it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.structure import fill_model, named_arrays, untrained_arrays
from moe_jax.types import Array

_EXPERTS = "feed_forward/experts/"


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture of experts.

    Attributes:
      num_experts: E, a multiple of `granularity`.
      num_choices: K, a multiple of `granularity`.
      granularity: G, shards of the dense network; above 1, virtual groups.
      layers: positions of the layers that change; empty for all.
      noise: standard deviation of the noise on experts, relative to that of each matrix.
      drop: share of the hidden units of each expert that are drawn anew.
      router_scale: standard deviation of the router's columns.
      rule: a name in `routing.RULES`. The function is preserved by rules whose gates sum to 1.
    """

    num_experts: int = 8
    num_choices: int = 2
    granularity: int = 1
    layers: tuple[int, ...] = ()
    noise: float = 0.0
    drop: float = 0.0
    router_scale: float = 0.02
    rule: str = "softmax_top_k_renormalized"

    def __post_init__(self) -> None:
        """Refuses numbers that do not fit each other."""
        if self.granularity < 1 or self.num_experts % self.granularity or self.num_choices % self.granularity:
            raise ValueError(
                f"num_experts={self.num_experts} and num_choices={self.num_choices} must be multiples of "
                f"granularity={self.granularity}, which is at least 1"
            )
        if self.noise < 0 or not 0 <= self.drop <= 1:
            raise ValueError(f"noise={self.noise} must not be negative and drop={self.drop} in [0, 1]")


class Receipt(NamedTuple):
    """How far two models are apart on some text.

    Attributes:
      logit_difference: the largest of any logit.
      kl: mean over tokens of KL(first || second), nats.
    """

    logit_difference: float
    kl: float


def upcycle(parents: Sequence[Decoder], upcycling: Upcycling, *, key: Array) -> Decoder:
    """Makes a mixture of experts of dense models.

    Args:
      parents: at least one; all of one config, dense in the layers that change.
      upcycling: how.
      key: consumed; by routers, noise and units that are drawn anew.

    Returns:
      The model, in the parents' dtypes, its routers in float32.

    Raises:
      ValueError: parents of different configs, layers that are not dense, or hidden units that G does not divide.
    """
    config = upcycled_config(parents[0].config, upcycling)
    if any(parent.config != parents[0].config for parent in parents):
        raise ValueError("the parents have different configs: experts of one layer must come from alike networks")
    changed = upcycling.layers or range(len(config.layers))
    outer = [named_arrays(parent) for parent in parents]
    layers = []
    for index in range(len(config.layers)):
        blocks = [named_arrays(parent.layer(index)) for parent in parents]
        block = _mean(blocks)
        if index in changed:
            experts = [_part(one, _EXPERTS) for one in blocks]
            layer_key = jax.random.fold_in(key, index)
            block |= {_EXPERTS + name: value for name, value in _make_experts(experts, upcycling, layer_key).items()}
            block["feed_forward/router/kernel"] = _make_router(config.width, upcycling, layer_key)
        layers.append(block)
    untrained = untrained_arrays(config)

    def array_of(path: str, shape: nnx.Variable) -> Array:
        del shape
        if path in untrained:
            return untrained[path]
        if not path.startswith("stacks/"):
            return _mean([{path: arrays[path]} for arrays in outer])[path]
        _, stack, name = path.split("/", 2)
        return jnp.stack([layers[index][name] for index in config.runs[int(stack)][1]])

    return fill_model(config, array_of)


def receipt(first: Decoder, second: Decoder, tokens: Array, token_mask: Array | None = None) -> Receipt:
    """Compares two models on `[B, S]` tokens, of which masked ones are left out."""

    @jax.jit
    def compare(first: Decoder, second: Decoder) -> tuple[Array, Array]:
        one, other = (model(tokens, token_mask, trace="off")[0] for model in (first, second))
        mask = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
        log_p, log_q = jax.nn.log_softmax(one), jax.nn.log_softmax(other)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.max(jnp.abs(one - other) * mask[:, :, None]), jnp.sum(kl * mask) / mask.sum()

    return Receipt(*map(float, compare(first, second)))


def upcycled_config(config: DecoderConfig, upcycling: Upcycling) -> DecoderConfig:
    """The mixture's config.

    Raises:
      ValueError: layers that are not dense, or hidden units that the granularity does not divide.
    """
    changed = upcycling.layers or range(len(config.layers))
    for index in changed:
        if not 0 <= index < len(config.layers) or config.layers[index] != "dense":
            raise ValueError(f"layer {index} of {config.layers} is no dense layer, so it cannot be upcycled")
    if config.dense_hidden % upcycling.granularity:
        raise ValueError(f"granularity={upcycling.granularity} does not divide dense_hidden={config.dense_hidden}")
    return dataclasses.replace(
        config,
        layers=tuple("moe" if i in changed else kind for i, kind in enumerate(config.layers)),
        num_experts=upcycling.num_experts,
        num_choices=upcycling.num_choices,
        expert_hidden=config.dense_hidden // upcycling.granularity,
        rule=upcycling.rule,
    )


def _mean(trees: list[dict[str, Array]]) -> dict[str, Array]:
    """The mean over parents, exact for one."""
    if len(trees) == 1:
        return dict(trees[0])
    return {name: jnp.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}


def _part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    """The arrays below a path."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _make_router(width: int, upcycling: Upcycling, key: Array) -> Array:
    """`[D, E]` float32, one column for each copy, repeated for its shards."""
    copies = upcycling.num_experts // upcycling.granularity
    kernel = upcycling.router_scale * jax.random.normal(jax.random.fold_in(key, 0), (width, copies))
    return jnp.repeat(kernel, upcycling.granularity, axis=1)


def _make_experts(parents: list[dict[str, Array]], upcycling: Upcycling, key: Array) -> dict[str, Array]:
    """Parameters `[E, ...]` from dense ones `[1, ...]`."""
    copies = upcycling.num_experts // upcycling.granularity
    stacked = {name: jnp.stack([parents[n % len(parents)][name][0] for n in range(copies)]) for name in parents[0]}
    sharded = _shard(stacked, upcycling.granularity)
    noise_key, drop_key = jax.random.split(jax.random.fold_in(key, 1))
    if upcycling.noise:
        sharded = _add_noise(sharded, upcycling.noise, noise_key)
    return _redraw(sharded, upcycling.drop, drop_key) if upcycling.drop else sharded


def _shard(params: dict[str, Array], granularity: int) -> dict[str, Array]:
    """Cuts the hidden units of `[N, ...]` networks into G runs: `[N * G, ...]`, whose outputs are G times as large."""
    if granularity == 1:
        return params
    hidden = params["w_out"].shape[1]
    sharded = {}
    for name, value in params.items():
        if name == "b_out":  # every shard adds it, weighed by gates that sum to 1
            sharded[name] = jnp.repeat(value, granularity, axis=0)
            continue
        axis = 1 if name == "w_out" else value.ndim - 1
        halves = value.shape[axis] // hidden  # two where gate and up are fused
        lead, tail = value.shape[1:axis], value.shape[axis + 1 :]
        split = value.reshape(len(value), *lead, halves, granularity, hidden // granularity, *tail)
        # (N, ..., halves, G, F / G, ...) -> (N, G, ..., halves, F / G, ...) -> (N * G, ..., halves * F / G, ...)
        moved = jnp.moveaxis(split, axis + 1, 1)
        merged = moved.reshape(len(value) * granularity, *lead, halves * hidden // granularity, *tail)
        sharded[name] = granularity * merged if name == "w_out" else merged
    return sharded


def _add_noise(params: dict[str, Array], scale: float, key: Array) -> dict[str, Array]:
    """Gaussian noise on every matrix, relative to its own spread."""
    keys = jax.random.split(key, len(params))
    noisy = {}
    for one, (name, value) in zip(keys, sorted(params.items()), strict=True):
        spread = value.std(tuple(range(1, value.ndim)), keepdims=True) if value.ndim > 2 else 0.0
        noisy[name] = (value + scale * spread * jax.random.normal(one, value.shape)).astype(value.dtype)
    return noisy


def _redraw(params: dict[str, Array], share: float, key: Array) -> dict[str, Array]:
    """Draws a share of every expert's hidden units anew, with mean and spread of the expert's matrices."""
    num_experts, hidden, _ = params["w_out"].shape
    unit_key, in_key, out_key = jax.random.split(key, 3)
    order = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(unit_key, num_experts), hidden)
    is_new = order < round(share * hidden)  # [E, F]
    halves = params["w_in"].shape[-1] // hidden
    drawn = dict(params)
    for name, one, where in (
        ("w_in", in_key, jnp.tile(is_new, (1, halves))[:, None, :]),
        ("w_out", out_key, is_new[:, :, None]),
    ):
        value = params[name]
        new = value.mean((1, 2), keepdims=True) + value.std((1, 2), keepdims=True) * jax.random.normal(one, value.shape)
        drawn[name] = jnp.where(where, new, value).astype(value.dtype)
    return drawn
