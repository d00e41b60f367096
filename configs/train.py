"""A small mixture of experts on the text that comes with the package.

Command:   python -m experiments.train
Hardware:  two CPU cores
"""

from ml_collections import ConfigDict

from configs import evolve_topology


def get_config() -> ConfigDict:
    """The main job's text and settings, with eight experts in each of two layers."""
    main = evolve_topology.get_config()
    config = ConfigDict({"seed": 0})
    config.data, config.model, config.optimizer, config.loss = main.data, main.model, main.optimizer, main.loss
    config.data.update({"tables": (), "hf": (), "max_bytes_per_domain": None})
    config.model.update({"layers": ("moe", "moe"), "num_experts": 8, "expert_hidden": 128})
    config.optimizer.heal_fraction = 0.0
    config.optimizer.update({"learning_rate": 4e-3, "warmup_steps": 50, "weight_decay": 0.1})
    config.data.update({"tables": (), "hf": (), "max_bytes_per_domain": None, "domain_temperature": None})
    config.data.update({"tokenizer": "", "packing": "crop", "workers": 0})
    config.optimizer.update({"schedule": "cosine", "average_decay": 0.0, "groups": ()})
    config.training = ConfigDict({"steps": 600, "checkpoint_every": 100, "spikes": None})
    config.tracking = ConfigDict({"tensorboard": False, "mlflow": False, "wandb": False, "every": 10})
    return config
