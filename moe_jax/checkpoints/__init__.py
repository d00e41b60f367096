"""Checkpoints: a pytree of arrays at a step, written by Orbax so that a kill at any moment leaves a good one."""

from moe_jax.checkpoints.store import CheckpointError, CheckpointStore, DamagedError, Restored

__all__ = ["CheckpointError", "CheckpointStore", "DamagedError", "Restored"]
