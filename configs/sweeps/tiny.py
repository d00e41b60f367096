"""The learning rate and the number of experts in miniature, for tests and notebooks: numbers that mean nothing.

Command:   python -m experiments.sweep --config=configs/sweeps/tiny.py
Hardware:  one CPU core
"""

from ml_collections import ConfigDict

from configs.sweeps import learning_rate
from moe_jax.training.sweeps import choice, space


def get_config() -> ConfigDict:
    """Two axes of two values, two seeds, six steps."""
    config = learning_rate.get_config()
    config.sweep.update({"seeds": 2})
    config.space = space({"optimizer.learning_rate": choice(1e-3, 4e-3), "model.num_experts": choice(2, 4)})
    config.train.data.update({"python_bytes": 100_000, "sequence_length": 16, "batch_size": 4})
    config.train.model.update(
        {"width": 16, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 8, "layers": ("moe",), "context": 0}
    )
    config.train.training.update({"steps": 6, "checkpoint_every": 2})
    return config
