"""`moe-jax inspect MODEL`: what a model is, and with a text what its routers do."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_jax.cli.tokenizer import open_model_tokenizer
from moe_jax.runs import ConfigError


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what a model is and how it routes a text",
        description="Shows a model's architecture, its parameters in all and active, its router and what memory it "
        "takes. The model is a model folder, or a checkpoint or a name on the hub, of which only config.json is read. "
        "With --text, a model folder's routing of these files is written as a report.",
        epilog="examples:\n  moe-jax inspect models/olmoe\n"
        "  moe-jax inspect models/olmoe --text book.txt code.py --out runs/inspect/olmoe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, a checkpoint's folder, or org/model")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts to route, each its own domain")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: MODEL/routing)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table; writes the report."""
    from moe_jax.checkpoints.families import family_of
    from moe_jax.checkpoints.hub.download import locate
    from moe_jax.checkpoints.hub.hub_config import HubConfig
    from moe_jax.checkpoints.model_folder import FACTS, read_facts
    from moe_jax.models.description import describe_model

    folder = locate(arguments.model)
    if (folder / FACTS).is_file():
        facts = read_facts(folder)
        config, family = facts.config, facts.family
    else:
        hub = HubConfig.load(folder / "config.json")
        config, family = family_of(hub).read(hub), hub.values["model_type"]
        hub.finish()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {"family": family or "our own", **describe_model(config)}.items():
        table.add_row(name, value)
    Console().print(table)
    if arguments.text is not None:
        _report(folder, arguments)


def _report(folder: Path, arguments: argparse.Namespace) -> None:
    """Routes the texts and writes the report."""
    from moe_jax.checkpoints.model_folder import find_model, load_model
    from moe_jax.models.decoder import Decoder
    from moe_jax.report.text_routing import report_text_routing

    if missing := [path for path in arguments.text if not path.is_file()]:
        raise ConfigError(f"{missing[0]} is no file: --text takes text files")
    folder = find_model(folder)
    model = load_model(folder, dtype="float32", compute_dtype="float32")
    tokenizer = open_model_tokenizer(folder, model.config.vocab_size)
    texts = {path.name: tokenizer.encode(path.read_text(encoding="utf-8")) for path in arguments.text}
    if not isinstance(model, Decoder):
        raise ConfigError("--text is for decoders: this is an encoder-decoder")
    try:
        print(report_text_routing(model, texts, arguments.out or folder / "routing", folder.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
