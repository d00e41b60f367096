"""Drops, recorded traces and the summary that the routing report is made of."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import analysis
from moe_jax.types import RouterOutput, RouterStats, RoutingPlan
from tests.synthetic_routing import make_documents


def router_stats(num_layers=2, kept=6.0, capacity=3.0, topology=1.0):
    layers = jnp.ones(num_layers)
    vector = jnp.full((num_layers, 2), kept / 2)
    lost = (layers * capacity, layers * topology)
    return RouterStats(vector, vector, vector, layers, layers, *lost, layers * 5, layers * 0, vector, vector)


def test_drop_rates_by_cause():
    rates = analysis.drop_rates(router_stats())
    np.testing.assert_allclose(np.stack(rates)[:, 0], [0.6, 0.3, 0.1])
    assert np.isnan(np.stack(analysis.drop_rates(router_stats(kept=0.0, capacity=0.0, topology=0.0)))).all()


def test_empty_slots_by_position():
    expert_ids = np.array([[[0, 1], [0, 2], [2, 2], [1, 2]]])  # 2 is the sentinel
    by_position = analysis.empty_slots_by_position(expert_ids, [0, 1, 0, 1], 2, 3)
    np.testing.assert_array_equal(by_position, [[0.5, 0.5, np.nan]])
    masked = analysis.empty_slots_by_position(expert_ids, [0, 1, 0, 1], 2, 3, [True, True, False, True])
    np.testing.assert_array_equal(masked, [[0.0, 0.5, np.nan]])


def make_trace(rng, effect=1.0, num_masked=10):
    expert_ids, domain, document, token_ids = make_documents(rng, num_documents=12, length=30, effect=effect)
    num_tokens = len(domain)
    logits = rng.normal(size=(1, num_tokens, 6)).astype(np.float32)
    plan = RoutingPlan(jnp.asarray(expert_ids, jnp.int32), jnp.full((1, num_tokens, 2), 0.5), 6, None)
    mask = np.arange(num_tokens) < num_tokens - num_masked
    return analysis.trace_routing(
        RouterOutput(plan=plan, logits=jnp.asarray(logits), stats=None),
        token_ids=token_ids,
        token_mask=mask,
        position=np.arange(num_tokens) % 30,
        domain=np.where(mask, domain, 0),
        document=np.where(mask, document, 0),
        domain_names=("speech", "novel", "code"),
    )


def test_trace_round_trips_and_joins(tmp_path, rng):
    trace = make_trace(rng)
    path = tmp_path / "traces" / "routing.npz"
    analysis.save_trace(path, trace)
    loaded = analysis.load_trace(path)
    assert (loaded.num_experts, loaded.domain_names) == (6, ("speech", "novel", "code"))
    np.testing.assert_array_equal(loaded.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(loaded.margin, trace.margin)
    assert [p.name for p in path.parent.iterdir()] == ["routing.npz"]
    joined = analysis.join_traces([trace, loaded])
    assert joined.entropy.shape == (1, 720)
    assert joined.document.shape == (720,)


def test_trace_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match='level "full"'):
        analysis.trace_routing(
            RouterOutput(plan=None, logits=None, stats=None),
            token_ids=[],
            token_mask=[],
            position=[],
            domain=[],
            document=[],
            domain_names=[],
        )
    np.savez(tmp_path / "other.npz", expert_ids=np.zeros(3))
    with pytest.raises(ValueError, match="lacks gates, entropy"):
        analysis.load_trace(tmp_path / "other.npz")


def test_summary_is_strict_json_and_agrees_with_its_parts(rng):
    trace = make_trace(rng)
    summary = analysis.summarise_routing(trace, router_stats(1), num_shuffles=50)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    layer = summary["layers"][0]
    counts = analysis.expert_counts(trace.expert_ids, 6, trace.token_mask)
    assert layer["counts"] == counts[0].tolist()
    assert sum(layer["counts"]) == summary["num_tokens"] * 2 == 700
    assert layer["gini"] == pytest.approx(float(analysis.gini(counts)[0]))
    assert layer["domain_information"]["p_value"] == pytest.approx(1 / 51)
    assert layer["drops"] == pytest.approx({"kept": 0.6, "capacity": 0.3, "topology": 0.1})
    assert layer["router_entropy"]["estimate"] == pytest.approx(float(trace.entropy[0, trace.token_mask].mean()))


def test_masked_tokens_do_not_reach_the_summary(rng):
    trace = make_trace(rng)
    poisoned = analysis.without_masked_tokens(trace)
    assert analysis.summarise_routing(poisoned, num_shuffles=5) == analysis.summarise_routing(trace, num_shuffles=5)


def test_summary_of_nothing_says_so(rng):
    trace = make_trace(rng, num_masked=360)
    layer = analysis.summarise_routing(trace, num_shuffles=5)["layers"][0]
    assert layer["gini"] is None
    assert layer["verdicts"] == ["unknown"] * 6
    assert layer["domain_load"] == [[None] * 6] * 3
