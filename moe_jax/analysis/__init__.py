"""Statistics of routing, from recorded traces and from sum-form statistics.

`trace_routing` keeps what a model's routers did, `summarise_routing` computes the whole routing report; the parts are
pure functions on arrays: `load` (balance and its noise band), `confidence`, `specialisation` (against shuffled
controls), `coactivation`, `drops`, `intervals`. Instruments ask further: `causality`, whether a router looks at the
future; `flips`, where two runs began to route differently; `plans` keeps a routing to be edited and replayed.
"""

from moe_jax.analysis.causality import CausalityAudit, Leak, audit_causality
from moe_jax.analysis.coactivation import coactivation_counts, coactivation_lift, conditional_coactivation
from moe_jax.analysis.confidence import (
    boundary_margin,
    fraction_within_margin,
    router_entropy,
    token_mean,
    token_quantiles,
    top_probability,
)
from moe_jax.analysis.counts import expert_counts, group_expert_counts
from moe_jax.analysis.drops import DropRates, drop_rates, empty_slots_by_position
from moe_jax.analysis.flips import RoutingFlips, find_flips
from moe_jax.analysis.intervals import (
    Interval,
    document_mean,
    paired_permutation_test,
    sign_test,
    t_interval,
    verdict,
    win_rate,
)
from moe_jax.analysis.load import (
    Imbalance,
    coefficient_of_variation,
    dead_expert_verdicts,
    document_load_interval,
    effective_experts,
    expected_imbalance,
    gini,
    jain_fairness,
    load_fractions,
    max_over_mean_load,
    max_violation,
    normalised_load_entropy,
    uniform_load_band,
)
from moe_jax.analysis.plans import check_plan, load_plan, save_plan
from moe_jax.analysis.specialisation import (
    InformationTest,
    conditional_domain_information,
    domain_information,
    domain_specialisation,
    miller_madow_bias,
    mutual_information,
)
from moe_jax.analysis.summary import summarise_routing
from moe_jax.analysis.trace import (
    RoutingTrace,
    join_traces,
    load_trace,
    save_trace,
    trace_routing,
    without_masked_tokens,
)

__all__ = [
    "CausalityAudit",
    "DropRates",
    "Imbalance",
    "InformationTest",
    "Interval",
    "Leak",
    "RoutingFlips",
    "RoutingTrace",
    "audit_causality",
    "boundary_margin",
    "check_plan",
    "coactivation_counts",
    "coactivation_lift",
    "coefficient_of_variation",
    "conditional_coactivation",
    "conditional_domain_information",
    "dead_expert_verdicts",
    "document_load_interval",
    "document_mean",
    "domain_information",
    "domain_specialisation",
    "drop_rates",
    "effective_experts",
    "empty_slots_by_position",
    "expected_imbalance",
    "expert_counts",
    "find_flips",
    "fraction_within_margin",
    "gini",
    "group_expert_counts",
    "jain_fairness",
    "join_traces",
    "load_fractions",
    "load_plan",
    "load_trace",
    "max_over_mean_load",
    "max_violation",
    "miller_madow_bias",
    "mutual_information",
    "normalised_load_entropy",
    "paired_permutation_test",
    "router_entropy",
    "save_plan",
    "save_trace",
    "sign_test",
    "summarise_routing",
    "t_interval",
    "token_mean",
    "token_quantiles",
    "top_probability",
    "trace_routing",
    "uniform_load_band",
    "verdict",
    "win_rate",
    "without_masked_tokens",
]
