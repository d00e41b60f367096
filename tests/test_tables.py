"""Documents out of tables and of the hub's data sets, caps on domains, and the de-duplication of many lines."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax import data
from moe_jax.data import DataConfig, Document, load_documents

ROOT = Path(__file__).parent.parent
ROWS = {
    "text": ["first text", "", "second text", None, "third, in Übung"],
    "domain": ["a", "a", "b", "b", "a"],
    "name": ["one", "two", "three", "four", "five"],
    "licence": ["CC0", "CC0", "MIT", "MIT", "CC0"],
}


def write_parquet(path, rows):
    pq.write_table(pa.table(rows), path, row_group_size=2, compression="zstd")


def write_arrow_file(path, rows):
    table = pa.table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_stream(path, rows):
    """As `datasets.save_to_disk` does."""
    table = pa.table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


FORMATS = {"t.parquet": write_parquet, "t.arrow": write_arrow_file, "data-00000-of-00001.arrow": write_arrow_stream}


def load(*tables, **fields):
    return load_documents(DataConfig(domains=(), tables=tuple(map(str, tables)), **fields))


@pytest.mark.parametrize("file", FORMATS)
def test_rows_become_documents(tmp_path, file):
    FORMATS[file](tmp_path / file, ROWS)
    expected = (
        Document(b"first text", "a", "one", licence="CC0"),
        Document("third, in Übung".encode(), "a", "five", licence="CC0"),
        Document(b"second text", "b", "three", licence="MIT"),
    )
    assert load(tmp_path / file) == expected
    assert load(tmp_path) == expected  # the folder of it
    merged = load(f"mine={tmp_path / file}")
    assert [(document.domain, document.name) for document in merged] == [
        ("mine", "one"),
        ("mine", "three"),
        ("mine", "five"),
    ]


def test_columns_have_the_names_that_they_are_given_and_may_be_fields(tmp_path):
    rows = {
        "body": pa.array(["one text", "two texts"], pa.large_string()),
        "meta": [{"set": "x", "n": 1}, {"set": "y", "n": 2}],
        "label": pa.array([7, 8]),
    }
    for file, write in FORMATS.items():
        write(tmp_path / file, rows)
        named = load(tmp_path / file, table_columns=("body", "meta.set", "label"))
        assert [(d.domain, d.name, d.text) for d in named] == [("x", "7", b"one text"), ("y", "8", b"two texts")]
        (one, two) = load(f"z={tmp_path / file}", table_columns=("body", "", ""))
        assert (one.name, two.name) == (f"{file}/0", f"{file}/1")


def test_a_folder_is_read_in_the_order_of_its_files_without_hidden_ones(tmp_path):
    for name in ("train/0001.parquet", "train/0000.parquet", "test/0000.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, {"text": [f"text of {name}", "more of " + name]})
    (tmp_path / ".cache.parquet").write_bytes(b"no table")
    (tmp_path / "README.md").write_text("no table")
    assert [d.name for d in load(f"z={tmp_path}")] == [
        f"{file}/{row}" for file in ("test/0000.parquet", "train/0000.parquet", "train/0001.parquet") for row in (0, 1)
    ]


def test_the_first_rows_that_fit_are_taken(tmp_path):
    # Of a: 40 + 40 bytes fit in 100, the next 40 do not and end it though 10 would fit; of b all; 200 never fit.
    sizes = [("a", 40), ("b", 30), ("a", 200), ("a", 40), ("a", 40), ("b", 30), ("a", 10)]
    rows = {
        "text": [f"{index}" * size for index, (_, size) in enumerate(sizes)],
        "domain": [domain for domain, _ in sizes],
        "name": [f"{index}" for index in range(len(sizes))],
    }
    write_parquet(tmp_path / "t.parquet", rows)
    capped = load(tmp_path, max_bytes_per_domain=100)
    assert [document.name for document in capped] == ["0", "3", "1", "5"]
    assert [document.name for document in load(f"z={tmp_path}", max_bytes_per_domain=100)] == ["0", "1"]


def test_a_big_table_is_not_read_beyond_the_cap(tmp_path):
    """The rows behind it are no UTF-8, which reading them would tell."""
    rows = {"text": pa.array([b"%099d." % row for row in range(1_000)] + [b"\xff" * 100] * 5_000, pa.binary())}
    write_parquet(tmp_path / "t.parquet", rows)
    assert len(load(f"z={tmp_path}", max_bytes_per_domain=5_000)) == 50
    with pytest.raises(ValueError, match=r"t\.parquet is not a Parquet or Arrow table \(Invalid UTF8"):
        load(f"z={tmp_path}")


@pytest.mark.parametrize(
    ("entry", "fields", "message"),
    [
        ("{root}/nowhere", {}, r"nowhere has no \.parquet, \.arrow, \.feather, \.ipc file"),
        ("=x", {}, "expected 'name=path' or 'path'"),
        ("{root}/plain.parquet", {}, r"has the columns text, n, but none named 'domain' .*; write 'name=path'"),
        ("z={root}/plain.parquet", {"table_columns": ("body", "", "")}, "none named 'body' of text; name yours first"),
        ("z={root}/plain.parquet", {"table_columns": ("n", "", "")}, "column 'n' has the type int64, expected text"),
        ("z={root}/plain.parquet", {"table_columns": ("text", "", "n")}, "second document named '1' in domain 'z'"),
        ("z={root}/plain.parquet", {"max_bytes_per_domain": 2}, "has no text of at most 2 bytes"),
        ("z={root}/broken.parquet", {}, "is not a Parquet or Arrow table"),
        ("z={root}/broken.arrow", {}, "is not a Parquet or Arrow table"),
        ("{root}/null.parquet", {}, "has no domain in row 1; give it one"),
        ("speeches={root}/plain.parquet", {"domains": ("speeches",)}, "speeches is taken; name it 'other-name=…'"),
    ],
)
def test_a_bad_table_says_what_where_and_what_to_do(tmp_path, entry, fields, message):
    write_parquet(tmp_path / "plain.parquet", {"text": ["one", "two"], "n": [1, 1]})
    write_parquet(tmp_path / "null.parquet", {"text": ["one", "two"], "domain": ["a", None]})
    for name in ("broken.parquet", "broken.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=message):
        load_documents(DataConfig(**{"domains": (), "tables": (entry.format(root=tmp_path),), **fields}))


# Caps on other sources


def test_folders_and_built_in_text_are_sampled_by_name(tmp_path):
    for index in range(40):
        (tmp_path / f"{index:02d}.txt").write_text(f"document {index:02d}" * 10)
    config = DataConfig(domains=("novel",), folders=(f"mine={tmp_path}",), max_bytes_per_domain=1_150)
    with pytest.raises(ValueError, match="max_bytes_per_domain is 1150, less than any document of domain 'novel' has"):
        load_documents(config)
    whole = load_documents(dataclasses.replace(config, max_bytes_per_domain=None))
    some = load_documents(dataclasses.replace(config, max_bytes_per_domain=20_000))
    novel = [document for document in some if document.domain == "novel"]
    assert 17_000 < sum(len(document.text) for document in novel) <= 20_000 and set(novel) < set(whole)
    mine = load_documents(dataclasses.replace(config, domains=()))
    assert len(mine) == 10  # of 110 bytes each
    assert [document.name for document in mine] == sorted(document.name for document in mine)
    assert max(document.name for document in mine) > "20.txt"  # from the whole folder


# De-duplication


def drop_duplicates_slowly(documents):
    """A loop over lines, the oracle."""
    texts, first_owner, kept = set(), {}, []
    for index, document in enumerate(documents):
        if document.text in texts:
            continue
        texts.add(document.text)
        lines = []
        for line in document.text.splitlines(keepends=True):
            if len(line.strip()) <= 30 or first_owner.setdefault(line.strip(), index) == index:
                lines.append(line)
        if len(text := b"".join(lines)) >= 2:
            kept.append(dataclasses.replace(document, text=text))
    return tuple(kept)


def test_duplicates_are_those_of_a_loop_over_lines(rng):
    endings = [b"\n", b"\r\n", b"\r", b"  \n", b"\n\t", b""]
    documents = []
    for index in range(300):
        lines = [b"%d a line " % rng.integers(400) * int(rng.integers(1, 6)) for _ in range(rng.integers(0, 9))]
        text = b"".join(line + endings[rng.integers(len(endings))] for line in lines)
        documents.append(Document(text, "d", str(index)))
    documents += documents[::7]
    assert data.drop_duplicates(documents) == drop_duplicates_slowly(documents)
    assert data.drop_duplicates([]) == ()


# The hub


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that serves a data set as Parquet files."""

    def do_GET(self):
        path = self.path.split("?")[0]
        files = self.server.files
        if path.startswith("/api/datasets/org/stories/"):
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return self.answer(json.dumps(listed).encode(), "application/json")
        name = path.removeprefix("/datasets/org/stories/resolve/refs%2Fconvert%2Fparquet/")
        if name in files:
            self.server.served.append((self.command, name))
            return self.answer(files[name], "application/octet-stream")
        return self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content, kind):
        self.send_response(200)
        for key, value in (("Content-Length", len(content)), ("Content-Type", kind), ("ETag", f'"{hash(content)}"')):
            self.send_header(key, str(value))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with one data set, of which one file has a table that nobody should need."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {"default/test/0000.parquet": ["test"], "default/train/0000.parquet": ["one story", "two stories"]}
    server.files, server.served = {"README.md": b"", "default/train/0001.parquet": b"no table"}, []
    for name, texts in files.items():
        write_parquet(tmp_path / "t.parquet", {"text": texts})
        server.files[name] = (tmp_path / "t.parquet").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load_from_hub(tmp_path, address, entry, cap):
    """Loads in a process of its own, since `huggingface_hub` reads its settings when it is imported."""
    program = (
        "import sys; from moe_jax.data import DataConfig, load_documents\n"
        "config = DataConfig(domains=(), hf=(sys.argv[1],), max_bytes_per_domain=int(sys.argv[2]))\n"
        "try: found = load_documents(config)\n"
        "except ValueError as error: print('error:', error)\n"
        "else: print([(d.domain, d.name, d.text.decode()) for d in found])"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", program, entry, str(cap)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_data_set_of_the_hub_is_read_no_further_than_needed(tmp_path, hub):
    address = f"http://127.0.0.1:{hub.server_port}"
    printed = load_from_hub(tmp_path, address, "org/stories:train:text", 12)
    assert printed == "[('stories', 'org/stories/default/train/0000.parquet/0', 'one story')]\n"
    assert {name for _, name in hub.served} == {"default/train/0000.parquet"}
    printed = load_from_hub(tmp_path, address, "mine=org/stories:test", 100)
    assert printed == "[('mine', 'org/stories/default/test/0000.parquet/0', 'test')]\n"
    printed = load_from_hub(tmp_path, address, "org/stories:dev", 100)
    assert "error: hf has org/stories with split 'dev'" in printed
    assert "org/stories:test:text:default, org/stories:train:text:default" in printed


def test_a_hub_that_does_not_answer_says_what_to_do(tmp_path, hub):
    printed = load_from_hub(tmp_path, f"http://127.0.0.1:{hub.server_port}", "org/nothing", 100)
    assert "error: hf has org/nothing, but the hub does not give it" in printed and "look at the name" in printed
    hub.shutdown()
    hub.server_close()
    printed = load_from_hub(tmp_path, f"http://127.0.0.1:{hub.server_port}", "org/stories", 100)
    assert "where there is no network, download it elsewhere with 'hf download --repo-type dataset" in printed
    assert "name its folder in tables" in printed


def test_an_entry_of_the_hub_is_checked():
    with pytest.raises(ValueError, match="hf has 'a b c', expected 'dataset:split:column:subset'"):
        load_documents(DataConfig(hf=("a b c",)))
