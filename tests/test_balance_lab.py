"""The balance laboratory: its stream, its measures, and that everything takes part."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from experiments.balance_lab import Sizes, all_methods, make_stream, measure, print_table, run_lab, steps_until_even
from moe_jax.report.pictures.balance import plot_balance_lab
from moe_jax.routing import BALANCERS, RULES, Rule
from moe_jax.types import Choice
from tests.synthetic_routing import draw_uniform_ids

SMALL = Sizes(steps=16, seeds=2, tokens=32, sequences=4, experts=8)


def even_rule(inputs, num_choices):
    """Deals the experts out in turn, whatever the logits."""
    num_tokens, num_experts = inputs.logits.shape
    ids = (jnp.arange(num_tokens * num_choices) % num_experts).reshape(num_tokens, num_choices)
    return Choice(ids, jnp.full(ids.shape, 0.5), jnp.full(inputs.logits.shape, 1 / num_experts))


@pytest.fixture(scope="module")
def result():
    """A tiny run, with a rule that needs no time to balance among the rules that compare tokens."""
    with pytest.MonkeyPatch.context() as patch, Progress(disable=True) as progress:
        patch.setitem(RULES, "even", Rule(even_rule, "this project", is_causal=False))
        return run_lab(SMALL, progress)


def test_the_stream_drifts_jumps_and_repeats():
    sizes = dataclasses.replace(SMALL, steps=200, tokens=400)
    stream = make_stream(sizes, 3)
    np.testing.assert_array_equal(stream, make_stream(sizes, 3))
    assert stream.shape == (200, 400, 8) and np.abs(stream - make_stream(sizes, 4)).max() > 1
    popularity = stream.mean(1)  # noise of the mean is 1/20
    change = np.abs(np.diff(popularity, axis=0)).max(1)
    assert change[99] > 1 and np.delete(change, 99).max() < 0.5
    # The first ranking is that of -log(1..8), centred: from 1.33 down to -0.75.
    np.testing.assert_allclose(np.sort(popularity[0])[::-1], -np.log(np.arange(1, 9)) + 1.3256, atol=0.2)


def test_steps_until_even_by_hand():
    # Windows of four: means .55, .35, .15 and .1. With chance .1 the first below .2 ends at step 6.
    violation = np.array([1.0, 0.8, 0.3, 0.1, 0.2, 0.0, 0.1])
    assert steps_until_even(violation, 0.1) == 6
    assert steps_until_even(violation + 0.2, 0.1) is None


def test_a_uniform_router_measures_as_chance():
    sizes = dataclasses.replace(SMALL, steps=400, tokens=256)
    rng = np.random.default_rng(0)
    ids = np.stack([[draw_uniform_ids(rng, 256, 8, 2) for _ in range(2)] for _ in range(400)])
    counts = (ids[..., None] == np.arange(8)).sum((2, 3))
    figures = measure(sizes, counts / counts.mean(-1, keepdims=True), np.zeros((400, 2)))
    assert figures["max_violation"] == pytest.approx(sizes.chance, rel=0.1)
    assert figures["swing"] == pytest.approx(1, rel=0.05)
    assert figures["settle"] == figures["recover"] == 4 and figures["recover_never"] == 0


def test_every_balancer_takes_part():
    kinds = [method.kind for method in all_methods(SMALL).values()]
    assert kinds.count("bias") + kinds.count("none") == len(BALANCERS)


def test_rows_traces_table_and_picture(result):
    rows, traces = result
    methods = {row["method"]: row for row in rows}
    assert all(np.isfinite(row["max_violation"]) and 0 <= row["moved"] <= 1 for row in rows)
    assert traces["bias by sign"].shape == (4, 16) and methods["no balance"]["moved"] == 0
    assert methods["no balance"]["recover_never"] == 2
    assert methods["even"]["max_violation"] == 0 and "recover" not in methods["even"]
    console = Console(record=True, width=140, quiet=True)
    print_table(rows, SMALL, console)
    figure = plot_balance_lab(rows, traces, chance=SMALL.chance, jump=SMALL.phase)
    figure.draw_without_rendering()
    drawn = sum(method["kind"] in ("bias", "loss") for method in methods.values())
    assert len(figure.axes) == drawn + 2
