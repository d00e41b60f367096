"""Cleaners for HTML and reStructuredText as the packages of the manifest have them: one paragraph a line."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

# What surrounds the text of a page of LibreOffice's help and of the Debian handbook; none of them nests in itself.
_SURROUNDINGS = re.compile(
    r"<(head|header|aside|footer|nav|script|style|noscript|button)\b.*?</\1>"
    r"|<div id=\"banner\".*?</div>|<p id=\"title\".*?</p>|<ul class=\"docnav.*?</ul>|<!--.*?-->",
    re.DOTALL,
)
_PREFORMATTED = re.compile(r"<pre\b[^>]*>(.*?)</pre>", re.DOTALL)
_BREAK = re.compile(r"</?(?:p|div|h[1-6]|li|tr|table|ul|ol|dl|dt|dd|br|hr|blockquote|section)\b[^>]*>")
_APART = re.compile(r"</t[dh]>|(?<=</span>)(?=<span)")  # cells, and the words for several systems side by side
_TAG = re.compile(r"<[^>]*>")


def page(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Takes the text of a page of HTML: a line a paragraph, listings as they are, no navigation."""
    lines: list[str] = []
    for number, part in enumerate(_PREFORMATTED.split(_SURROUNDINGS.sub("", text))):
        if number % 2:
            lines += [line.rstrip() for line in html.unescape(_TAG.sub("", part)).strip("\n").splitlines()]
        else:
            broken = _BREAK.sub("\0", _APART.sub(" ", part))
            lines += [" ".join(line.split()) for line in html.unescape(_TAG.sub("", broken)).split("\0")]
    if written := "\n".join(line for line in lines if line):
        yield name, written + "\n"


_ROLE = re.compile(r":[\w:+-]+:`([^`<]*[^`<\s])\s*(?:<[^`]*>)?`")
_DIRECTIVE = re.compile(r"^( *)\.\. (?:([\w:-]+)::)?")
_RULE = re.compile(r"^\s*(?:([=\-~^\"'*+#.`:_])\1{2,}|[=\-+| ]{3,})\s*$")
_FIELD = re.compile(r"^\s*:[\w -]+:(?= |$)")
_PROSE = frozenset({"note", "warning", "important", "tip", "caution", "attention", "hint", "admonition", "topic"})


def restructured(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Takes the prose of a reStructuredText file: no comments, figures, rules under headings, fields or roles."""
    lines: list[str] = []
    hidden: int | None = None  # indentation of the directive whose content is left out
    for line in text.expandtabs().splitlines():
        indentation = len(line) - len(line.lstrip())
        if hidden is not None and line.strip() and indentation <= hidden:
            hidden = None
        if hidden is not None:
            continue
        if directive := _DIRECTIVE.match(line):
            if directive.group(2) not in _PROSE:
                hidden = indentation
                continue
            line = line[directive.end() :]
        if not _RULE.match(line) and not _FIELD.match(line):
            lines.append(_ROLE.sub(r"\1", line).replace("``", "").rstrip())
    if written := re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip():
        yield name, written + "\n"
