"""Variation and repair of integer genomes: pure, jittable functions on whole populations `[P, N]` of int32.

Selection, crossover and mutation are the textbook operators (Holland 1975; Goldberg and Deb 1991 for tournaments). What
is particular to expert topologies are the constraints: a mask keeps an exact number of experts with a minimum in each
layer, a budget has a fixed sum. Crossover and mutation ignore them, and a repair afterwards restores them with as few
changes as possible, chosen uniformly among the equally small ones, so that no expert is favoured by its index.
Axes: P population, N genes, L layers, E experts. Every function consumes its key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def select_tournament(key: Array, fitness: Array, num_winners: int, size: int) -> Array:
    """Indices of tournament winners; entrants are drawn with replacement, the lowest fitness wins.

    Args:
      key: PRNG key.
      fitness: `[P]` float32, lower is better; +inf marks an invalid individual, which only wins against its like.
      num_winners: number of tournaments.
      size: entrants per tournament; 2 is the binary tournament.

    Returns:
      `[num_winners]` int32 indices into the population.
    """
    entrants = _scale_to_integers(jax.random.uniform(key, (num_winners, size)), fitness.shape[0])
    winners = jnp.argmin(fitness[entrants], axis=1)
    return jnp.take_along_axis(entrants, winners[:, None], axis=1)[:, 0]


def one_point_mask(cut: Array, num_genes: int) -> Array:
    """`[P, N]` bool, genes from the second parent: those at and behind `cut` `[P]`."""
    return jnp.arange(num_genes)[None, :] >= cut[:, None]


def two_point_mask(cut: Array, other_cut: Array, num_genes: int) -> Array:
    """`[P, N]` bool, genes from the second parent: those between two cuts `[P]`, in either order."""
    position = jnp.arange(num_genes)[None, :]
    return (position >= jnp.minimum(cut, other_cut)[:, None]) & (position < jnp.maximum(cut, other_cut)[:, None])


def uniform_mask(key: Array, population_size: int, num_genes: int) -> Array:
    """`[P, N]` bool, genes from the second parent: each with probability 1/2."""
    return jax.random.bernoulli(key, 0.5, (population_size, num_genes))


def crossover(key: Array, first: Array, second: Array, rate: Array, mix: Array) -> Array:
    """Children of pairs of parents; each pair draws one of the three crossovers, or none.

    Cuts lie anywhere between two genes, uniformly and independently.

    Args:
      key: PRNG key.
      first: `[P, N]` int32 parents; what a child is when its pair is not crossed.
      second: `[P, N]` int32 parents.
      rate: `[]` probability that a pair is crossed.
      mix: `[3]` non-negative weights of one-point, two-point and uniform crossover.

    Returns:
      `[P, N]` int32 children.
    """
    population_size, num_genes = first.shape
    key_pair, key_genes = jax.random.split(key)
    draw = jax.random.uniform(key_pair, (4, population_size))
    cut, other_cut = 1 + _scale_to_integers(draw[:2], max(num_genes - 1, 1))
    kind = draw[2] * jnp.sum(mix)
    from_second = jnp.where(
        (kind < mix[0])[:, None],
        one_point_mask(cut, num_genes),
        jnp.where(
            (kind < mix[0] + mix[1])[:, None],
            two_point_mask(cut, other_cut, num_genes),
            uniform_mask(key_genes, population_size, num_genes),
        ),
    )
    return jnp.where((draw[3] < rate)[:, None] & from_second, second, first)


def _scale_to_integers(draw: Array, count: int | Array) -> Array:
    """Uniform numbers in [0, 1) as integers in `[0, count)`; `jax.random.randint` draws and compiles twice as much."""
    return jnp.minimum((draw * count).astype(jnp.int32), count - 1)


def mutate_bits(key: Array, genomes: Array, rate: Array) -> Array:
    """Flips each bit of `[P, N]` binary genomes with probability `rate` `[]`; returns `[P, N]` int32."""
    return genomes ^ jax.random.bernoulli(key, rate, genomes.shape).astype(genomes.dtype)


def mutate_categories(key: Array, genomes: Array, num_values: Array, rate: Array) -> Array:
    """Gives each gene, with probability `rate`, another value: uniform over the values it does not have.

    Args:
      key: PRNG key.
      genomes: `[P, N]` int32, gene `n` in `[0, num_values[n])`.
      num_values: `[N]` int32, at least 1; a gene with a single value never changes.
      rate: `[]` probability per gene.

    Returns:
      `[P, N]` int32.
    """
    site, shift = jax.random.uniform(key, (2, *genomes.shape))
    others = num_values[None, :] - 1
    moved = (genomes + 1 + _scale_to_integers(shift, others)) % num_values[None, :]
    return jnp.where((site < rate) & (others > 0), moved, genomes)


def move_units(key: Array, budgets: Array, low: int, high: int, max_units: int, rate: Array) -> Array:
    """Moves units between randomly paired genes; the sum never changes and no gene leaves its bounds.

    All genes are paired at random (an odd one rests), and each pair moves a uniform number of units in
    `[1, max_units]`, less where a bound is nearer.

    Args:
      key: PRNG key.
      budgets: `[P, N]` int32 within `[low, high]`.
      low: smallest value of a gene.
      high: largest value of a gene.
      max_units: most units that one move carries.
      rate: `[]` probability that a pair moves.

    Returns:
      `[P, N]` int32 with the row sums of `budgets`.
    """
    population_size, num_genes = budgets.shape
    num_pairs = num_genes // 2
    key_pair, key_units = jax.random.split(key)
    shuffled = jnp.argsort(jax.random.uniform(key_pair, budgets.shape), axis=1)
    giver, taker = shuffled[:, :num_pairs], shuffled[:, num_pairs : 2 * num_pairs]
    site, amount = jax.random.uniform(key_units, (2, population_size, num_pairs))
    units = jnp.where(site < rate, 1 + _scale_to_integers(amount, max_units), 0)
    room = jnp.minimum(
        jnp.take_along_axis(budgets, giver, axis=1) - low, high - jnp.take_along_axis(budgets, taker, axis=1)
    )
    units = jnp.minimum(units, room)
    row = jnp.arange(population_size)[:, None]
    return budgets.at[row, giver].add(-units).at[row, taker].add(units)


def mark_largest(priority: Array, count: Array, max_count: int) -> Array:
    """Marks the `count` largest entries of each row, exactly that many even with ties.

    Args:
      priority: `[R, N]` float32.
      count: `[R]` int32, at most `max_count`.
      max_count: static bound of `count`.

    Returns:
      `[R, N]` bool.
    """
    # top_k and a scatter: XLA's CPU argsort costs six times as much.
    _, order = jax.lax.top_k(priority, max_count)
    is_marked = jnp.arange(max_count)[None, :] < count[:, None]
    return jnp.zeros(priority.shape, bool).at[jnp.arange(priority.shape[0])[:, None], order].set(is_marked)


def repair_mask(key: Array, masks: Array, total: tuple[int, int], min_per_layer: int) -> Array:
    """The nearest masks that keep an allowed number of experts in all and enough of them in each layer.

    A layer below its minimum opens random closed experts. Then, if the number of open experts lies outside `total`,
    random experts are opened or closed until it is at the nearer end, never closing a layer's minimum. Which ones is
    uniform among the equally near masks. With `total == (L*r, L*r)` and `min_per_layer == r` each layer keeps exactly
    r.

    Args:
      key: PRNG key.
      masks: `[P, L, E]` int32 of 0 and 1.
      total: least and most experts kept over all layers.
      min_per_layer: least experts kept in a layer.

    Returns:
      `[P, L, E]` int32 of 0 and 1.
    """
    population_size, num_layers, num_experts = masks.shape
    # Open experts before closed ones, at random within both: [0, 1) closed, [1, 2) open, [2, 4) a layer's minimum.
    priority = (jax.random.uniform(key, masks.shape) + masks).reshape(-1, num_experts)
    in_minimum = mark_largest(priority, jnp.full(priority.shape[:1], min_per_layer), min_per_layer)
    masks = masks | in_minimum.reshape(masks.shape).astype(masks.dtype)
    low, high = total
    if low <= num_layers * min_per_layer and high >= num_layers * num_experts:
        return masks
    target = jnp.clip(jnp.sum(masks, axis=(1, 2)), low, high)
    priority = (priority + 2.0 * in_minimum).reshape(population_size, -1)
    return mark_largest(priority, target, high).astype(masks.dtype).reshape(masks.shape)


def repair_budgets(key: Array, budgets: Array, total: tuple[int, int], low: int, high: int) -> Array:
    """Shifts budgets to an allowed sum: the integer form of the projection onto `low <= b <= high, sum b = total`.

    All genes rise or fall by the same number of units, clipped at their bounds; the few units left over after the last
    whole shift go to random genes with room.

    Args:
      key: PRNG key; decides only who receives the units left over.
      budgets: `[P, N]` int32, any values.
      total: least and most sum; `N * low <= total[0] <= total[1] <= N * high`.
      low: smallest value of a gene.
      high: largest value of a gene.

    Returns:
      `[P, N]` int32 within the bounds, with the sum nearest to that of the clipped input.
    """
    budgets = jnp.clip(budgets, low, high)
    target = jnp.clip(jnp.sum(budgets, axis=1), *total)[:, None]
    shifts = jnp.arange(low - high, high - low + 1)
    sums = jnp.sum(jnp.clip(budgets[:, None, :] + shifts[None, :, None], low, high), axis=2)  # [P, shifts], ascending
    shift = shifts[jnp.sum(sums <= target, axis=1) - 1][:, None]
    lower, upper = jnp.clip(budgets + shift, low, high), jnp.clip(budgets + shift + 1, low, high)
    left_over = target[:, 0] - jnp.sum(lower, axis=1)
    priority = jax.random.uniform(key, budgets.shape) + (upper > lower)
    return lower + mark_largest(priority, left_over, budgets.shape[1]).astype(budgets.dtype)


def is_repeat(genomes: Array, is_original: Array) -> Array:
    """Which genomes equal an earlier one.

    Args:
      genomes: `[P, N]` int32.
      is_original: `[P]` bool; a False row (an invalid individual) never makes a later one a repeat.

    Returns:
      `[P]` bool.
    """
    index = jnp.arange(genomes.shape[0])
    # Comparing all pairs gene by gene costs P^2 N. A 32-bit linear hash finds the first candidate, which is then
    # compared exactly: a genome is never taken for a repeat that is none; a collision hides a true repeat once in
    # 2^32.
    multipliers = jax.random.bits(jax.random.key(0), (genomes.shape[1],)) | 1
    hashes = jnp.sum(genomes.astype(jnp.uint32) * multipliers[None, :], axis=1)
    is_match = (hashes[:, None] == hashes[None, :]) & is_original[None, :] & (index[None, :] < index[:, None])
    is_same = jnp.all(genomes == genomes[jnp.argmax(is_match, axis=1)], axis=1)
    return jnp.any(is_match, axis=1) & is_same
