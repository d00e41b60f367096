import dataclasses
import hashlib
import io
import json
import re
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import make_corpus
from moe_jax import data
from moe_jax.data import Batch, DataConfig, Document

CORPUS = Path(data.__file__).parent / "corpus"
SHIPPED = ("speeches", "novel", "mathematics")


def make_documents(sizes, domain="d", seed=0):
    """Documents of random bytes, named in the order of `sizes`."""
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 256, size, dtype=np.uint8).tobytes() for size in sizes]
    return tuple(Document(text, domain, f"{index:03d}") for index, text in enumerate(texts))


def write_files(root, files):
    """Writes `{path: bytes}` below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def default_documents():
    return data.load_documents(DataConfig())


# The shipped text


def test_the_notice_names_every_shipped_file_with_its_licence_and_digest():
    notice = (CORPUS / "NOTICE").read_text()
    assert sorted(path.name for path in CORPUS.iterdir()) == ["NOTICE", *sorted(f"{name}.txt" for name in SHIPPED)]
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) <= 300_000
    for name in SHIPPED:
        entry = notice.split(f"{name}.txt: ")[1].split("\n\n")[0]
        assert "CC0" in entry
        assert hashlib.sha256((CORPUS / f"{name}.txt").read_bytes()).hexdigest() in entry


def test_make_corpus_keeps_whole_metamath_statements_with_their_comments():
    text = (
        "$( A $. in a comment. $)\n  ax $a |- ph $.\n\n  ${\n    h $e |- ph $.\n    t $p |- ps $= ( ax ) B $.\n  $}\n"
    )
    first, second = make_corpus.statements(text)
    assert first == "$( A $. in a comment. $)\n  ax $a |- ph $."
    assert second.startswith("  ${") and second.endswith("$}")


def test_make_corpus_excerpts_begin_and_end_with_a_sentence():
    sentence = "All work and no play. "  # 22 bytes; 72 of them are 1,584 bytes, 73 with 1,606 exceed the 1,600
    assert make_corpus.excerpt("First one. " + sentence * 100, 5) == (sentence * 72).strip()


def test_make_corpus_reads_only_the_files_that_it_was_told_to():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"package/b.txt": b"two", "package/a.txt": b"one", "../../evil.txt": b"three"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert make_corpus.read_members(buffer.getvalue(), r"package/.*\.txt") == {"a": "one", "b": "two"}


def test_make_corpus_refuses_an_archive_that_unpacks_to_too_much():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/zeros.txt")
        member.size = 65_000_000
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(SystemExit, match="larger than expected"):
        make_corpus.read_members(buffer.getvalue(), "nothing")


# Sources


def test_default_documents_are_real_text_of_four_domains(default_documents):
    assert data.domain_names(default_documents) == (*SHIPPED, "python")
    assert len({(document.domain, document.name) for document in default_documents}) == len(default_documents)
    for domain, word in {
        "speeches": b"Congress",
        "novel": b"whale",
        "mathematics": b"|- ",
        "python": b"import ",
    }.items():
        texts = [document.text for document in default_documents if document.domain == domain]
        assert sum(map(len, texts)) > 80_000
        assert sum(word in text for text in texts) > 5
    assert all(document.licence == data.BUILT_IN[document.domain].licence for document in default_documents)
    assert not any(b"\f" in document.text for document in default_documents if document.domain in SHIPPED)


def test_the_standard_library_is_sampled_by_a_rule_that_no_file_system_changes(tmp_path, monkeypatch):
    # Modules of 1,000 to 16,000 bytes count; of two equal trees written in opposite order the same ones are taken.
    files = {f"m{i}.py": bytes([65 + i]) * 2_000 for i in range(8)}
    files |= {
        "big.py": b"x" * 16_001,
        "small.py": b"x" * 999,
        "test/t.py": b"x" * 2_000,
        "p/site-packages/s.py": b"x" * 2_000,
    }
    files |= {"_sysconfigdata_x.py": b"x" * 2_000, "package/inner.py": b"y" * 2_000, "notes.txt": b"z" * 2_000}
    write_files(tmp_path / "one", files)
    write_files(tmp_path / "two", dict(reversed(files.items())))
    read = {}
    for tree in ("one", "two"):
        monkeypatch.setattr("sysconfig.get_path", lambda name, tree=tree: str(tmp_path / tree))
        read[tree] = data.load_documents(DataConfig(domains=("python",), python_bytes=9_000))
    assert read["one"] == read["two"]
    assert len(read["one"]) == 5  # 4 x 2,000 < 9,000 <= 5 x 2,000
    by_hash = sorted(
        [*(f"m{i}.py" for i in range(8)), "package/inner.py"], key=lambda n: hashlib.sha256(n.encode()).digest()
    )
    assert [document.name for document in read["one"]] == sorted(by_hash[:5])
    with pytest.raises(ValueError, match=r"python_bytes is 18001, but .* has only 18000 bytes .*; lower it"):
        data.load_documents(DataConfig(domains=("python",), python_bytes=18_001))


def test_folders_become_domains_by_name_or_by_sub_folder(tmp_path):
    write_files(
        tmp_path, {"b/two.md": b"second", "b/deep/one.txt": "Übung".encode(), "a/x.py": b"pass", "a/empty.txt": b""}
    )
    write_files(tmp_path, {"a/.hidden": b"\xff", ".git/config": b"\xff", "beside.txt": b"not in a sub-folder"})
    each = data.load_documents(DataConfig(domains=(), folders=(str(tmp_path),)))
    assert [(d.domain, d.name, d.text.decode()) for d in each] == [
        ("a", "x.py", "pass"),
        ("b", "deep/one.txt", "Übung"),
        ("b", "two.md", "second"),
    ]
    one = data.load_documents(DataConfig(domains=("novel",), folders=(f"mine={tmp_path}",)))
    assert data.domain_names(one) == ("novel", "mine")
    assert [d.name for d in one if d.domain == "mine"] == ["a/x.py", "b/deep/one.txt", "b/two.md", "beside.txt"]
    write_files(tmp_path / "x=y", {"one.txt": b"a path may have the sign that ends the name"})
    assert len(data.load_documents(DataConfig(domains=(), folders=(f"mine={tmp_path}/x=y",)))) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mine={root}/nowhere", "nowhere does not exist; expected 'name=path' or 'path'"),
        ("mine={root}/bad/latin.txt", "is not a folder"),
        ("=.", "expected 'name=path'"),
        ("mine=", "expected 'name=path'"),
        ("mine={root}/bad", r"latin.txt is not UTF-8 text \(byte 3 is 0xe9\); convert it"),
        ("mine={root}/empty", "domain 'mine' has no text; put UTF-8 files there"),
        ("{root}/empty", "has no sub-folders to make domains of; write 'name="),
        ("speeches={root}/good", "speeches is taken; name it 'other-name=…'"),
    ],
)
def test_a_bad_folder_says_what_where_and_what_to_do(tmp_path, entry, message):
    write_files(tmp_path, {"bad/latin.txt": "café".encode("latin-1"), "good/a.txt": b"text"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        data.load_documents(DataConfig(folders=(entry.format(root=tmp_path),), domains=("speeches",)))


def test_an_unknown_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'speach'.*known: speeches, novel, mathematics, python"):
        data.load_documents(DataConfig(domains=("speach",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": ()}, "are all empty"),
        ({"max_bytes_per_domain": 0}, "max_bytes_per_domain is 0"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"test_fraction": 0.9}, "their sum below 1"),
        ({"search_fraction": 0.0}, "must be above 0"),
        ({"domain_weights": (0.0, 0.0)}, "not all of them 0"),
        ({"domain_weights": (1.0, float("nan"))}, "domain_weights"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_duplicates_are_dropped_but_not_lines_repeated_in_their_own_document():
    header, short = b"# Licensed to you under the licence of licences\n", b"import os\n"
    texts = (
        header + short + b"a = 1\n" + header,
        b"  " + header + short + b"b = 2\n",
        header,
        short + b"c",
        short + b"c",
    )
    kept = data.drop_duplicates([Document(text, "d", str(i)) for i, text in enumerate(texts)])
    # 0 keeps both copies of the header; 1 loses it, indented or not; 2 has nothing left; 4 equals 3.
    assert [(d.name, d.text) for d in kept] == [
        ("0", texts[0]),
        ("1", short + b"b = 2\n"),
        ("3", short + b"c"),
    ]


# Splits


def test_splits_are_disjoint_complete_and_close_to_the_fractions(default_documents):
    splits = data.split_documents(default_documents, DataConfig())
    assert tuple(splits) == data.SPLITS
    everything = [document for members in splits.values() for document in members]
    assert len(everything) == len(default_documents)
    assert set(everything) == set(default_documents)
    described = data.describe_splits(splits)
    for domain in data.domain_names(default_documents):
        total = sum(described["domains"][domain]["bytes"].values())
        for split, fraction in zip(data.SPLITS, (0.82, 0.06, 0.06, 0.06), strict=True):
            assert described["domains"][domain]["bytes"][split] == pytest.approx(fraction * total, rel=0.15)
    for members in splits.values():
        assert data.domain_names(members) == (*SHIPPED, "python")


def test_no_long_line_of_one_split_occurs_in_another(default_documents):
    splits = data.split_documents(default_documents, DataConfig())
    lines = {
        split: {line.strip() for document in members for line in document.text.splitlines() if len(line.strip()) > 30}
        for split, members in splits.items()
    }
    assert not lines["train"] & (lines["search"] | lines["selection"] | lines["test"])
    assert not lines["search"] & lines["test"]


def test_a_split_depends_on_the_seed_and_on_its_own_domain_only():
    one, two = make_documents([100] * 40, "one"), make_documents([100] * 40, "two", seed=1)
    alone = data.split_documents(one, DataConfig())
    beside = data.split_documents((*two, *reversed(one)), DataConfig())
    other = data.split_documents(one, DataConfig(seed=1))
    for split in data.SPLITS:
        assert alone[split] == tuple(d for d in beside[split] if d.domain == "one")
    assert alone["test"] != other["test"]
    names = {domain: [d.name for d in beside["test"] if d.domain == domain] for domain in ("one", "two")}
    assert names["one"] != names["two"]


@pytest.mark.parametrize("sizes", [[10, 10, 10, 10], [10_000, 5, 5, 5, 5], [5, 5, 5, 10_000]])
def test_every_split_gets_a_document_however_uneven_they_are(sizes):
    splits = data.split_documents(make_documents(sizes), DataConfig())
    assert all(splits.values())
    assert len(splits["train"][0].text) == max(sizes)


def test_a_domain_with_too_few_documents_is_named():
    documents = (*make_documents([9] * 9, "many"), *make_documents([9] * 3, "few"))
    with pytest.raises(
        ValueError, match=r"domain 'few' has 3 documents.*train, search, selection, test.*add documents"
    ):
        data.split_documents(documents, DataConfig())


def test_the_description_is_json_and_its_digest_sees_every_byte():
    novel = [dataclasses.replace(document, licence="CC0") for document in make_documents([50] * 10, "novel")]
    documents = (*novel, *make_documents([50] * 10, "mine"))
    splits = data.split_documents(documents, DataConfig())
    described = data.describe_splits(splits)
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["domains"]["novel"]["licence"] == "CC0"
    assert described["domains"]["mine"]["licence"] is None
    assert sum(described["domains"]["mine"]["bytes"].values()) == 500
    changed = (*documents[:-1], Document(documents[-1].text[:-1] + b"\0", "mine", documents[-1].name))
    again = data.describe_splits(data.split_documents(changed, DataConfig()))
    assert again["domains"]["novel"] == described["domains"]["novel"]
    assert again["domains"]["mine"]["sha256"] != described["domains"]["mine"]["sha256"]


# Sequences


def test_pack_by_hand():
    # S = 3: "abcdefgh" has the targets bcd, efg, h. "x" has no target. "yz" has one.
    documents = [Document(b"abcdefgh", "p", "0"), Document(b"x", "q", "1"), Document(b"yz", "q", "2")]
    packed = data.pack(documents, 3)
    assert [row.tobytes() for row in packed.tokens] == [b"abcd", b"defg", b"gh\0\0", b"yz\0\0"]
    np.testing.assert_array_equal(packed.mask, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(packed.domain, [0, 0, 0, 1])
    np.testing.assert_array_equal(packed.document, [0, 0, 0, 2])
    assert packed.domain_names == ("p", "q") and len(packed) == 4
    assert (packed.tokens.dtype, packed.mask.dtype, packed.domain.dtype) == (np.uint8, np.bool_, np.int32)


def test_pack_with_context_by_hand():
    # S = 4, context 2: windows two bytes apart; after the first one only the last two targets of a window are new.
    packed = data.pack([Document(b"abcdefgh", "p", "0")], 4, context=2)
    assert [row.tobytes() for row in packed.tokens] == [b"abcde", b"cdefg", b"efgh\0"]
    np.testing.assert_array_equal(packed.is_scored, [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]])
    with pytest.raises(ValueError, match=r"context=4 must be in \[0, sequence_length=4\)"):
        data.pack([Document(b"abcdefgh", "p", "0")], 4, context=4)


@pytest.mark.parametrize("context", [0, 1, 5])
@pytest.mark.parametrize("size", [2, 7, 8, 9, 40])
def test_pack_scores_every_byte_but_the_first_exactly_once(context, size):
    document = make_documents([size])[0]
    packed = data.pack([document], 7, context=context)
    starts = np.arange(len(packed))[:, None] * (7 - context)
    positions = (starts + np.arange(1, 8)[None, :])[packed.is_scored]
    np.testing.assert_array_equal(np.sort(positions), np.arange(1, size))


@pytest.mark.parametrize("sequence_length", [1, 7, 128])
def test_pack_predicts_every_byte_but_the_first_exactly_once(sequence_length):
    documents = make_documents([1, 2, 3, 128, 129, 130, 300])
    packed = data.pack(documents, sequence_length)
    for index, document in enumerate(documents):
        rows = packed.document == index
        assert packed.tokens[rows, 1:][packed.mask[rows, 1:]].tobytes() == document.text[1:]
    assert packed.mask[:, :2].all()  # no row without a target


def test_pack_refuses_documents_with_nothing_to_predict():
    with pytest.raises(ValueError, match="none of the 2 documents has two tokens"):
        data.pack([Document(b"x", "d", "0"), Document(b"", "d", "1")], 8)


def test_balanced_subset_draws_the_same_number_of_every_domain():
    packed = data.pack(make_documents([500, 300], "p") + make_documents([200], "q", seed=1), 10)
    subset = data.balanced_subset(packed, 12, jax.random.key(3))
    np.testing.assert_array_equal(np.bincount(subset.domain), [12, 12])
    whole = {row.tobytes() for row in packed.tokens}
    assert len({row.tobytes() for row in subset.tokens} & whole) == 24  # distinct, and all from the sequences
    again = data.balanced_subset(packed, 12, jax.random.key(3))
    np.testing.assert_array_equal(subset.tokens, again.tokens)
    assert not np.array_equal(subset.tokens, data.balanced_subset(packed, 12, jax.random.key(4)).tokens)
    with pytest.raises(ValueError, match="domain 'q' has 20 sequences, fewer than the 21"):
        data.balanced_subset(packed, 21, jax.random.key(3))


# Training batches


def assert_equal_batches(left: Batch, right: Batch):
    for field in ("tokens", "mask", "domain"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))


def test_batches_are_bit_identical_wherever_a_run_starts_and_however_long_it_is():
    documents = make_documents([400, 90, 20], "p") + make_documents([300], "q")
    config = DataConfig(sequence_length=32, batch_size=6)
    key = jax.random.key(0)
    whole = list(data.train_batches(documents, config, key, 0, 12))
    assert len(whole) == 12
    for start, length in ((7, 12), (11, 30), (0, 1)):
        for batch, step in zip(
            data.train_batches(documents, config, key, start, length), range(start, 12), strict=False
        ):
            assert_equal_batches(batch, whole[step])
    assert list(data.train_batches(documents, config, key, 12, 12)) == []
    assert len({batch.tokens.tobytes() for batch in whole}) == 12
    other = next(data.train_batches(documents, config, jax.random.key(1), 0, 12))
    assert not np.array_equal(other.tokens, whole[0].tokens)


def test_a_crop_is_text_of_one_document_of_its_domain():
    documents = make_documents([60, 90, 20, 33], "p") + make_documents([300], "q", seed=5)
    config = DataConfig(sequence_length=32, batch_size=9)
    padded = 0
    for batch in data.train_batches(documents, config, jax.random.key(2), 0, 20):
        assert batch.tokens.shape == batch.mask.shape == (9, 33)
        assert (batch.tokens.dtype, batch.mask.dtype, batch.domain.dtype) == (np.int32, np.bool_, np.int32)
        for tokens, mask, domain in zip(batch.tokens, batch.mask, batch.domain, strict=True):
            crop = tokens[mask].astype(np.uint8).tobytes()
            owners = [d for d in documents if crop in d.text and d.domain == "pq"[domain]]
            assert len(owners) == 1
            assert len(crop) == min(33, len(owners[0].text))
            assert (tokens[~mask] == 0).all()
            padded += not mask.all()
    assert padded > 0


def test_documents_are_drawn_by_their_bytes_and_their_crops_equally():
    # S = 3: "abcdef", 6 of 8 bytes, has the crops abcd, bcde, cdef; "xy", 2 of 8, is one padded crop: a quarter each.
    documents = [Document(b"abcdef", "d", "0"), Document(b"xy", "d", "1")]
    config = DataConfig(sequence_length=3, batch_size=100)
    batches = data.train_batches(documents, config, jax.random.key(0), 0, 40)
    first_bytes = np.concatenate([batch.tokens[:, 0] for batch in batches])
    counts = [int((first_bytes == ord(letter)).sum()) for letter in "abcx"]
    assert sum(counts) == 4_000
    # The standard error of a count is sqrt(4000 * 1/4 * 3/4) = 27; five of them.
    assert all(abs(count - 1_000) < 5 * 27 for count in counts)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((), (5.0, 5.0, 5.0)), ((1.0, 2.0, 0.0), (5.0, 10.0, 0.0)), ((1.0, 1.0, 4.0), (2.5, 2.5, 10.0))],
)
def test_every_batch_keeps_the_domains_shares_to_less_than_a_row(weights, shares):
    documents = sum((make_documents([60, 80], name) for name in "pqr"), ())
    config = DataConfig(sequence_length=8, batch_size=15, domain_weights=weights)
    counts = [
        np.bincount(b.domain, minlength=3) for b in data.train_batches(documents, config, jax.random.key(0), 0, 30)
    ]
    assert (np.abs(np.array(counts) - np.array(shares)[None, :]) < 1 + 1e-9).all()
    assert np.mean(counts, axis=0) == pytest.approx(shares, abs=0.5)


def test_weights_are_one_a_domain():
    with pytest.raises(ValueError, match="domain_weights has 2 numbers, expected one a domain: p"):
        data.train_batches(make_documents([9], "p"), DataConfig(domain_weights=(1.0, 1.0)), jax.random.key(0), 0, 1)


def test_a_batch_costs_less_than_two_milliseconds_of_processor_time(default_documents):
    config = DataConfig(batch_size=64)
    batches = data.train_batches(default_documents, config, jax.random.key(0), 0, 210)
    for _ in range(10):
        next(batches)
    started = time.process_time()
    for _ in range(200):
        next(batches)
    assert (time.process_time() - started) / 200 < 0.002  # 0.3 ms on two cores of a server


def test_no_shipped_text_names_a_path_of_the_machine_that_made_it():
    for path in CORPUS.iterdir():
        assert not re.search(rb"/(home|root|tmp|work)/", path.read_bytes())
