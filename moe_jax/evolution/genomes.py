"""Genome kinds: one array of integers for a routing topology, and the functions that make, vary and read it.

    budget   how many experts each layer keeps, as in EvoESAP (arXiv 2603.06003); a saliency order says which
    mask     which experts each layer keeps, with an exact number in all
    top_k    how many experts a token may use in each layer, as in LExI (arXiv 2509.02753)
    combine  two of them side by side in one array

A search sees only the array; `decode` turns it into the fields of `Topology`. Mutation is measured in `edits`, the
expected number of edits of a genome (of each part, where two are combined), so that one setting suits every length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.evolution import operators
from moe_jax.types import Array, Topology


class LayerTopology(NamedTuple):
    """One candidate's topology: `keep` `[L, E]` bool and `num_choices` `[L]` int32."""

    keep: Array
    num_choices: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Genome:
    """A genome kind. Compared and hashed by identity, so that it can be a static argument of `jax.jit`.

    Attributes:
      num_values: one entry for each of the N genes; gene `n` lies in `[0, num_values[n])`.
      random: key -> `[N]` int32, a valid genome.
      mutate: (key, genomes `[P, N]`, edits `[]`) -> `[P, N]`, perhaps invalid.
      repair: (key, genomes `[P, N]`) -> `[P, N]`, valid; a valid genome is returned unchanged.
      decode: genome `[N]` -> LayerTopology.
      encode: LayerTopology -> `[N]` int32; valid if the topology keeps the constraints, else to be repaired.
    """

    num_values: tuple[int, ...]
    random: Callable[[Array], Array]
    mutate: Callable[[Array, Array, Array], Array]
    repair: Callable[[Array, Array], Array]
    decode: Callable[[Array], LayerTopology]
    encode: Callable[[LayerTopology], Array]

    @property
    def size(self) -> int:
        """Number of genes, N."""
        return len(self.num_values)


def decode_population(genome: Genome, genomes: Array) -> Topology:
    """Reads `[P, N]` genomes as one Topology with a token group for each candidate: `keep` `[L, P, E]`."""
    keep, num_choices = jax.vmap(genome.decode)(genomes)
    return Topology(jnp.swapaxes(keep, 0, 1), num_choices.T)


def mask_genome(
    num_layers: int, num_experts: int, total: int | tuple[int, int], min_per_layer: int, num_choices: int
) -> Genome:
    """One bit for each expert of each layer.

    Args:
      num_layers: L.
      num_experts: E.
      total: experts kept over all layers: exactly this many, or any number in a closed range (for searches in which
        cost is an objective). `total = L * r` with `min_per_layer = r` keeps exactly r in every layer.
      min_per_layer: least experts kept in a layer; at least `num_choices`, so that a token can fill its choices.
      num_choices: experts that a token uses in every layer.

    Returns:
      A Genome of `L * E` binary genes.

    Raises:
      ValueError: the constraints contradict each other.
    """
    low, high = _check_total(num_layers, num_experts, total, min_per_layer, num_choices)
    size = num_layers * num_experts

    def repair(key: Array, genomes: Array) -> Array:
        masks = genomes.reshape(-1, num_layers, num_experts)
        return operators.repair_mask(key, masks, (low, high), min_per_layer).reshape(genomes.shape)

    def random(key: Array) -> Array:
        # The number of experts is drawn first: independent bits would crowd a range's middle.
        key_count, key_mask, key_repair = jax.random.split(key, 3)
        count = jax.random.randint(key_count, (), low, high + 1)
        mask = jax.random.permutation(key_mask, size) < count
        return repair(key_repair, mask.astype(jnp.int32)[None, :])[0]

    return Genome(
        num_values=(2,) * size,
        random=random,
        mutate=lambda key, genomes, edits: operators.mutate_bits(key, genomes, jnp.minimum(edits / size, 1.0)),
        repair=repair,
        decode=lambda genome: LayerTopology(
            genome.reshape(num_layers, num_experts) > 0, jnp.full(num_layers, num_choices, jnp.int32)
        ),
        encode=lambda topology: topology.keep.reshape(-1).astype(jnp.int32),
    )


def budget_genome(order: Array, total: int | tuple[int, int], min_per_layer: int, num_choices: int) -> Genome:
    """The number of experts that each layer keeps; it keeps the first ones of a given order.

    A mutation moves up to a quarter of the experts between two layers; if `total` is a range, it also adds or
    removes as many in a layer.

    Args:
      order: `[L, E]` expert ids of each layer, the most important first (a permutation in each row).
      total: experts kept over all layers: exactly this many, or any number in a closed range.
      min_per_layer: least experts kept in a layer; at least `num_choices`.
      num_choices: experts that a token uses in every layer.

    Returns:
      A Genome of L genes.

    Raises:
      ValueError: the constraints contradict each other, or a row of `order` is no permutation.
    """
    ranking = np.asarray(order)
    num_layers, num_experts = ranking.shape
    low, high = _check_total(num_layers, num_experts, total, min_per_layer, num_choices)
    if not np.array_equal(np.sort(ranking, axis=1), np.broadcast_to(np.arange(num_experts), ranking.shape)):
        raise ValueError(f"each row of `order` must be a permutation of 0..{num_experts - 1}, got {ranking.tolist()}")
    place = np.argsort(ranking, axis=1)  # [L, E] position of each expert in its layer's order
    max_units = max(1, num_experts // 4)

    def repair(key: Array, genomes: Array) -> Array:
        return operators.repair_budgets(key, genomes, (low, high), min_per_layer, num_experts)

    def random(key: Array) -> Array:
        # As for masks the sum is drawn first; genes shifted towards it, repair settles the rest.
        key_total, key_genes, key_repair = jax.random.split(key, 3)
        target = jax.random.randint(key_total, (), low, high + 1)
        genes = jax.random.randint(key_genes, (1, num_layers), min_per_layer, num_experts + 1)
        return repair(key_repair, genes + (target - jnp.sum(genes)) // num_layers)[0]

    def mutate(key: Array, genomes: Array, edits: Array) -> Array:
        key_move, key_resize, key_units = jax.random.split(key, 3)
        move_rate = jnp.minimum(edits / max(1, num_layers // 2), 1.0)
        moved = operators.move_units(key_move, genomes, min_per_layer, num_experts, max_units, move_rate)
        if low == high:
            return moved
        is_resized = jax.random.bernoulli(key_resize, jnp.minimum(edits / num_layers, 1.0), genomes.shape)
        units = jax.random.randint(key_units, genomes.shape, -max_units, max_units + 1)
        return jnp.where(is_resized, moved + units, moved)

    return Genome(
        num_values=(num_experts + 1,) * num_layers,
        random=random,
        mutate=mutate,
        repair=repair,
        decode=lambda genome: LayerTopology(
            jnp.asarray(place) < genome[:, None], jnp.full(num_layers, num_choices, jnp.int32)
        ),
        encode=lambda topology: jnp.sum(topology.keep, axis=1).astype(jnp.int32),
    )


def top_k_genome(num_layers: int, num_experts: int, max_choices: int) -> Genome:
    """The number of experts a token may use in each layer, from 1 to `max_choices`; gene `g` stands for `g + 1`.

    Args:
      num_layers: L.
      num_experts: E; all are kept.
      max_choices: largest number of choices, the model's K.

    Returns:
      A Genome of L genes; every array within `num_values` is valid.
    """
    num_values = (max_choices,) * num_layers
    return Genome(
        num_values=num_values,
        random=lambda key: jax.random.randint(key, (num_layers,), 0, max_choices),
        mutate=lambda key, genomes, edits: operators.mutate_categories(
            key, genomes, jnp.asarray(num_values), jnp.minimum(edits / num_layers, 1.0)
        ),
        repair=lambda key, genomes: jnp.clip(genomes, 0, max_choices - 1),
        decode=lambda genome: LayerTopology(jnp.ones((num_layers, num_experts), bool), genome + 1),
        encode=lambda topology: topology.num_choices.astype(jnp.int32) - 1,
    )


def combine(first: Genome, second: Genome) -> Genome:
    """Two genomes in one array; the topology is what both allow: experts that both keep, the smaller number of choices.

    Each part mutates with the full number of edits and is repaired on its own, so let only one of them choose experts.
    """

    def split(genomes: Array) -> tuple[Array, Array]:
        return genomes[..., : first.size], genomes[..., first.size :]

    def random(key: Array) -> Array:
        key_first, key_second = jax.random.split(key)
        return jnp.concatenate([first.random(key_first), second.random(key_second)])

    def mutate(key: Array, genomes: Array, edits: Array) -> Array:
        key_first, key_second = jax.random.split(key)
        a, b = split(genomes)
        return jnp.concatenate([first.mutate(key_first, a, edits), second.mutate(key_second, b, edits)], axis=1)

    def repair(key: Array, genomes: Array) -> Array:
        key_first, key_second = jax.random.split(key)
        a, b = split(genomes)
        return jnp.concatenate([first.repair(key_first, a), second.repair(key_second, b)], axis=1)

    def decode(genome: Array) -> LayerTopology:
        a, b = (part.decode(genes) for part, genes in zip((first, second), split(genome), strict=True))
        return LayerTopology(a.keep & b.keep, jnp.minimum(a.num_choices, b.num_choices))

    return Genome(
        num_values=first.num_values + second.num_values,
        random=random,
        mutate=mutate,
        repair=repair,
        decode=decode,
        encode=lambda topology: jnp.concatenate([first.encode(topology), second.encode(topology)]),
    )


def _check_total(
    num_layers: int, num_experts: int, total: int | tuple[int, int], min_per_layer: int, num_choices: int
) -> tuple[int, int]:
    """The total as a closed range, after a check that some topology satisfies every constraint."""
    low, high = (total, total) if isinstance(total, int) else total
    if not 1 <= num_choices <= min_per_layer <= num_experts:
        raise ValueError(
            f"need 1 <= num_choices <= min_per_layer <= experts per layer, got {num_choices}, {min_per_layer}, "
            f"{num_experts}: with fewer experts than choices a token cannot fill its choices"
        )
    if not num_layers * min_per_layer <= low <= high <= num_layers * num_experts:
        raise ValueError(
            f"total {total} must lie within [{num_layers * min_per_layer}, {num_layers * num_experts}], which is "
            f"{num_layers} layers of {min_per_layer} to {num_experts} experts"
        )
    return low, high
