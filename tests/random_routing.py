"""Synthetic logits and constraints that the tests of routing share."""

import jax.numpy as jnp
import numpy as np

from moe_jax.routing import RULES, rule_settings
from moe_jax.types import Topology

NUM_EXPERTS = 6
NUM_TOKENS = 18
NUM_SEQUENCES = 3


def choices_of(rule):
    """A K that the rule accepts."""
    return RULES[rule].only_choices or 3


def nulls_of(rule):
    """The number of null experts among the rule's columns."""
    return rule_settings(RULES[rule]).get("num_null", 0)


def random_permutation(rule, seed):
    """A new order of the experts that the rule must not notice.

    Rules with groups of experts keep these together; null experts are not experts like the others and stay last.
    """
    rng, num_true = np.random.default_rng(seed), NUM_EXPERTS - nulls_of(rule)
    groups = np.arange(num_true).reshape(rule_settings(RULES[rule]).get("num_groups", 1), -1)
    order = np.concatenate([rng.permutation(group) for group in rng.permutation(groups)])
    return np.append(order, np.arange(num_true, NUM_EXPERTS))


def random_logits(seed, num_tokens=NUM_TOKENS):
    """`[T, E]`, spread widely enough that rounding flips no choice."""
    return np.random.default_rng(seed).normal(size=(num_tokens, NUM_EXPERTS)).astype(np.float32) * 2


def random_ids(seed, num_tokens=NUM_TOKENS):
    """Vocabulary ids `[T]`."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 50, num_tokens), jnp.int32)


def random_constraints(seed, num_tokens=NUM_TOKENS):
    """A topology of three groups (one of them nearly closed), masked tokens and a selection bias."""
    rng = np.random.default_rng(seed)
    keep = rng.random((3, NUM_EXPERTS)) < 0.6
    keep[0] = np.arange(NUM_EXPERTS) == 2
    return {
        "topology": Topology(jnp.asarray(keep), jnp.asarray([3, 1, 2], jnp.int32)),
        "token_groups": jnp.asarray(rng.integers(0, 3, num_tokens), jnp.int32),
        "token_mask": jnp.asarray(rng.random(num_tokens) < 0.8),
        "bias": jnp.asarray(rng.normal(size=NUM_EXPERTS), jnp.float32) * 0.3,
    }


def as_arrays(constraints):
    """The same for the oracle: a topology spread over tokens."""
    groups, topology = np.asarray(constraints["token_groups"]), constraints["topology"]
    return {
        "is_open": np.asarray(topology.keep)[groups],
        "limit": np.asarray(topology.num_choices)[groups],
        "token_mask": np.asarray(constraints["token_mask"]),
        "bias": np.asarray(constraints["bias"]),
    }
