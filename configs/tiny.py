"""The main job in miniature, for tests and notebooks: seconds instead of minutes, and numbers that mean nothing.

Command:   python -m experiments.evolve_topology --config=configs/tiny.py
Hardware:  one CPU core
"""

from ml_collections import ConfigDict

from configs import evolve_topology


def get_config() -> ConfigDict:
    """The main job's keys with small values."""
    config = evolve_topology.get_config()
    config.data.update({"python_bytes": 100_000, "sequence_length": 32, "batch_size": 8})
    config.model.update(
        {"width": 32, "num_heads": 2, "num_kv_heads": 1, "dense_hidden": 32, "num_experts": 6, "expert_hidden": 8}
    )
    config.training.update({"steps": 30, "checkpoint_every": 10, "heal_steps": 5})
    # The splits' samples have one size, so that the objectives are compiled once.
    config.evolution.update(
        {
            "population": 8,
            "generations": 2,
            "chunk": 2,
            "seeds": 2,
            "search_per_domain": 2,
            "selection_per_domain": 2,
            "front_per_domain": 2,
        }
    )
    return config
