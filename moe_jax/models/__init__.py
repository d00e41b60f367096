"""Models: architectures put together from `moe_jax.nn`."""
