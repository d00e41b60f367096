"""Documents out of tables: Parquet and Arrow files, read in pieces, so that a cap on the text is one on the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.documents import Document, group_by_domain

_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
_LICENCE = "licence"  # the column that `experiments/prepare_corpus.py` writes besides
_ROWS = 1_000  # of a table that are in memory at once


def read_tables(entry: str, columns: tuple[str, str, str], max_bytes: int | None) -> list[Document]:
    """Reads the user's tables.

    Args:
      entry: "name=path", one domain of all rows, or "path", where a column names the domain of each row. The path is a
        file, or a folder of files, such as those that `datasets` saves; hidden ones are left out.
      columns: names of the columns of text, domain and name; `a.b` is the field b of a column a. Without a column of
        names a document is named by its file and row.
      max_bytes: of each domain's text; the rows that come first are taken. None takes all.

    Returns:
      A document a row, by domain, in the order of the files' names and of their rows; empty ones are left out.

    Raises:
      ValueError: nothing is there, or it is not such a table, saying what to do.
    """
    name, is_named, rest = entry.partition("=")
    location = rest if is_named else entry
    root = Path(location).expanduser()
    if not location or (is_named and not name):
        raise ValueError(f"tables has {entry!r}, expected 'name=path' or 'path'")
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_table(path, root))
    if not files:
        raise ValueError(f"tables has {entry!r}, but {root.resolve()} has no {', '.join(_SUFFIXES)} file")
    named = ((path, path.name if path == root else path.relative_to(root).as_posix()) for path in files)
    return take_rows(named, name if is_named else None, columns, max_bytes)


def take_rows(
    files: Iterable[tuple[Path, str]], domain: str | None, columns: tuple[str, str, str], max_bytes: int | None
) -> list[Document]:
    """Takes documents out of the rows of tables until there is enough of every domain.

    Args:
      files: paths, and what to call them; one domain's are asked for no further than needed.
      domain: of all rows; None takes it from the column.
      columns: as in `read_tables`.
      max_bytes: as in `read_tables`. A document that is alone larger is left out.

    Raises:
      ValueError: a file is not such a table, a column is missing, or two documents of a domain have one name.
    """
    documents: list[Document] = []
    sizes: dict[str, int] = {}
    full: set[str] = set()
    names: set[tuple[str, str]] = set()
    for path, called in files:
        for document in _rows(path, called, domain, columns):
            size = len(document.text)
            if document.domain in full or (max_bytes is not None and size > max_bytes):
                continue
            sizes[document.domain] = sizes.get(document.domain, 0) + size
            if max_bytes is not None and sizes[document.domain] > max_bytes:
                full.add(document.domain)
                if domain is not None:
                    return documents
                continue
            if (document.domain, document.name) in names:
                raise ValueError(
                    f"{path} has a second document named {document.name!r} in domain {document.domain!r}; name a "
                    f"column without repetitions as the third of table_columns={','.join(columns)}, or none"
                )
            names.add((document.domain, document.name))
            documents.append(document)
    if not documents:
        raise ValueError(f"{path} has no text" + (f" of at most {max_bytes} bytes" if max_bytes is not None else ""))
    return [document for members in group_by_domain(documents).values() for document in members]


def _is_table(path: Path, root: Path) -> bool:
    """Tells whether a path below a folder is a table that is not hidden."""
    is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix in _SUFFIXES and path.is_file() and not is_hidden


def _rows(path: Path, called: str, domain: str | None, columns: tuple[str, str, str]) -> Iterator[Document]:
    """Yields the rows of a file that have text."""
    text_column, domain_column, name_column = columns
    row = 0
    try:
        for table in _pieces(path, columns, needs_domain=domain is None):
            texts = (
                table.column(text_column).cast(pa.string()).cast(pa.binary()).to_pylist()
            )  # refuses what is no UTF-8
            domains = _labels(table, domain_column) if domain is None else [domain] * len(texts)
            names = _labels(table, name_column) if name_column in table.column_names else [None] * len(texts)
            licences = _labels(table, _LICENCE) if _LICENCE in table.column_names else [None] * len(texts)
            for text, kind, name, licence in zip(texts, domains, names, licences, strict=True):
                if kind is None:
                    raise ValueError(f"{path} has no {domain_column} in row {row}; give it one, or write 'name=path'")
                if text:
                    yield Document(text, kind, f"{called}/{row}" if name is None else name, licence=licence)
                row += 1
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet or Arrow table ({error}); make it again, or leave it out") from error


def _pieces(path: Path, columns: tuple[str, str, str], needs_domain: bool) -> Iterator[pa.Table]:
    """Yields a file's wanted columns, some rows at a time; fields of columns have become columns."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            wanted = _wanted(file.schema_arrow, path, columns, needs_domain)
            for batch in file.iter_batches(_ROWS, columns=wanted):
                yield pa.Table.from_batches([batch]).flatten()
        return
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches: Iterable[pa.RecordBatch] = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # what `datasets` writes is a stream instead
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        wanted = _wanted(reader.schema, path, columns, needs_domain)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield pa.Table.from_batches([batch.slice(start, _ROWS)]).flatten().select(wanted)


def _wanted(schema: pa.Schema, path: Path, columns: tuple[str, str, str], needs_domain: bool) -> list[str]:
    """Returns which of the columns a table has, after a look whether it has what is needed."""
    flat = schema.empty_table().flatten().schema
    given = f"{path} has the columns {', '.join(flat.names)}, but none"
    if columns[0] not in flat.names:
        raise ValueError(f"{given} named {columns[0]!r} of text; name yours first in table_columns={','.join(columns)}")
    kind = flat.field(columns[0]).type
    if not any(is_kind(kind) for is_kind in _TEXT):
        raise ValueError(f"{path}: column {columns[0]!r} has the type {kind}, expected text")
    if needs_domain and columns[1] not in flat.names:
        raise ValueError(
            f"{given} named {columns[1]!r} of domains; write 'name=path' to make the table one domain, or name the "
            f"column second in table_columns={','.join(columns)}"
        )
    return [column for column in dict.fromkeys((*columns, _LICENCE)) if column in flat.names]


_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _labels(table: pa.Table, column: str) -> list[str | None]:
    """Returns a column as strings, numbers written out."""
    return table.column(column).cast(pa.string()).to_pylist()
