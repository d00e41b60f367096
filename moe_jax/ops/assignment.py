"""Balanced linear assignment by auction: every token to one expert, every expert exactly its number of tokens.

Bertsekas & Castañon, "The auction algorithm for the transportation problem" (Annals of Operations Research 20, 1989),
in its parallel form: in each round all tokens without a seat bid for their best expert, and an expert keeps its highest
bids. The price p_e of an expert is its lowest kept bid once it is full. A token bids so high that it would be content
with its second choice, up to epsilon:

    bid = p_best + (value_best - value_second) + epsilon,    value_e = affinity_e - p_e

so when all are seated, each token's value is within epsilon of its best. Summed over the tokens, with every seat taken,
the affinity is then within T * epsilon of the dual problem's sum_t max_e value_te + sum_e seats_e * p_e, which no
assignment exceeds. Epsilon starts large and is divided at each repetition, which starts from the prices of the last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.expert_order import rank_in_expert
from moe_jax.types import Array

_COARSEST = 1e-2  # the first epsilon, relative to the spread of the affinities
_REFINEMENT = 10.0  # each repetition divides epsilon by this
_FINEST = 1e-6  # a relative epsilon below this is lost in the rounding of float32 prices


class Assignment(NamedTuple):
    """Who sits where.

    Attributes:
      expert_ids: `[T]` int32; E for tokens that have no seat at an open expert.
      prices: `[E]` float32, the dual variables, in the units of the affinities.
      num_rounds: `[]` int32, rounds of bidding.
    """

    expert_ids: Array
    prices: Array
    num_rounds: Array


class _Auction(NamedTuple):
    """The state between rounds: each token's expert (E for none) and bid `[T]`, prices `[E]`, epsilon and rounds."""

    owners: Array
    bids: Array
    prices: Array
    epsilon: Array
    num_rounds: Array


def assign_by_auction(
    affinities: Array,
    seats: Array,
    is_open: Array | None = None,
    *,
    tolerance: float = 1e-3,
    max_rounds: int = 5_000,
) -> Assignment:
    """Seats tokens at experts so that the sum of affinities is the largest, within `T * tolerance * spread`.

    The spread is the range of the open affinities. A closed pair counts as `(E + 1) * spread` less than the worst open
    one, more than any chain of moves can cost: with `tolerance < 1 / E` a token is left without a seat only if no
    assignment seats more. Prices only rise, by at least epsilon, and an expert with a free seat bounds them, so the
    auction ends; `max_rounds` bounds its cost too. Where it strikes (hundreds of equal rows on as many experts), the
    tokens still without a seat take the free ones in order: every expert has its number, but nothing is proven of the
    sum.

    Args:
      affinities: `[T, E]` finite; computed in float32, without gradient.
      seats: `[E]` int32; they must add up to the number of tokens that have an open expert.
      is_open: `[T, E]` bool, or None for all open; a token with no open expert takes no part.
      tolerance: epsilon relative to the spread.
      max_rounds: bound on the rounds of bidding; each costs a few passes over `[T, E]` and a sort of `[T]`.

    Raises:
      ValueError: a tolerance that float32 cannot resolve.
    """
    if tolerance < _FINEST:
        raise ValueError(f"tolerance must be at least {_FINEST}, the resolution of float32 prices, got {tolerance}")
    num_tokens, num_experts = affinities.shape
    is_open = jnp.ones(affinities.shape, bool) if is_open is None else is_open
    worths, spread = _worths(jax.lax.stop_gradient(affinities.astype(jnp.float32)), seats, is_open)
    is_token, finest = is_open.any(-1), tolerance * spread

    def is_unseated(auction: _Auction) -> Array:
        return is_token & (auction.owners == num_experts)

    def is_running(auction: _Auction) -> Array:
        is_unfinished = is_unseated(auction).any() | (auction.epsilon > finest)
        return is_unfinished & (auction.num_rounds < max_rounds)

    def next_round(auction: _Auction) -> _Auction:
        is_repetition = ~is_unseated(auction).any()
        finer = jnp.maximum(auction.epsilon / _REFINEMENT, finest)
        auction = auction._replace(
            owners=jnp.where(is_repetition, num_experts, auction.owners),
            epsilon=jnp.where(is_repetition, finer, auction.epsilon),
        )
        return _bid(auction, is_unseated(auction), worths, seats, (num_experts + 3) * spread)

    nobody = jnp.full(num_tokens, num_experts, jnp.int32)
    coarsest = jnp.maximum(_COARSEST * spread, finest)
    start = _Auction(nobody, jnp.zeros(num_tokens), jnp.zeros(num_experts), coarsest, jnp.int32(0))
    end = jax.lax.while_loop(is_running, next_round, start)
    ids = _fill_free_seats(end.owners, is_unseated(end), seats)
    is_allowed = jnp.take_along_axis(is_open, jnp.minimum(ids, num_experts - 1)[:, None], axis=1)[:, 0]
    return Assignment(jnp.where(is_allowed, ids, num_experts), end.prices, end.num_rounds)


def _worths(affinities: Array, seats: Array, is_open: Array) -> tuple[Array, Array]:
    """Affinities with closed pairs far below the others and seatless experts at minus infinity; and the spread."""
    lowest = jnp.min(affinities, where=is_open, initial=jnp.inf)
    spread = jnp.max(affinities, where=is_open, initial=-jnp.inf) - lowest
    spread = jnp.where(spread > 0, spread, 1.0)
    closed = lowest - (affinities.shape[1] + 1) * spread
    return jnp.where((seats > 0)[None, :], jnp.where(is_open, affinities, closed), -jnp.inf), spread


def _bid(auction: _Auction, is_bidding: Array, worths: Array, seats: Array, largest_raise: Array) -> _Auction:
    """One round: bids of the unseated, then every expert keeps its highest."""
    num_experts = seats.shape[0]
    ids = jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    values = worths - auction.prices[None, :]
    highest = values.max(-1)
    best = jnp.min(
        ids, axis=-1, where=values == highest[:, None], initial=num_experts
    )  # XLA's CPU argmax is 10x slower
    second = jnp.max(values, axis=-1, where=ids != best[:, None], initial=-jnp.inf)
    # Second is minus infinity if there is one expert; the proof holds for any raise up to the difference.
    raises = jnp.minimum(highest - second, largest_raise) + auction.epsilon
    bids = jnp.where(is_bidding, auction.prices[best] + raises, auction.bids)
    wanted = jnp.where(is_bidding, best, auction.owners)

    order = jnp.argsort(-bids, stable=True)
    experts = wanted[order]
    ranks, counts = rank_in_expert(experts, num_experts)
    room = jnp.append(seats, 0)[experts]
    owners = jnp.zeros_like(wanted).at[order].set(jnp.where(ranks < room, experts, num_experts), unique_indices=True)
    last = jnp.where(ranks == room - 1, experts, num_experts)  # whose bid takes the last seat
    lowest_kept = jnp.zeros(num_experts + 1).at[last].set(bids[order])[:num_experts]
    prices = jnp.where(counts[:num_experts] >= seats, lowest_kept, auction.prices)
    return _Auction(owners, bids, prices, auction.epsilon, auction.num_rounds + 1)


def _fill_free_seats(owners: Array, is_unseated: Array, seats: Array) -> Array:
    """The owners `[T]`, the unseated ones at the seats that are left, both in order."""
    _, counts = rank_in_expert(owners, seats.shape[0])
    free = jnp.cumsum(seats - counts[:-1])
    filled = jnp.searchsorted(free, jnp.cumsum(is_unseated) - 1, side="right")
    return jnp.where(is_unseated, filled, owners).astype(jnp.int32)
