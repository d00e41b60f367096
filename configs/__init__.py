"""Configurations of the experiments: `get_config()` in each file, literals and arithmetic only."""
