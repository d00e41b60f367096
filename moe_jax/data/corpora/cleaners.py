"""From the files of packages to documents of plain text; `moe_jax.data.corpora.markup` has those for HTML and RST.

A cleaner takes a file's name and text and yields names and texts of documents. Long files are cut where the text itself
has joints, into documents of about 8 kB, small enough that every split gets some.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator

_DOCUMENT_CHARACTERS = 8_000
_CODE_CHARACTERS = 200_000  # longer files are tables that a program wrote


def plain(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Takes the file as it is."""
    yield name, text.strip() + "\n"


def code(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Leaves out files that say or show that no person wrote them."""
    if len(text) <= _CODE_CHARACTERS and "Code generated" not in text[:2_000]:
        yield from plain(name, text)


def metamath(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Cuts a Metamath database at its headings, and long sections between statements."""
    headings = re.split(r"\n(?=\$\(\n(?:####|#\*#\*|=-=-|-\.-\.))", text)
    for number, section in enumerate(headings):
        title = re.match(r"\$\(\n\S+\n\s*(.+)\n", section)
        place = f"{name}/{number:04d} {title.group(1) if title else 'beginning'}"
        # A statement ends with `$.` or, in a scope of its own, with `$}`; a blank line comes before the next one.
        yield from _grouped(place, re.split(r"(?<=\$[.}])\n\n(?=\s*\$[({])", section), "\n\n")


def dictionary(name: str, text: str) -> Iterator[tuple[str, str]]:
    r"""Cuts GCIDE into groups of headwords and strips its mark-up.

    Pronunciations (`\Lar"va\`), sources (`[1913 Webster]`), links (`{Lorry}`) and codes of letters (`[ae]`) go, lines
    of one paragraph are joined.
    """
    del name
    entries = re.split(r"\n\n(?=\S[^\n]* \\)", text)[1:]  # the first is the preface
    for place, group in _grouped("gcide", (_entry(entry) for entry in entries), "\n\n"):
        headword = group.split("\n", 1)[0]
        yield f"{place} {' '.join(re.split(r'[,(]', headword)[0].split()[:3])}", group


def poems(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Writes poems out: title, author, lines."""
    written = (
        "\n".join([poem.get("title") or poem.get("rhythmic", ""), poem.get("author", ""), *poem["paragraphs"]]).strip()
        for poem in json.loads(text)
        if poem.get("paragraphs")
    )
    yield from _grouped(name, written, "\n\n")


def scripture(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Takes the first long string out of a Python module, as text, and drops the brackets of added words."""
    body = text.split('"""')[1]
    sentences = re.findall(r"\S.*?(?:[.?!] |\n|$)", re.sub(r"[\[\]]", "", body))
    yield from _grouped(name, sentences, "")


def _grouped(name: str, pieces: Iterable[str], separator: str) -> Iterator[tuple[str, str]]:
    """Joins pieces in their order into documents, each begun anew once it is long enough."""
    group: list[str] = []
    number = size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.encode())
        if size >= _DOCUMENT_CHARACTERS:
            yield f"{name}/{number:04d}", separator.join(group).strip() + "\n"
            group, number, size = [], number + 1, 0
    if size:
        yield f"{name}/{number:04d}", separator.join(group).strip() + "\n"


# GCIDE writes letters that ASCII lacks as names or as an accent before or after a letter.
_LETTERS = {"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "eth": "ð", "thorn": "þ", "deg": "°", "root": "√", "sect": "§"}
_LETTERS |= {"asl": "'", "imac": "ī", "add": "ạ", "udd": "ụ", "ng": "ng", "th": "th", "alpha": "α", "beta": "β"}
_LETTERS |= {"aum": "ä", "oum": "ö", "uum": "ü", "yogh": "ȝ"}
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", "=": "\u0304", "~": "\u0303", ".": "\u0307"}
_ACCENTS |= {'"': "\u0308", ",": "\u0327", "-": "\u0304", "*": "\u030c"}
_BREVE = "\u0306"
_SOURCE = r"(?:[^\[\]]*(?:1913|Webster|WordNet|PJC|RDH)[^\[\]]*)"


def _entry(entry: str) -> str:
    """Strips one entry of the dictionary and joins the lines of each paragraph."""
    entry = re.sub(rf"\[{_SOURCE}\]", "", entry)
    entry = re.sub(r"\\[^\\\n]*\\,?", "", entry, count=1)
    entry = re.sub(r"\[([\'`^=~.\",*-]?[A-Za-z]{1,5}\^?)\]", _letter, entry)
    entry = re.sub(r"[{}]", "", entry)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", entry))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _letter(written: re.Match[str]) -> str:
    """Reads a code of a letter; anything else in brackets stays."""
    name = written.group(1)
    if name in _LETTERS:
        return _LETTERS[name]
    if accent := _ACCENTS.get(name[0]):
        return unicodedata.normalize("NFC", name[1] + accent + name[2:])
    return unicodedata.normalize("NFC", name[0] + _BREVE) if name[1:] == "^" else written.group(0)
