"""What runs the trials of a sweep, one file an engine."""

from moe_jax.training.sweeps.engines.engine import Engine, LaunchConfig, Work
from moe_jax.training.sweeps.engines.here import HereEngine
from moe_jax.training.sweeps.engines.on_ray import RayEngine
from moe_jax.training.sweeps.engines.on_slurm import SlurmEngine

__all__ = ["Engine", "HereEngine", "LaunchConfig", "RayEngine", "SlurmEngine", "Work"]
