"""The learning rate of the small model of `configs/train.py`, three seeds at each of five values.

Command:   python -m experiments.sweep
           python -m experiments.sweep --engine=vmap --config.launch.workers=15
Hardware:  two CPU cores
"""

from ml_collections import ConfigDict

from configs import train
from moe_jax.training.sweeps import choice, space


def get_config() -> ConfigDict:
    """`space` has the axes, `train` the configuration that they change, `launch` what an engine needs."""
    config = ConfigDict({"seed": 0})
    config.sweep = ConfigDict(
        {
            "method": "grid",
            "points": 0,
            "seeds": 3,
            "prune": "none",
            "prune_after": 1,
            "prune_factor": 3,
            "reference": (),
        }
    )
    config.space = space({"optimizer.learning_rate": choice(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)})
    config.train = train.get_config()
    config.train.data.update({"sequence_length": 64, "batch_size": 8})
    config.train.model.update({"width": 64, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 64})
    config.train.training.update({"steps": 200, "checkpoint_every": 50})
    config.launch = ConfigDict(
        {
            "workers": 4,
            "retries": 2,
            "cpus": 1,
            "gpus": 0,
            "ray_address": "",
            "slurm_cluster": "slurm",
            "slurm_minutes": 120,
            "slurm_partition": "",
            "slurm_memory_gb": 8,
            "slurm_setup": "",
        }
    )
    return config
