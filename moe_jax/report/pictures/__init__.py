"""Pictures of a run: each function takes arrays and returns a matplotlib `Figure`, without pyplot or global state."""

from moe_jax.report.pictures.routing import (
    plot_domain_information,
    plot_drops,
    plot_load,
    plot_margins,
    plot_specialisation,
)
from moe_jax.report.pictures.search import plot_comparison, plot_front, plot_masks, plot_search_curves
from moe_jax.report.pictures.sweep import plot_sweep
from moe_jax.report.pictures.training import plot_heal, plot_training

__all__ = [
    "plot_comparison",
    "plot_domain_information",
    "plot_drops",
    "plot_front",
    "plot_heal",
    "plot_load",
    "plot_margins",
    "plot_masks",
    "plot_search_curves",
    "plot_specialisation",
    "plot_sweep",
    "plot_training",
]
