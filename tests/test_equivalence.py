"""The equivalence matrix finds what is wrong, finds nothing wrong here, and its page is complete."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch
from moe_jax.analysis.equivalence import CONDITIONS, measure_equivalence
from moe_jax.dispatch import BACKENDS, dispatch_dense
from moe_jax.routing import RULES, Rule, select_top_k
from moe_jax.types import Choice

TABLE = (pathlib.Path(dispatch.__file__).parent / "EQUIVALENCE.md").read_text()


@pytest.mark.parametrize("rule", ["softmax_top_k", "switch_top_1"])
def test_all_backends_agree(rule):
    cells = measure_equivalence({rule: RULES[rule]}, BACKENDS, seed=1)
    assert {(cell.backend, cell.condition) for cell in cells} == {(b, c) for b in BACKENDS for c in CONDITIONS}
    for cell in cells:
        # Summing a few float32 numbers in another order; bfloat16 keeps 8 bits, and three matmuls' rounding adds up.
        tolerance = 3e-2 if cell.condition == "bfloat16" else 2e-6
        assert max(cell.value_error, cell.gradient_error) < tolerance and cell.is_conserved, cell


def test_a_wrong_backend_is_found_by_value_and_by_gradient():
    def gates_forgotten(tokens, plan, expert, params):
        return dispatch_dense(tokens, plan, expert, params).at[0].mul(2.0)

    def no_gate_gradient(tokens, plan, expert, params):
        constant = dataclasses.replace(plan, gates=jax.lax.stop_gradient(plan.gates))
        return dispatch_dense(tokens, constant, expert, params)

    wrong = {"value": gates_forgotten, "gradient": no_gate_gradient}
    cells = measure_equivalence({"softmax_top_k": RULES["softmax_top_k"]}, wrong)
    by_name = {cell.backend: cell for cell in cells if cell.condition == "random"}
    assert by_name["value"].value_error > 1e-3
    assert by_name["gradient"].value_error < 1e-6 and by_name["gradient"].gradient_error > 0.1


def test_a_rule_that_breaks_its_promise_is_found():
    def overbooked(inputs, num_choices):
        """Promises one token per expert and sends them all to expert 0."""
        ids = select_top_k(jnp.ones_like(inputs.logits), 1, inputs.is_open, None)
        return Choice(ids, jnp.ones(ids.shape), jnp.full(inputs.logits.shape, 1 / 6), capacity=1)

    backends = {name: BACKENDS[name] for name in ("dense", "gather")}
    cells = measure_equivalence({"overbooked": Rule(overbooked, "this project")}, backends)
    errors = {cell.backend: cell.value_error for cell in cells if cell.condition == "random"}
    assert errors["dense"] < 1e-6 and errors["gather"] > 0.1


def test_the_page_has_every_rule_backend_and_condition():
    rows = [line.split("|")[1].strip() for line in TABLE.splitlines() if line.startswith("|")]
    assert set(RULES) | set(CONDITIONS) <= set(rows), "run python -m experiments.equivalence_matrix"
    assert all(f"`{backend}`" in TABLE for backend in BACKENDS)
    assert "contradict the plan: 0 of" in TABLE
    errors = [float(number) for number in re.findall(r"(?<=\| )\d\S*e\S+", TABLE)]
    assert len(errors) == (len(RULES) + len(CONDITIONS)) * len(BACKENDS) and np.max(errors) < 3e-2
