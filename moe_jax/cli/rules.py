"""`moe-jax rules`: the table of routing rules with what may be relied on, or one rule with its settings."""

from __future__ import annotations

import argparse
import inspect

from rich.console import Console
from rich.table import Table

from moe_jax.runs.sections import ConfigError


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "rules",
        help="list the routing rules, or explain one",
        description="Lists the routing rules and what may be relied on; with a name, explains one and its settings.",
        epilog="example: moe-jax rules sigmoid_top_k",
    )
    parser.add_argument("name", nargs="?", metavar="RULE", help="a rule to explain")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, or one rule."""
    # Only here, since loading JAX takes longer than the other commands.
    from moe_jax.routing import RULES, get_rule, rule_settings

    if arguments.name is None:
        table = Table("rule", "experts", "causal", "gates sum to 1", "state", "paper", box=None, header_style="bold")
        for name, rule in sorted(RULES.items()):
            count = "1 to E" if not rule.fixed_count else str(rule.only_choices or "K")
            yes = ["yes" if flag else "no" for flag in (rule.is_causal, rule.normalized)]
            table.add_row(name, count, *yes, "level" if rule.controller else "", rule.paper)
        Console().print(table)
        return
    try:
        rule = get_rule(arguments.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(f"{arguments.name} ({rule.paper})\n")
    print(inspect.getdoc(getattr(rule.choose, "func", rule.choose)))
    settings = ", ".join(f"{key}={value!r}" for key, value in rule_settings(rule).items())
    print(f"\nsettings: {settings or 'none'}")
