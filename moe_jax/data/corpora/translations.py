"""Finds what a translation left in the language of the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def phrases_of(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Collects the phrases of an original, for `drop_untranslated`."""
    return {phrase for text in texts for line in text.splitlines() for phrase in _phrases(line)}


def drop_untranslated(text: str, original: set[tuple[str, ...]]) -> str:
    """Leaves out the lines of which more than half the phrases are the original's.

    Equal lines are not all: a paragraph that nobody translated often has a reference in it that a program did.

    Args:
      text: of the translation.
      original: from `phrases_of`.

    Returns:
      The other lines.
    """
    kept = []
    for line in text.splitlines(keepends=True):
        is_original = [phrase in original for phrase in _phrases(line)]
        if 2 * sum(is_original) <= len(is_original):
            kept.append(line)
    return "".join(kept)


def _phrases(line: str) -> Iterator[tuple[str, ...]]:
    """Yields every three words in a row, or all of them where there are fewer."""
    words = line.split()
    for start in range(max(1, len(words) - 2) if words else 0):
        yield tuple(words[start : start + 3])
