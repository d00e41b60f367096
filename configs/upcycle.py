"""Sparse upcycling on a laptop: a small dense byte model is trained, then continued dense and as mixtures of experts.

Command:   python -m experiments.upcycle
Hardware:  two CPU cores
Time:      13 minutes, beside other work
Result:    2.650 bits per byte for continued dense training; copying into 4 experts 0.012 better for 56 % more FLOPs,
           0.065 worse at equal FLOPs; virtual groups at equal FLOPs a tie, with half of each expert drawn anew 0.024
           worse
"""

from ml_collections import ConfigDict

from configs import evolve_topology


def get_config() -> ConfigDict:
    """`parent` is a model folder, a checkpoint or a .gguf file, or empty for a dense model trained here first."""
    main = evolve_topology.get_config()
    config = ConfigDict({"seed": 0, "seeds": 3, "steps": 300, "parent": "", "parent_steps": 600})
    config.data, config.optimizer, config.loss = main.data, main.optimizer, main.loss
    config.model = main.model
    with config.unlocked():
        config.model.layers = ("dense",) * 3
        config.optimizer.update({"warmup_steps": 30, "heal_fraction": 0.0})
    config.entries = ConfigDict(
        {
            "continued dense": {},
            "copy, 2 of 4": {"num_experts": 4, "num_choices": 2},
            "virtual groups, 4 of 16": {"num_experts": 16, "num_choices": 4, "granularity": 4},
            "virtual groups, noise": {"num_experts": 16, "num_choices": 4, "granularity": 4, "noise": 0.1},
            "virtual groups, drop": {"num_experts": 16, "num_choices": 4, "granularity": 4, "drop": 0.5},
        }
    )
    return config
