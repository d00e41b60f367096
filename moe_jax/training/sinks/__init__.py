"""Where metrics go besides the run's own files. Each sink is opened for a run, at the step that training starts after.

A run that was killed repeats the steps after its last checkpoint; what a sink does about them stands in its module.
"""

from moe_jax.training.sinks.mlflow import open_mlflow
from moe_jax.training.sinks.sink import OpenSink, Sink, TrackedRun
from moe_jax.training.sinks.tensorboard import open_tensorboard
from moe_jax.training.sinks.wandb import open_wandb

# key of `tracking.TrackingConfig` -> what opens the sink; the package that it needs has the same name
SINKS: dict[str, OpenSink] = {"tensorboard": open_tensorboard, "mlflow": open_mlflow, "wandb": open_wandb}

__all__ = ["SINKS", "OpenSink", "Sink", "TrackedRun"]
