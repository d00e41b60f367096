"""Runs: configuration at the border, a folder a run, metrics as columns, and the command line of experiments."""

from moe_jax.runs.command import Command, parse_command, run_script
from moe_jax.runs.config import differing_keys, flatten, from_json, load_config, override, to_json
from moe_jax.runs.environment import describe_environment, enable_compilation_cache
from moe_jax.runs.files import read_json, write_atomic, write_json
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.listing import RunSummary, list_runs
from moe_jax.runs.metrics import MetricsWriter, list_stages, read_metrics
from moe_jax.runs.progress import Progress, RunError, read_progress
from moe_jax.runs.sections import ConfigError, section

__all__ = [
    "Command",
    "ConfigError",
    "MetricsWriter",
    "Progress",
    "RunError",
    "RunFolder",
    "RunSummary",
    "describe_environment",
    "differing_keys",
    "enable_compilation_cache",
    "flatten",
    "from_json",
    "list_runs",
    "list_stages",
    "load_config",
    "override",
    "parse_command",
    "read_json",
    "read_metrics",
    "read_progress",
    "run_script",
    "section",
    "to_json",
    "write_atomic",
    "write_json",
]
