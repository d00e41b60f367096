"""Rules that do not look at the logits: baselines, and loads made to measure for benchmarks.

    hash            a fixed hash of the token's vocabulary id       Roller et al. (2106.04426)
    random          K experts at random
    forced_uniform  round-robin, perfect balance
    forced_zipf     loads proportional to 1 / rank^alpha
    forced_skewed   a given share of the tokens goes to expert 0, the others share the rest alike

A token's K gates are all 1/K and its probabilities are its gates, so the router gets no gradient through them. A closed
expert is replaced by an open one. "Number" below is a token's place among the unmasked tokens of its sequence, from 0:
forced loads hold in every sequence, whatever its company; for a batch as one, route with `num_sequences=1`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.scores import normalize
from moe_jax.routing.select import select_top_k
from moe_jax.types import Array, Choice, RoutingInputs

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_GOLDEN_BITS = 0x9E3779B9  # 2^32 times it: spreads small integers over 32 bits


def hash_token_ids(inputs: RoutingInputs, num_choices: int, *, seed: int = 0) -> Choice:
    """K distinct experts by a hash of the vocabulary id: with K = 1 the paper's random hash layer.

    Every pair of an id and an expert has a random number, and the K largest of an id win. For K > 1 the paper hashes
    parts of one expert (MultiHash) instead. Same numbers on every platform; layers of one seed share them.

    Args:
      inputs: the tokens' ids and constraints.
      num_choices: K, static.
      seed: which hash function.
    """
    assert inputs.token_ids is not None  # route refuses rules that need them without
    return _best_of(_hash(inputs.token_ids, inputs.logits.shape[1], seed), inputs, num_choices)


def random_experts(inputs: RoutingInputs, num_choices: int) -> Choice:
    """K distinct experts, all sets alike: fresh ones for each key; without a key a hash of the token's number."""
    if inputs.key is None:
        return _best_of(_hash(_numbers(inputs), inputs.logits.shape[1], 0), inputs, num_choices)
    return _best_of(jax.random.uniform(inputs.key, inputs.logits.shape), inputs, num_choices)


def forced_uniform(inputs: RoutingInputs, num_choices: int) -> Choice:
    """Round-robin: token number i takes the experts iK to iK + K - 1, modulo E.

    While nothing is closed, the loads of a sequence differ by one at most, however much of it is masked.
    """
    return _best_of(-_rotation(inputs, num_choices), inputs, num_choices)


def forced_zipf(inputs: RoutingInputs, num_choices: int, *, alpha: float = 1.0) -> Choice:
    """Loads proportional to `(e + 1)^-alpha`; an expert that would get more than all tokens gets all.

    Args:
      inputs: the constraints.
      num_choices: K, static.
      alpha: exponent; 0 is uniform.

    Raises:
      ValueError: a negative exponent.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}; 0 loads all experts alike")
    weights = np.arange(1.0, inputs.logits.shape[1] + 1) ** -alpha
    shares, left = np.zeros_like(weights), float(num_choices)
    for expert in range(len(weights)):  # weights fall, so whoever comes after a share below 1 is below 1 too
        shares[expert] = min(1.0, left * weights[expert] / weights[expert:].sum())
        left -= shares[expert]
    return _forced(inputs, num_choices, shares)


def forced_skewed(inputs: RoutingInputs, num_choices: int, *, share: float = 0.6) -> Choice:
    """Expert 0 gets `share` of the tokens, that is `share / K` of the assignments; the others share the rest alike.

    Args:
      inputs: the constraints.
      num_choices: K, static.
      share: in [0, 1].

    Raises:
      ValueError: a share outside, or one so small that the other experts cannot take K choices of every token.
    """
    num_others = inputs.logits.shape[1] - 1
    if not 0 <= share <= 1 or num_choices - share > num_others:
        raise ValueError(
            f"share={share} must be in [0, 1] and leave at most {num_others} of K={num_choices} choices to the "
            f"{num_others} other experts"
        )
    share_of_others = (num_choices - share) / max(num_others, 1)
    return _forced(inputs, num_choices, np.array([share] + [share_of_others] * num_others))


def _forced(inputs: RoutingInputs, num_choices: int, shares: np.ndarray) -> Choice:
    """Systematic sampling: the experts lie side by side, `shares [E]` of the tokens long, K in all.

    Token number i takes the experts at u_i, u_i + 1, …, u_i + K - 1, where the u of a full sequence are S evenly spaced
    points: each load is its share of S, to rounding. Their order is that of the fractional parts of the golden ratio's
    multiples, so that any beginning of a sequence has its shares too, to three tokens (measured for S up to 8,192).
    """
    length = inputs.logits.shape[0] // inputs.num_sequences
    order = np.argsort(np.arange(length) * _GOLDEN_RATIO % 1.0)
    points = np.zeros(length, np.float32)
    points[order] = (np.arange(length) + 0.5) / length
    u = jnp.asarray(points)[_numbers(inputs)][:, None]
    ends = jnp.asarray(np.append(np.cumsum(shares)[:-1], num_choices), jnp.float32)[None, :]
    points_before = jnp.ceil(ends - u)
    is_chosen = points_before - jnp.pad(points_before, ((0, 0), (1, 0)))[:, :-1]
    return _best_of(shares.size * is_chosen - _rotation(inputs, num_choices), inputs, num_choices)


def _rotation(inputs: RoutingInputs, num_choices: int) -> Array:
    """`[T, E]` float32: an order of all experts that moves on by K from token to token."""
    num_experts = inputs.logits.shape[1]
    offsets = jnp.arange(num_experts)[None, :] - num_choices * _numbers(inputs)[:, None]
    return (offsets % num_experts).astype(jnp.float32)


def _best_of(scores: Array, inputs: RoutingInputs, num_choices: int) -> Choice:
    """The open experts of the K largest `scores [T, E]`, weighed alike."""
    ids = select_top_k(scores, num_choices, inputs.is_open, inputs.limit)
    is_chosen = (ids[:, :, None] == jnp.arange(scores.shape[1])[None, None, :]).any(1)
    gates = normalize((ids < scores.shape[1]).astype(jnp.float32))
    return Choice(ids, gates, normalize(is_chosen.astype(jnp.float32)))


def _numbers(inputs: RoutingInputs) -> Array:
    """`[T]` int32, the numbers of the tokens: how many unmasked ones precede them in their sequence."""
    num_tokens = inputs.logits.shape[0]
    is_token = jnp.ones(num_tokens, bool) if inputs.is_open is None else inputs.is_open.any(-1)
    counts = is_token.astype(jnp.int32).reshape(inputs.num_sequences, -1)
    return (jax.lax.associative_scan(jnp.add, counts, axis=1) - counts).reshape(-1)


def _hash(values: Array, num_experts: int, seed: int) -> Array:
    """`[T, E]` float32 in [0, 1): a random number for every pair of one of `values [T]` and an expert."""
    rows = _mix(values.astype(jnp.uint32) + _mix(jnp.uint32(seed % 2**32) + jnp.uint32(_GOLDEN_BITS)))
    columns = _mix(jnp.arange(1, num_experts + 1, dtype=jnp.uint32) * jnp.uint32(_GOLDEN_BITS))
    mixed = _mix(rows[:, None] ^ columns[None, :])
    return (mixed >> 8).astype(jnp.float32) / 2**24  # 24 bits are exact in float32


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3: every bit of the uint32 input moves every bit of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
