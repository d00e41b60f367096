"""Programs that use moe_jax: one run, one benchmark or one data preparation each."""
