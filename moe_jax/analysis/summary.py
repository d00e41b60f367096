"""The routing report: every statistic of a trace as one nested dictionary that JSON can hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_jax.analysis import load
from moe_jax.analysis.coactivation import coactivation_counts, coactivation_lift
from moe_jax.analysis.confidence import fraction_within_margin, token_mean, token_quantiles
from moe_jax.analysis.counts import group_expert_counts
from moe_jax.analysis.drops import drop_rates, empty_slots_by_position
from moe_jax.analysis.intervals import document_mean
from moe_jax.analysis.specialisation import (
    InformationTest,
    conditional_domain_information,
    domain_information,
    domain_specialisation,
    miller_madow_bias,
)
from moe_jax.analysis.trace import RoutingTrace, without_masked_tokens
from moe_jax.types import RouterStats

MARGIN_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
_NUM_PAIRS = 3


def summarise_routing(
    trace: RoutingTrace,
    stats: RouterStats | None = None,
    *,
    flip_margin: float = 0.1,
    num_position_bins: int = 16,
    num_shuffles: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Summarises recorded routing, all intervals at 95 %.

    Args:
      trace: recorded routing.
      stats: sums with leading `[L]` over the same tokens; gives the drops by cause, which ids alone cannot tell.
      flip_margin: logit margin below which a choice counts as fragile.
      num_position_bins: bins of the sequence for the empty slots by position.
      num_shuffles: shuffles of each specialisation control.
      seed: seed of bootstrap and shuffles.

    Returns:
      `{"num_tokens", "num_documents", "num_experts", "num_choices", "domains", "flip_margin", "num_shuffles",
      "uniform": {"load_band": [low, high], "coefficient_of_variation", "gini", "max_violation"}, "layers": [...]}`
      with one mapping per layer, as `_summarise_layers` builds. Loads are shares of all assignments; information is
      in nats. Values that the data do not define are None.
    """
    trace = without_masked_tokens(trace)
    num_experts = trace.num_experts
    num_layers, num_tokens, num_choices = trace.expert_ids.shape
    low, high = load.uniform_load_band(num_tokens, num_experts, num_choices, num_layers=num_layers)
    slots = max(num_tokens * num_choices, 1)
    expected = load.expected_imbalance(max(num_tokens, 1), num_experts, num_choices)
    summary = {
        "num_tokens": num_tokens,
        "num_documents": len(np.unique(trace.document)),
        "num_experts": num_experts,
        "num_choices": num_choices,
        "domains": list(trace.domain_names),
        "flip_margin": flip_margin,
        "num_shuffles": num_shuffles,
        "uniform": {"load_band": [low / slots, high / slots], **expected._asdict()},
        "layers": _summarise_layers(trace, stats, flip_margin, num_position_bins, num_shuffles, seed, (low, high)),
    }
    return _finite(summary)


def _summarise_layers(
    trace: RoutingTrace,
    stats: RouterStats | None,
    flip_margin: float,
    num_position_bins: int,
    num_shuffles: int,
    seed: int,
    band: tuple[int, int],
) -> list[dict[str, Any]]:
    """One mapping per layer."""
    num_experts, num_domains = trace.num_experts, len(trace.domain_names)
    num_layers, num_tokens, num_choices = trace.expert_ids.shape
    documents, document = np.unique(trace.document, return_inverse=True)
    document_counts = group_expert_counts(trace.expert_ids, document, num_experts, len(documents))
    document_domain = np.zeros(len(documents), np.int64)
    document_domain[document] = trace.domain
    counts = document_counts.sum(0)  # [L, E]
    share_low, share_high = load.document_load_interval(document_counts, seed=seed)
    verdicts = load.dead_expert_verdicts(counts, num_tokens, num_choices)
    domain_load = domain_specialisation(trace.expert_ids, trace.domain, num_experts, num_domains)
    domain_counts = group_expert_counts(trace.expert_ids, trace.domain, num_experts, num_domains)
    bias = miller_madow_bias(domain_counts.transpose(1, 0, 2))
    by_domain = domain_information(document_counts, document_domain, num_domains, num_shuffles=num_shuffles, seed=seed)
    given_token = conditional_domain_information(
        trace.expert_ids,
        trace.domain,
        document,
        trace.token_ids,
        num_experts,
        num_shuffles=num_shuffles,
        seed=seed,
    )
    quantiles = token_quantiles(trace.margin, MARGIN_LEVELS)
    fragile = fraction_within_margin(trace.margin, flip_margin)
    top = token_mean(trace.top_probability)
    lift = coactivation_lift(coactivation_counts(trace.expert_ids, num_experts))
    length = int(trace.position.max(initial=0)) + 1
    bins = trace.position * num_position_bins // length
    empty = empty_slots_by_position(trace.expert_ids, bins, num_experts, num_position_bins)
    drops = None if stats is None else drop_rates(stats)
    return [
        {
            "layer": i,
            "counts": counts[i],
            "load": load.load_fractions(counts[i]),
            "load_interval": [share_low[i], share_high[i]],
            "experts_outside_band": int(((counts[i] < band[0]) | (counts[i] > band[1])).sum()),
            "verdicts": verdicts[i],
            "coefficient_of_variation": load.coefficient_of_variation(counts[i]),
            "gini": load.gini(counts[i]),
            "max_violation": load.max_violation(counts[i]),
            "normalised_load_entropy": load.normalised_load_entropy(counts[i]),
            "effective_experts": load.effective_experts(counts[i]),
            "jain_fairness": load.jain_fairness(counts[i]),
            "router_entropy": document_mean(trace.entropy[i], trace.document, seed=seed)._asdict(),
            "top_probability": top[i],
            "margin_quantiles": dict(zip(map(str, MARGIN_LEVELS), quantiles[i], strict=True)),
            "fraction_within_flip_margin": fragile[i],
            "domain_load": domain_load[i],
            "domain_information": _information(by_domain, i) | {"miller_madow": by_domain.information[i] - bias[i]},
            "domain_information_given_token": _information(given_token, i),
            "top_pairs": _top_pairs(lift[i]),
            "drops": None if drops is None else {name: rate[i] for name, rate in drops._asdict().items()},
            "empty_slots_by_position": empty[i],
        }
        for i in range(num_layers)
    ]


def _information(test: InformationTest, layer: int) -> dict[str, float]:
    """One layer of a test."""
    return {name: values[layer] for name, values in test._asdict().items()}


def _top_pairs(lift: np.ndarray) -> list[dict[str, Any]]:
    """The pairs `i < j` of `[E, E]` lifts that are chosen together most beyond chance."""
    rows, columns = np.triu_indices(len(lift), 1)
    values = np.nan_to_num(lift[rows, columns], nan=0.0)
    order = np.argsort(-values, kind="stable")[:_NUM_PAIRS]
    return [{"experts": [int(rows[i]), int(columns[i])], "lift": float(values[i])} for i in order]


def _finite(value: Any) -> Any:
    """Turns arrays into lists and numbers that JSON lacks (NaN, infinities) into None, recursively."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    plain = np.asarray(value).tolist()
    if isinstance(plain, list):
        return _finite(plain)
    return plain if not isinstance(plain, float) or math.isfinite(plain) else None
