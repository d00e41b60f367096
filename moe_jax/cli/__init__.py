"""The command `moe-jax`: one file per sub-command, each with `add_command` and the function that it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from moe_jax.cli import export_model, generate, import_model, inspect_model, report, rules, runs, train_tokenizer
from moe_jax.errors import MendableError
from moe_jax.runs import ConfigError

_EXAMPLES = """examples:
  moe-jax runs                                          the runs below ./runs, newest first
  moe-jax report runs/evolve_topology/small-seed0       makes its report.html again
  moe-jax rules                                         the routing rules and what may be relied on
  moe-jax import mistralai/Mixtral-8x7B-v0.1 models/m   opens a public checkpoint
  moe-jax inspect models/m --text book.txt              what it is, and how it routes a text
  moe-jax generate models/m --prompt "Once upon"        continues a text
  moe-jax train-tokenizer tokenizers/mine book.txt      learns a byte-level BPE

Experiments are modules of their own: python -m experiments.evolve_topology --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      The exit code: 0, or 2 after an error that the caller can mend, which is one line on stderr.
    """
    parser = _Parser(
        prog="moe-jax",
        description="Looks after runs and models, and lists what there is.",
        epilog=_EXAMPLES,
        allow_abbrev=False,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (runs, report, rules, import_model, export_model, inspect_model, generate, train_tokenizer):
        command.add_command(commands)
    try:
        arguments = parser.parse_args(argv)
        arguments.run(arguments)
    except MendableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")
