"""`moe-jax report RUN`: makes a run's `report.html` again from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_jax.runs import read_progress


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "report",
        help="make a run's report.html again",
        description="Makes a run's report.html and its pictures again, from the files in its folder.",
        epilog="example: moe-jax report runs/evolve_topology/small-seed0",
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="the run's folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and prints its path; `RunError` if the folder is no run."""
    read_progress(arguments.path)
    # Pictures need matplotlib, which `moe-jax runs` should not wait for.
    from moe_jax.report import write_report

    print(write_report(arguments.path))
