"""The mixture of `configs/train.py` over four devices: two parts of the batch, two parts of the experts.

Command:   XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m experiments.train --config configs/train_mesh.py
Hardware:  four devices; with the flag, four that share a CPU's cores, which is for trying it and not for speed
Result:    the numbers of `configs/train.py` up to the order of additions
"""

from ml_collections import ConfigDict

from configs import train


def get_config() -> ConfigDict:
    config = train.get_config()
    config.mesh = ConfigDict({"data": 2, "expert": 2, "tensor": 1})
    return config
