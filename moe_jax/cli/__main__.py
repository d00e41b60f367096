"""`python -m moe_jax.cli` is `moe-jax`."""

from moe_jax.cli import main

raise SystemExit(main())
