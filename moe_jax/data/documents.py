"""Documents, the unit that is split: a text is in exactly one split, whole."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from moe_jax.data.token_file import TokenSpan

_LONG_LINE = 30  # bytes; shorter lines recur by chance, longer ones are headers and copies


@dataclasses.dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
      text: its bytes.
      domain: what kind of text it is.
      name: unique within the domain.
      ids: its tokens, `[N]` ints or a span of a file; None where the bytes are the tokens.
      token_bytes: `[V]` int64, the bytes that each id stands for, or None if the tokenizer does not tell.
      licence: under which it stands; None where that is not known.
    """

    text: bytes
    domain: str
    name: str
    ids: np.ndarray | TokenSpan | None = dataclasses.field(default=None, compare=False)
    token_bytes: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    licence: str | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Its tokens, `[N]` uint8, uint16 or int32."""
        if self.ids is None:
            return np.frombuffer(self.text, np.uint8)
        return self.ids.tokens if isinstance(self.ids, TokenSpan) else self.ids

    @property
    def byte_counts(self) -> np.ndarray:
        """`[N]` int64, the bytes of the text that each token stands for; their sum is the text's length.

        Exact where the bytes are the tokens, or `token_bytes` adds up to the text; else the bytes are spread evenly.
        """
        if self.ids is None:
            return np.ones(len(self.text), np.int64)
        tokens = self.tokens
        if self.token_bytes is not None and (counts := self.token_bytes[tokens]).sum() == len(self.text):
            return counts
        return np.diff(np.arange(len(tokens) + 1) * len(self.text) // max(len(tokens), 1))


def domain_names(documents: Sequence[Document]) -> tuple[str, ...]:
    """Names the domains, in the order in which they first occur: index d of every `domain` array."""
    return tuple(dict.fromkeys(document.domain for document in documents))


def drop_duplicates(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Removes what is repeated between documents, so that no split knows a copy of another's text.

    A document equal to an earlier one goes. So does a line of more than 30 bytes (blanks at its ends aside) that an
    earlier document has, such as a licence header; lines repeated within their own document stay. What is left with
    fewer than two bytes, nothing to predict, goes too.

    Args:
      documents: in the order that decides which copy is the first.

    Returns:
      The documents that are left, in the same order.
    """
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    repeated = _repeated_hashes(first.values())
    owned: set[bytes] = set()
    kept = []
    for document in first.values():
        lines = {line for line in _long_lines(document.text) if hash(line) in repeated}
        if foreign := lines & owned:
            own = [line for line in document.text.splitlines(keepends=True) if line.strip() not in foreign]
            document = dataclasses.replace(document, text=b"".join(own))
        owned |= lines
        if len(document.text) >= 2:
            kept.append(document)
    return tuple(kept)


def _long_lines(text: bytes) -> set[bytes]:
    """Returns the lines that are long enough to be copies, without blanks at their ends."""
    return {line for line in map(bytes.strip, text.splitlines()) if len(line) > _LONG_LINE}


def _repeated_hashes(documents: Iterable[Document]) -> set[int]:
    """Returns the hashes of long lines that several documents may have; they take a tenth of the lines' memory."""
    lines = (_long_lines(document.text) for document in documents)
    of_each = [np.fromiter(map(hash, found), np.int64, len(found)) for found in lines]
    hashes = np.sort(np.concatenate([np.zeros(0, np.int64), *of_each]))
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def group_by_domain(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Groups documents by domain, domains and documents in the order in which they occur."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.domain].append(document)
    return dict(groups)
