"""Upcycling of a real model, SmolLM2-135M: ten of its thirty layers, on formal mathematics and Python.

Command:   python -m experiments.upcycle --config=configs/upcycle_smollm2.py
Hardware:  two CPU cores, 11 GB of memory
Time:      46 minutes beside other work
Result:    0.849 bits per byte for 30 steps of continued dense training (the parent has 1.007), the same for copies into
           4 experts at equal data, 0.008 more for them at equal FLOPs; virtual groups with noise 0.065 more
"""

from ml_collections import ConfigDict

from configs import upcycle


def get_config() -> ConfigDict:
    """The tiny experiment's keys with a real parent; its GGUF file is downloaded once."""
    config = upcycle.get_config()
    config.parent, config.seeds, config.steps = "smollm2", 1, 30
    config.data.update({"domains": ("mathematics", "python"), "domain_weights": (0.5, 0.5), "batch_size": 4})
    config.data.sequence_length = 256
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10, "weight_decay": 0.1})
    for name in ("virtual groups, 4 of 16", "virtual groups, drop"):
        del config.entries[name]
    for name, entry in config.entries.items():
        if name != "continued dense":
            with entry.unlocked():
                entry.layers = tuple(range(2, 30, 3))
    return config
