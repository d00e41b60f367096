"""Capacity in each unit and over each group of tokens, and what a dropped token gets: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers import LinearRouter
from moe_jax.routing import RULES, Capacity, drop_over_capacity, route


def test_rows_by_hand():
    # 10 tokens, 4 experts, 2 choices
    assert Capacity(1.25).rows(10, 4, 2) == 7  # ceil(1.25 * 10 * 2 / 4)
    assert Capacity(0.25, "share").rows(10, 4, 2) == 3  # ceil(2.5)
    assert Capacity(1.0, "share").rows(10, 4, 2) == 10
    assert Capacity(64, "tokens").rows(10, 4, 2) == 10  # never more than T
    assert Capacity(3, "tokens").rows(10, 4, 2) == 3
    assert Capacity(0.01, "share").rows(10, 4, 2) == 1


@pytest.mark.parametrize("unit", ["balance", "share", "tokens", "litres"])
def test_amounts_and_units_without_meaning_are_refused(unit):
    with pytest.raises(ValueError, match="capacity"):
        Capacity(1 if unit == "litres" else 0, unit).rows(10, 4, 2)


def test_groups_are_served_by_themselves():
    ids = jnp.array([[0], [0], [1], [0], [0], [0]], jnp.int32)
    np.testing.assert_array_equal(drop_over_capacity(ids, 2, 2)[:, 0], [0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(drop_over_capacity(ids, 2, 2, num_groups=2)[:, 0], [0, 0, 1, 0, 0, 2])
    # In the second group the last token is the most important one.
    priority = jnp.array([1.0, 2.0, 3.0, 2.0, 1.0, 3.0])
    kept = drop_over_capacity(ids, 2, 1, priority, num_groups=2)
    np.testing.assert_array_equal(kept[:, 0], [2, 0, 1, 2, 2, 0])


def test_the_plan_promises_the_capacity_of_all_groups():
    logits = jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (8, 1))
    plan = route(logits, RULES["switch_top_1"], num_choices=1, capacity=1, capacity_groups=4).plan
    np.testing.assert_array_equal(plan.expert_ids[:, 0], [0, 3] * 4)
    assert plan.capacity == 4
    again = route(logits, RULES["switch_top_1"], num_choices=1, capacity=1, capacity_groups=4, forced=plan)
    np.testing.assert_array_equal(again.plan.expert_ids, plan.expert_ids)
    assert again.plan.capacity == 4 and again.stats.dropped_capacity == 0
    with pytest.raises(ValueError, match="capacity_groups=3 does not divide the 8 tokens"):
        route(logits, RULES["switch_top_1"], num_choices=1, capacity=1, capacity_groups=3)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_switch_drops_what_comes_late_in_its_own_sequence(backend):
    """All tokens want expert 0, which takes two of each sequence; the rest gets nothing, padding takes no place."""
    layer = MoELayer(
        LinearRouter(4, 3, key=jax.random.key(0)),
        ExpertStack(3, 4, 5, kind="mlp", key=jax.random.key(1)),
        num_choices=1,
        rule="switch_top_1",
        backend=backend,
        capacity=Capacity(2, "tokens", per_sequence=True),
    )
    layer.router.kernel[...] = jnp.zeros((4, 3)).at[0, 0].set(5.0)
    x = jnp.abs(jax.random.normal(jax.random.key(2), (2, 4, 4))) + 0.1
    mask = jnp.array([[True] * 4, [False, True, True, True]])
    y, routed = jax.jit(lambda x, mask: layer(x, mask))(x, mask)
    np.testing.assert_array_equal(routed.plan.expert_ids[:, 0], [0, 0, 3, 3, 3, 0, 0, 3])
    assert routed.stats.dropped_capacity == 3 and routed.stats.num_masked == 1
    is_served = np.array([[True, True, False, False], [False, True, True, False]])
    assert (np.abs(y).max(-1) > 0).tolist() == is_served.tolist()
    # A served token gets its expert's output times the router's probability (2101.03961, eq. 2).
    hidden = x[0, 1] @ layer.experts.w_in[0]
    expected = jax.nn.softmax(x[0, 1] @ layer.router.kernel[...])[0] * (
        jax.nn.gelu(hidden, approximate=False) @ layer.experts.w_out[0]
    )
    np.testing.assert_allclose(y[0, 1], expected, atol=1e-5)


def test_a_layer_has_one_capacity():
    with pytest.raises(ValueError, match=r"give capacity_factor=1.0 or capacity=Capacity.*not both"):
        MoELayer(
            LinearRouter(4, 3, key=jax.random.key(0)),
            ExpertStack(3, 4, 5, key=jax.random.key(1)),
            num_choices=1,
            capacity_factor=1.0,
            capacity=Capacity(2, "tokens"),
        )
