"""The training script in miniature, for tests: seconds of work, and numbers that mean nothing.

Command:   python -m experiments.train --config=configs/tiny_train.py
Hardware:  one CPU core
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """The settings of `configs/tiny.py` for one of its domains and a single layer of four experts."""
    small = tiny.get_config()
    config = ConfigDict({"seed": 0})
    config.data, config.model, config.optimizer, config.loss = small.data, small.model, small.optimizer, small.loss
    config.data.update({"domains": ("python",), "python_bytes": 100_000, "domain_weights": ()})
    config.model.update({"layers": ("moe",), "num_experts": 4, "backend": "gather"})
    config.optimizer.heal_fraction = 0.0
    config.training = ConfigDict({"steps": 20, "checkpoint_every": 5})
    config.mesh = ConfigDict({"data": 1, "expert": 1, "tensor": 1})
    return config
