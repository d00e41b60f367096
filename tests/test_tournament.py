"""The tournament's contestants are the causal rules at equal active FLOPs, and its measures are right."""

import numpy as np
import pytest

from configs import router_tournament, router_tournament_quick
from experiments.router_tournament import DENSE, entries_of, measure_routing
from moe_jax.models.cost import model_cost
from moe_jax.routing import RULES


def test_every_causal_rule_plays_once_and_so_does_the_dense_twin():
    entries = entries_of(router_tournament.get_config())
    assert sorted(e.model.rule for e in entries if e.name != DENSE) == sorted(r for r in RULES if RULES[r].is_causal)
    assert [e.name for e in entries if "moe" not in e.model.layers] == [DENSE]


def test_active_flops_are_equal():
    """Up to the router's, and to the variable counts of rules that are steered towards the same mean."""
    config = router_tournament.get_config()
    entries = {entry.name: entry for entry in entries_of(config)}
    for name, entry in entries.items():
        if name == "fixed_threshold":
            continue  # nothing steers it
        choices = None if name == DENSE else [_target(entry)] * entry.model.num_moe_layers
        flops = model_cost(entry.model, config.data.sequence_length, choices).flops
        reference = model_cost(entries[config.reference].model, config.data.sequence_length).flops
        assert flops == pytest.approx(reference, rel=0.02), name  # two routers are twice as wide


def _target(entry):
    """Experts a token that the rule gives, is steered to, or has when true and null experts are equally loaded."""
    settings, model = entry.model.rule_settings, entry.model
    num_true = model.num_experts - settings.get("num_null", 0)
    return settings.get("target", model.num_choices * num_true / model.num_experts)


def test_routing_measures_by_hand():
    # Two tokens, three experts: before (0, 1) and (2, -), after (0, 1) and (1, -). Assignments in common:
    # 2 of the 4 in either, so the churn is 1/2. Loads after: 1, 2, 0 of mean 1, so MaxVio is 1; room for 1.25 drops
    # 0.75 of 3.
    before, after = np.array([[[0, 1], [2, 3]]]), np.array([[[0, 1], [1, 3]]])
    measured = measure_routing([before, after], 3)
    assert measured == pytest.approx({"choices": 1.5, "max_violation": 1.0, "over_capacity": 0.25, "churn": 0.5})
    assert measure_routing([before, np.full((1, 2, 2), 3)], 3) == {"choices": 0.0}  # a rule that starves every token


def test_the_quick_tournament_is_a_part_of_the_whole():
    full, quick = router_tournament.get_config(), router_tournament_quick.get_config()
    changed = [key for key in full if full[key] != quick[key]]
    assert sorted(changed) == ["entries", "seeds", "steps"]
    assert all(quick.entries[name] == full.entries[name] for name in quick.entries)
