"""`moe-jax export RUN OUT`: writes a model as a checkpoint that `transformers` opens."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write a model as a checkpoint that transformers opens",
        description="Writes a model folder, or the model of a run, as a checkpoint in the format of transformers. A "
        "model of our own is written as the first family that can express it.",
        epilog="examples:\n  moe-jax export models/olmoe checkpoints/olmoe\n"
        "  moe-jax export runs/upcycle/smollm2 checkpoints/mine --family mixtral",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="a model folder, or a run with a folder `model`")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--family", help="model_type to write (default: where it came from, or the first that fits)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Exports and prints where to."""
    from moe_jax.checkpoints.model_folder import FACTS, export_checkpoint

    source = arguments.source
    if not (source / FACTS).is_file() and (source / "model" / FACTS).is_file():
        source = source / "model"
    export_checkpoint(source, arguments.out, family=arguments.family)
    print(arguments.out)
