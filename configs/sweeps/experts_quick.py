"""`configs/sweeps/experts.py` with 4 and 16 experts, two seeds and a tenth of the steps: shows the way, and no result.

Command:   python -m experiments.sweep --config=configs/sweeps/experts_quick.py
Hardware:  two CPU cores
"""

from ml_collections import ConfigDict

from configs.sweeps import experts


def get_config() -> ConfigDict:
    """The keys of `experts`."""
    config = experts.get_config()
    sizes, networks = config.space
    config.space = ((*sizes[:2], sizes[2], sizes[4]), networks)
    config.sweep.seeds = 2
    config.train.training.update({"steps": 60, "checkpoint_every": 30})
    return config
