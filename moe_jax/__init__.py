"""moe_jax: the research workbench for Mixture-of-Experts in JAX."""
