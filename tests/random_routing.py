"""Synthetic logits and constraints that the tests of routing share."""

import inspect

import jax.numpy as jnp
import numpy as np

from moe_jax.routing import RULES
from moe_jax.types import Topology

NUM_EXPERTS = 6
NUM_TOKENS = 18
NUM_SEQUENCES = 3


def choices_of(rule):
    """A K that the rule accepts."""
    return RULES[rule].only_choices or 3


def random_permutation(rule, seed):
    """A new order of the experts that the rule must not notice; rules with groups of experts keep these together."""
    rng = np.random.default_rng(seed)
    setting = inspect.signature(RULES[rule].choose).parameters.get("num_groups")
    groups = np.arange(NUM_EXPERTS).reshape(1 if setting is None else setting.default, -1)
    return np.concatenate([rng.permutation(group) for group in rng.permutation(groups)])


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
