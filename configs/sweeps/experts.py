"""Mixtures of experts against their dense twins at equal active FLOPs: 4, 8, 16 and 32 experts of which a token uses 2.

Each number of experts has a twin of its own, since the router counts (`models.twin`); twins differ by little and show
what chance does. Seed by seed both see the same batches.

Command:   python -m experiments.sweep --config=configs/sweeps/experts.py
           on text made by `experiments.prepare_corpus`, the tables of CORPUS alone: --config.train.data.tables=CORPUS
           --config.train.data.domains= --config.train.data.domain_weights=
Hardware:  two CPU cores
Time:      14 minutes
Result:    on seven prepared domains of at most 0.5 MB, bits per byte of the selection split less those of the twin,
           mean of 3 seeds [95 % by Student's t]: 4 experts -0.037 [-0.057, -0.017], 8 -0.091 [-0.118, -0.063],
           16 -0.142 [-0.159, -0.126], 32 -0.181 [-0.196, -0.166]; the chosen one, 32 experts, has 3.297
           [3.276, 3.319] on the test split (JAX 0.10.2)
Quick:     configs/sweeps/experts_quick.py
"""

import dataclasses

from ml_collections import ConfigDict

from configs.sweeps import learning_rate
from moe_jax.models.config import DecoderConfig
from moe_jax.models.twin import dense_twin
from moe_jax.training.sweeps import space, variants

NUM_EXPERTS = (4, 8, 16, 32)


def get_config() -> ConfigDict:
    """Two axes: the number of experts with the hidden width of its twin, and which of both networks it is."""
    config = learning_rate.get_config()
    config.train.data.update({"sequence_length": 128, "batch_size": 8})
    config.train.model.update({"width": 64, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 64})
    config.train.optimizer.update({"learning_rate": 4e-3, "warmup_steps": 50})
    config.train.training.update({"steps": 600, "checkpoint_every": 150})
    config.sweep.update({"seeds": 3, "reference": ("network", "dense twin")})
    model = DecoderConfig(**config.train.model)
    sizes = {}
    for num_experts in NUM_EXPERTS:
        twin = dense_twin(dataclasses.replace(model, num_experts=num_experts))
        sizes[str(num_experts)] = {"model.num_experts": num_experts, "model.dense_hidden": twin.dense_hidden}
    dense = ("dense",) * len(model.layers)
    networks = {"experts": {}, "dense twin": {"model.layers": dense}}
    config.space = space({"experts": variants(sizes), "network": variants(networks)})
    return config
