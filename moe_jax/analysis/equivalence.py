"""Do all dispatch backends say the same, under every rule and in every awkward case? Measured, cell by cell.

A cell takes a rule, a backend and a condition, routes synthetic logits and compares output and gradients with those of
the `dense` backend for the same plan. The router's gradient goes through the rule's gates, so a wrong gate gradient
shows too. One's own rule or backend goes in as an entry of the mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.experts import SWIGLU
from moe_jax.routing import Rule, expert_capacity, route, rule_settings, single_topology
from moe_jax.types import Array, ArrayTree, DispatchFn, RouterOutput, RoutingPlan, Topology

NUM_TOKENS, NUM_EXPERTS, NUM_SEQUENCES, WIDTH, HIDDEN = 48, 6, 4, 8, 5
CONDITIONS = ("random", "drops", "empty experts", "one-hot load", "masked tokens", "ties", "bfloat16")


class Cell(NamedTuple):
    """One comparison; an error is the largest difference over the largest number of the reference.

    Attributes:
      rule: its name.
      backend: its name.
      condition: one of `CONDITIONS`.
      value_error: of the output.
      gradient_error: the worst of the gradients for tokens, router logits and expert parameters.
      is_conserved: statistics agree with the plan: what was chosen is kept or dropped, and kept is what the plan holds.
    """

    rule: str
    backend: str
    condition: str
    value_error: float
    gradient_error: float
    is_conserved: bool


def measure_equivalence(
    rules: Mapping[str, Rule], backends: Mapping[str, DispatchFn], *, num_choices: int = 2, seed: int = 0
) -> list[Cell]:
    """Fills the matrix: every rule under every condition on every backend.

    Args:
      rules: by name, such as `routing.RULES`.
      backends: by name, such as `dispatch.BACKENDS`.
      num_choices: K, for rules that do not insist on another.
      seed: of the synthetic logits, tokens and parameters.

    Returns:
      A cell for each combination; bfloat16 cells compare with float32 arithmetic on the same rounded inputs.
    """
    cells = []
    for rule_name, rule in rules.items():
        for condition in CONDITIONS:
            case = _Case(rule, rule.only_choices or num_choices, condition, seed)
            reference = case.run(BACKENDS["dense"], jnp.float32)
            dtype = jnp.bfloat16 if condition == "bfloat16" else jnp.float32
            for backend_name, backend in backends.items():
                value_error, *gradient_errors = map(_error, case.run(backend, dtype), reference)
                cell = (value_error, max(gradient_errors), case.is_conserved())
                cells.append(Cell(rule_name, backend_name, condition, *cell))
    return cells


class _Case:
    """A routed batch with what is needed to run backends on it."""

    def __init__(self, rule: Rule, num_choices: int, condition: str, seed: int):
        """Draws the inputs and routes."""
        self.num_true = NUM_EXPERTS - rule_settings(rule).get(
            "num_null", 0
        )  # null choices are neither kept nor dropped
        rng = np.random.default_rng(seed)
        logits = 2.0 * rng.normal(size=(NUM_TOKENS, NUM_EXPERTS))
        self.tokens = rng.normal(size=(NUM_TOKENS, WIDTH))
        self.params = {
            "w_in": rng.normal(size=(NUM_EXPERTS, WIDTH, 2 * HIDDEN)),
            "w_out": rng.normal(size=(NUM_EXPERTS, HIDDEN, WIDTH)),
        }
        self.cotangent = rng.normal(size=(NUM_TOKENS, WIDTH))
        mask, keep, capacity = np.ones(NUM_TOKENS, bool), np.ones((1, NUM_EXPERTS), bool), None
        if condition == "drops":
            capacity = expert_capacity(NUM_TOKENS, NUM_EXPERTS, num_choices, 0.75)
        elif condition == "empty experts":
            keep[:, [1, 4]] = False
        elif condition == "one-hot load":
            logits[:, 2] += 30.0
        elif condition == "masked tokens":
            mask[::3] = False
            self.tokens[::3] = np.nan  # padding may hold anything
        elif condition == "ties":
            logits[:] = 0.0
        layer = jax.tree.map(lambda leaf: leaf[0], single_topology(jnp.asarray(keep), jnp.array([NUM_EXPERTS])))
        token_ids = jnp.asarray(rng.integers(0, 100, NUM_TOKENS), jnp.int32)
        arguments = (jnp.asarray(logits, jnp.float32), layer, jnp.asarray(mask), token_ids)
        self.output, self.logits_grad_of = _route(rule, num_choices, capacity, *arguments)

    def run(self, backend: DispatchFn, dtype: jnp.dtype) -> tuple[ArrayTree, ...]:
        """Output, and gradients for tokens, logits and parameters; inputs are rounded to bfloat16 in any case."""
        tokens, params, cotangent = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.bfloat16).astype(dtype), (self.tokens, self.params, self.cotangent)
        )
        plan = self.output.plan
        assert plan is not None  # route always makes one
        shape = (plan.num_experts, plan.capacity)
        value, tokens_grad, gates_grad, params_grad = _dispatch(
            backend, shape, tokens, plan.expert_ids, plan.gates, params, cotangent
        )
        is_token = ~np.isnan(self.tokens)  # what a masked token's own gradient is does not matter
        (logits_grad,) = self.logits_grad_of(gates_grad)
        return value, jnp.where(is_token, tokens_grad, 0), logits_grad, params_grad

    def is_conserved(self) -> bool:
        """Whether the statistics tell what the plan does."""
        stats, plan = self.output.stats, self.output.plan
        assert stats is not None and plan is not None
        kept = np.bincount(np.asarray(plan.expert_ids).ravel(), minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS]
        lost = float((stats.chosen - stats.kept)[: self.num_true].sum())
        is_dropped = abs(lost - float(stats.dropped_capacity)) < 0.5
        return bool((np.asarray(stats.kept) == kept).all()) and is_dropped


@partial(jax.jit, static_argnums=(0, 1, 2))
def _route(
    rule: Rule,
    num_choices: int,
    capacity: int | None,
    logits: Array,
    topology: Topology,
    token_mask: Array,
    token_ids: Array,
) -> tuple[RouterOutput, Callable[[Array], tuple[Array]]]:
    """The routing, and the map from gradients of the gates to gradients of the logits."""

    def gates_of(logits: Array) -> tuple[Array, RouterOutput]:
        output = route(
            logits,
            rule,
            num_choices=num_choices,
            topology=topology,
            token_mask=token_mask,
            token_ids=token_ids,
            num_sequences=NUM_SEQUENCES,
            capacity=capacity,
        )
        assert isinstance(output.plan, RoutingPlan)
        return output.plan.gates, output

    _, pull_back, output = jax.vjp(gates_of, logits, has_aux=True)
    return output, pull_back


@partial(jax.jit, static_argnums=(0, 1))
def _dispatch(
    backend: DispatchFn,
    shape: tuple[int, int | None],
    tokens: Array,
    expert_ids: Array,
    gates: Array,
    params: ArrayTree,
    cotangent: Array,
) -> tuple[Array, Array, Array, ArrayTree]:
    """Output `[T, D]` and the gradients for tokens, gates and parameters; shape is (E, capacity)."""

    def run(tokens: Array, gates: Array, params: ArrayTree) -> Array:
        return backend(tokens, RoutingPlan(expert_ids, gates, *shape), SWIGLU, params)

    value, pull_back = jax.vjp(run, tokens, gates, params)
    return value, *pull_back(cotangent)


def _error(result: ArrayTree, reference: ArrayTree) -> float:
    """Largest difference over the largest number of the reference; infinite where one of them is not finite."""

    def flat(tree: ArrayTree) -> np.ndarray:
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

    a, b = flat(result), flat(reference)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    size = np.abs(b).max()
    return float(np.abs(a - b).max() / (size if size > 0 else 1.0))
