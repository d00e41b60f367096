"""The tournament with one seed and a few steps: minutes, most of them compiling, and no conclusions.

Command:   python -m experiments.router_tournament --config=configs/router_tournament_quick.py
Hardware:  two CPU cores
"""

from ml_collections import ConfigDict

from configs import router_tournament


def get_config() -> ConfigDict:
    """The tournament's keys with smaller values."""
    config = router_tournament.get_config()
    config.seeds, config.steps = 1, 20
    return config
