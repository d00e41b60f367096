"""The tournament with eight contestants, one seed and a few steps: most of it is compiling, and it shows nothing.

Command:   python -m experiments.router_tournament --config=configs/router_tournament_quick.py
Hardware:  two CPU cores
Time:      3 minutes
"""

from ml_collections import ConfigDict

from configs import router_tournament

CONTESTANTS = (
    "softmax_top_k_renormalized",
    "sigmoid_top_k",
    "switch_top_1",
    "threshold",
    "relu",
    "hash",
    "random",
    "dense twin",
)


def get_config() -> ConfigDict:
    """The tournament's keys with smaller values."""
    config = router_tournament.get_config()
    config.seeds, config.steps = 1, 20
    config.entries = ConfigDict({name: config.entries[name] for name in CONTESTANTS})
    return config
