"""Where documents come from: text shipped with the package, Python's own standard library, the user's own text."""

import dataclasses
import hashlib
import importlib.resources
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names, drop_duplicates, group_by_domain
from moe_jax.data.hub import read_hub
from moe_jax.data.sample import FairSample
from moe_jax.data.tables import read_tables

# Tests and generated tables of the standard library are not code that anyone wrote to be read; the `_sysconfigdata`
# files hold the paths of the machine that built the interpreter.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_SKIPPED_PREFIX = "_sysconfigdata"
_MODULE_BYTES = range(1_000, 16_001)  # whole modules small enough that every split gets several


class BuiltIn(NamedTuple):
    """A domain that needs no download: how to read it, and under which licence it stands."""

    read: Callable[[str, DataConfig], list[Document]]
    licence: str


def load_documents(config: DataConfig) -> tuple[Document, ...]:
    """Reads every domain that the configuration names, without duplicates.

    Args:
      config: its fields up to `python_bytes` are read.

    Returns:
      Documents, grouped by domain: the built-in ones, then folders, tables and the hub's data sets, each in the order
      of the configuration.

    Raises:
      ValueError: a domain is unknown or has too little text; a source is missing, empty, not UTF-8, or has a domain
        named like another's. The message says what to do.
    """
    documents: list[Document] = []
    for domain in dict.fromkeys(config.domains):
        if domain not in BUILT_IN:
            raise ValueError(f"domains names {domain!r}, which is not built in; known: {', '.join(BUILT_IN)}")
        read, licence = BUILT_IN[domain]
        found = [dataclasses.replace(document, licence=licence) for document in read(domain, config)]
        documents += _sample(found, config.max_bytes_per_domain)
    taken = set(config.domains)
    entries = [(field, entry) for field in _READERS for entry in getattr(config, field)]
    for field, entry in entries:
        found = _READERS[field](entry, config)
        names = domain_names(found)
        if clash := taken.intersection(names):
            raise ValueError(f"{field} has {entry!r}, but {', '.join(sorted(clash))} is taken; name it 'other-name=…'")
        taken.update(names)
        documents += found
    return drop_duplicates(documents)


def _sample(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """Keeps of every domain what `max_bytes_per_domain` allows, in the former order."""
    if max_bytes is None:
        return documents
    kept = []
    for domain, members in group_by_domain(documents).items():
        sample: FairSample[int] = FairSample(max_bytes)
        for index, document in enumerate(members):
            sample.add(document.name, index, len(document.text))
        if not (chosen := sample.items()):
            raise ValueError(f"max_bytes_per_domain is {max_bytes}, less than any document of domain {domain!r} has")
        kept += [members[index] for index in sorted(chosen)]
    return kept


def read_shipped(domain: str, config: DataConfig | None = None) -> list[Document]:
    """Reads a domain shipped with the package; `corpus/NOTICE` has its origin.

    Args:
      domain: name of a file in `corpus`.
      config: not needed, here for the signature of `BuiltIn.read`.

    Returns:
      Documents in the file's order.
    """
    del config
    text = importlib.resources.files("moe_jax.data").joinpath("corpus", f"{domain}.txt").read_bytes()
    heads_and_bodies = (part.partition(b"\n") for part in text.split(b"\f")[1:])
    return [Document(body, domain, head.decode()) for head, _, body in heads_and_bodies]


def read_standard_library(domain: str, config: DataConfig) -> list[Document]:
    """Reads whole modules of the running interpreter's standard library, so its content depends on Python's version.

    Modules are taken in the order of their path's sha256: a fair sample that no file system's order can change.

    Args:
      domain: name to give them.
      config: `python_bytes`, at least which are read, by less than one module more.

    Returns:
      Documents sorted by name, the module's path below the library.

    Raises:
      ValueError: the library has less text than that.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # spares the walk through site-packages
        modules = [name for name in files if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIX)]
        names += [Path(folder, name).relative_to(root).as_posix() for name in modules]
    documents, total = [], 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= config.python_bytes:
            break
        text = (root / name).read_bytes()
        if len(text) in _MODULE_BYTES:
            documents.append(Document(text, domain, name))
            total += len(text)
    if total < config.python_bytes:
        raise ValueError(
            f"python_bytes is {config.python_bytes}, but {root} has only {total} bytes in modules of "
            f"{_MODULE_BYTES.start} to {_MODULE_BYTES.stop - 1} bytes; lower it, or leave 'python' out of domains"
        )
    return sorted(documents, key=lambda document: document.name)


def read_folder(entry: str) -> list[Document]:
    """Reads the user's text.

    Args:
      entry: "name=path", one domain of all files below `path`, or "path", a domain of each of its sub-folders. Hidden
        files and folders, whose names begin with a dot, are left out.

    Returns:
      A document a file, sorted by domain and path; empty files are left out.

    Raises:
      ValueError: nothing is there, or a file is not UTF-8.
    """
    name, is_named, rest = entry.partition("=")
    location = rest if is_named else entry
    root = Path(location).expanduser()
    if not location or (is_named and not name):
        raise ValueError(f"folders has {entry!r}, expected 'name=path' or 'path'")
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"folders has {entry!r}, but {root.resolve()} {problem}; expected 'name=path' or 'path'")
    roots = (
        {name: root} if is_named else {path.name: path for path in sorted(root.iterdir()) if _is_visible_folder(path)}
    )
    if not roots:
        raise ValueError(f"{root} has no sub-folders to make domains of; write 'name={location}' to make it one domain")
    return [document for domain, path in roots.items() for document in _read_tree(domain, path)]


def _is_visible_folder(path: Path) -> bool:
    """Tells whether a path is a folder that is not hidden."""
    return path.is_dir() and not path.name.startswith(".")


def _read_tree(domain: str, root: Path) -> list[Document]:
    """Reads every visible file below a folder as a document."""
    documents = []
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text (byte {error.start} is 0x{text[error.start]:02x}); "
                "convert it to UTF-8, or move it out of the folder if it is not text"
            ) from error
        if text:
            documents.append(Document(text, domain, relative.as_posix()))
    if not documents:
        raise ValueError(
            f"folder {root} of domain {domain!r} has no text; put UTF-8 files there or leave it out of folders"
        )
    return documents


BUILT_IN: dict[str, BuiltIn] = {
    "speeches": BuiltIn(read_shipped, "CC0 1.0 (State of the Union speeches)"),
    "novel": BuiltIn(read_shipped, "CC0 1.0 (Moby Dick)"),
    "mathematics": BuiltIn(read_shipped, "CC0 1.0 (Metamath set.mm)"),
    "python": BuiltIn(read_standard_library, "PSF License Version 2 (read from the interpreter, not shipped)"),
}

# By field of the configuration; each makes documents of one entry.
_READERS: dict[str, Callable[[str, DataConfig], list[Document]]] = {
    "folders": lambda entry, config: _sample(read_folder(entry), config.max_bytes_per_domain),
    "tables": lambda entry, config: read_tables(entry, config.table_columns, config.max_bytes_per_domain),
    "hf": lambda entry, config: read_hub(entry, config.table_columns, config.max_bytes_per_domain),
}
