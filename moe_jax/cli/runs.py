"""`moe-jax runs`: a table of runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.runs import list_runs

_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "runs",
        help="list runs, newest first",
        description="Lists runs, newest first, with where they stand and what came out.",
        epilog="example: moe-jax runs --root runs/evolve_topology",
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="where to look (default: runs)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    summaries = list_runs(arguments.root)
    if not summaries:
        print(f"no runs below {arguments.root}")
        return
    table = Table("run", "status", "stage", "step", "changed", "result", box=None, header_style="bold", pad_edge=False)
    for summary in summaries:
        progress = summary.progress
        status = Text(progress.status, style=_STYLES.get(progress.status, ""))
        age = describe_age(time.time() - progress.updated)
        result = progress.error or summary.headline
        table.add_row(str(summary.path), status, progress.stage, str(progress.step), age, Text(result))
    Console().print(table)


def describe_age(seconds: float) -> str:
    """Says how long ago something was, in the largest unit that fits: "42 s ago", "3 h ago"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
