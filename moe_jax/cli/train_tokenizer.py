"""`moe-jax train-tokenizer OUT TEXT...`: learns a byte-level BPE from text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_jax.runs.sections import ConfigError


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "train-tokenizer",
        help="learn a tokenizer from text",
        description="Learns a byte-level BPE from UTF-8 text. The folder that it makes can be a run's "
        "config.data.tokenizer, and transformers' AutoTokenizer opens it too. The same text gives the same tokenizer.",
        epilog="example: moe-jax train-tokenizer --vocab-size 4096 tokenizers/mine books/ notes.txt",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="a file, or a folder with files below it")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, at least 257 (default: 4096)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Learns, saves, and says how much it shortens the text."""
    # Only here, since loading JAX takes longer than the other commands.
    from moe_jax.data.train_tokenizer import train_tokenizer

    if (arguments.out / "tokenizer.json").exists():
        raise ConfigError(f"{arguments.out} has a tokenizer already; choose another folder, or delete it")
    try:
        texts = list(_read(arguments.texts))
        tokenizer = train_tokenizer(texts, arguments.vocab_size, show_progress=sys.stderr.isatty())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tokenizer.save(arguments.out)
    sample = texts[0][:100_000]
    rate = len(sample.encode()) / len(tokenizer.encode(sample))
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens, {rate:.2f} bytes a token in the first text")


def _read(paths: list[Path]) -> Iterator[str]:
    """The text of each file.

    Raises:
      ValueError: a path that does not exist or is no text.
    """
    from moe_jax.data.sources import read_folder

    for path in paths:
        if path.is_dir():
            yield from (document.text.decode() for document in read_folder(f"text={path}"))
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from error
