"""NNX modules: they own parameters, read them at the border and call pure functions.

Modules are pytrees: use `jax.jit`, `jax.grad`, `jax.vmap` and `jax.lax.scan` on them or on their `nnx.split` state.
"""
