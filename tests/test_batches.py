"""Packing, shares, and the order of batches: over processes, restarts, workers, and files of tokens."""

import dataclasses
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import pytest

from moe_jax import data
from moe_jax.data import Batch, DataConfig, Document
from moe_jax.data.mixture import domain_shares
from moe_jax.data.packing import best_fit, pack_rows, ranges
from moe_jax.data.step_sources import STEP_SOURCES
from moe_jax.data.token_file import TokenSpan, flatten, store_tokens

KEY = jax.random.key(0)
FIELDS = [field.name for field in dataclasses.fields(Batch)]


def make_documents(sizes, domain="d", first=0):
    """Documents whose tokens, counted from `first`, occur once in all of them."""
    starts = first + np.cumsum([0, *sizes[:-1]])
    ids = [np.arange(start, start + size, dtype=np.int32) for start, size in zip(starts, sizes, strict=True)]
    return tuple(Document(b"x" * len(own), domain, str(i), own) for i, own in enumerate(ids))


def assert_equal_batches(ours, theirs):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


def join_rows(parts):
    """The batch that processes hold together."""
    return Batch(
        *(None if getattr(parts[0], f) is None else np.concatenate([getattr(p, f) for p in parts]) for f in FIELDS)
    )


def test_packing_by_hand():
    # Rows of 4; documents of 6, 3, 1, 2 and 4 tokens lie at 0, 6, 9, 10, 12. The first and the last fill a row each.
    # Left are 2, 3, 1, 2. The 3 opens a row; the 2s share one; the 1 goes where it fits best, to the 3.
    rows = pack_rows(np.array([0, 6, 9, 10, 12]), np.array([6, 3, 1, 2, 4]), 4)
    np.testing.assert_array_equal(rows.first, [0, 1, 2, 4, 6])
    np.testing.assert_array_equal(rows.starts, [0, 12, 6, 9, 4, 10])
    np.testing.assert_array_equal(rows.sizes, [4, 4, 3, 1, 2, 2])
    np.testing.assert_array_equal(rows.document, [0, 4, 1, 2, 0, 3])


def test_best_fit_equals_a_search_through_all_bins(rng):
    sizes = rng.integers(1, 17, 200)
    rooms = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [bin_ for bin_, room in enumerate(rooms) if room >= size]
        chosen = min(fitting, key=lambda bin_: rooms[bin_]) if fitting else len(rooms)
        rooms[chosen:] = [rooms[chosen] - size if fitting else 16 - size, *rooms[chosen + 1 :]]
    bins = best_fit(sizes, 16)
    filled = np.bincount(bins, sizes)
    assert sorted(16 - filled) == sorted(rooms) and filled.max() <= 16


def test_ranges():
    np.testing.assert_array_equal(ranges(np.array([5, 0, 9]), np.array([2, 0, 3]), 10), [5, 15, 9, 19, 29])


def test_every_token_is_used_exactly_once_an_epoch():
    """Two domains, each with its own epochs; segments are runs of one document, and numbered from 1 in each row."""
    documents = make_documents([23, 4, 9, 1, 30, 6], "p") + make_documents([7, 3, 12], "q", first=1000)
    config = DataConfig(sequence_length=8, batch_size=4, packing="pack", domain_weights=(3.0, 1.0))
    batches = list(data.train_batches(documents, config, KEY, 0, 12))
    for domain, num_rows in ((0, 9), (1, 3)):  # 73 tokens and 22 in rows of 9
        rows = [(b, i) for b in batches for i in np.flatnonzero(b.domain == domain)]
        orders = []
        for start in range(0, len(rows) - num_rows + 1, num_rows):
            epoch = rows[start : start + num_rows]
            tokens = [batch.tokens[i][batch.mask[i]] for batch, i in epoch]
            expected = np.concatenate([d.ids for d in documents if d.domain == "pq"[domain]])
            np.testing.assert_array_equal(np.sort(np.concatenate(tokens)), expected)
            orders.append([int(row[0]) for row in tokens])
        assert len(orders) > 1 and orders[0] != orders[1]
        for batch, i in rows:
            assert (batch.tokens[i][~batch.mask[i]] == 0).all() and (batch.document[i][~batch.mask[i]] == -1).all()
            np.testing.assert_array_equal(batch.mask[i], batch.segments[i] > 0)
            for segment in range(1, batch.segments[i].max() + 1):
                place = np.flatnonzero(batch.segments[i] == segment)
                text, (owner,) = batch.tokens[i, place], set(batch.document[i, place])
                assert (np.diff(place) == 1).all() and (np.diff(text) == 1).all()
                assert text[0] in documents[owner].ids and text[-1] in documents[owner].ids


def test_a_crop_knows_its_document():
    documents = make_documents([23, 4], "p") + make_documents([40], "q", first=1000) + make_documents([9], "p", 500)
    for batch in data.train_batches(documents, DataConfig(sequence_length=8, batch_size=6), KEY, 0, 9):
        assert batch.segments is None
        for tokens, mask, owners in zip(batch.tokens, batch.mask, batch.document, strict=True):
            (owner,) = set(owners[mask])
            assert np.isin(tokens[mask], documents[owner].ids).all() and (owners[~mask] == -1).all()


@pytest.mark.parametrize("packing", STEP_SOURCES)
def test_the_order_is_one_for_any_number_of_processes_and_when_it_changes_at_a_restart(packing):
    documents = make_documents([23, 4, 9, 1, 30, 6], "p") + make_documents([7, 3, 12], "q")
    config = DataConfig(sequence_length=8, batch_size=8, packing=packing)
    whole = list(data.train_batches(documents, config, KEY, 0, 12))
    for start, stop, count in ((0, 12, 2), (0, 4, 4), (4, 7, 1), (7, 12, 2), (11, 12, 4)):
        hosts = [data.train_batches(documents, config, KEY, start, 12, index, count) for index in range(count)]
        for step in range(start, stop):
            parts = [next(host) for host in hosts]
            assert all(len(part.tokens) == 8 // count for part in parts)
            assert_equal_batches(join_rows(parts), whole[step])
    assert len({batch.tokens.tobytes() for batch in whole}) == 12


def test_processes_that_cannot_share_a_batch_are_told_what_to_do():
    with pytest.raises(ValueError, match=r"batch_size is 6, which 4 processes cannot share.*such as 8, or use fewer"):
        data.train_batches(make_documents([9]), DataConfig(batch_size=6), KEY, 0, 1, 0, 4)


@pytest.mark.parametrize(("packing", "workers"), [("crop", 1), ("pack", 2)])
def test_worker_processes_make_the_same_batches(packing, workers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = store(make_documents([23, 4, 9, 1, 30, 6], "p") + make_documents([7, 3, 12], "q", first=1000))
    config = DataConfig(sequence_length=8, batch_size=4, packing=packing)
    alone = list(data.train_batches(documents, config, KEY, 3, 12))
    together = list(data.train_batches(documents, dataclasses.replace(config, workers=workers), KEY, 3, 12))
    assert len(together) == 9
    for ours, theirs in zip(together, alone, strict=True):
        assert_equal_batches(ours, theirs)


def test_workers_end_when_training_is_killed():
    program = (
        "import jax, multiprocessing, os, signal\n"
        "from moe_jax import data\n"
        "documents = [data.Document(bytes(100), 'd', '0')]\n"
        "batches = data.train_batches(documents, data.DataConfig(workers=2), jax.random.key(0), 0, 1000)\n"
        "next(batches)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    workers = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL and len(workers) == 2

    def is_alive(worker):
        status = pathlib.Path("/proc", worker, "status")
        return status.exists() and "State:\tZ" not in status.read_text()  # a zombie only waits to be counted

    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "the workers live on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, (1 / 2, 1 / 2)),
        ({"domain_temperature": 1.0}, (1 / 5, 4 / 5)),  # 100 and 400 bytes
        ({"domain_temperature": 2.0}, (1 / 3, 2 / 3)),  # 10 and 20
        ({"domain_temperature": 1.0, "domain_weights": (3.0, 1.0)}, (3 / 4, 1 / 4)),
    ],
)
def test_temperature_evens_out_the_shares_of_domains(settings, shares):
    documents = make_documents([60, 40], "p") + make_documents([400], "q")
    config = DataConfig(batch_size=30, sequence_length=4, **settings)
    np.testing.assert_allclose(domain_shares(documents, config), shares)
    for packing in STEP_SOURCES:
        batches = data.train_batches(documents, dataclasses.replace(config, packing=packing), KEY, 0, 40)
        counts = np.array([np.bincount(batch.domain, minlength=2) for batch in batches])
        assert (np.abs(counts - 30 * np.array(shares)[None, :]) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domain_temperature": 0.0}, "domain_temperature is 0.0, expected a number above 0"),
        ({"packing": "fit"}, "packing is 'fit', expected 'crop' or 'pack'"),
        ({"tokenizer": "bpe:many"}, "tokenizer is 'bpe:many', expected 'bpe:' and a number of tokens"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


# Files of tokens


def store(documents):
    """The documents with their tokens in a file."""
    spans = store_tokens([d.text for d in documents], b"test", np.dtype(np.uint16), lambda: (d.ids for d in documents))
    return tuple(dataclasses.replace(d, ids=span) for d, span in zip(documents, spans, strict=True))


def test_tokens_in_a_file_are_made_once_and_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = make_documents([23, 1, 30])
    stored = store(documents)
    for ours, theirs in zip(stored, documents, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.ids)
    texts = [document.text for document in documents]
    again = store_tokens(texts, b"test", np.dtype(np.uint16), lambda: pytest.fail("made twice"))
    assert [span[1:] for span in again] == [(0, 23), (23, 24), (24, 54)]
    other = store_tokens(texts, b"other tokenizer", np.dtype(np.uint16), lambda: (d.ids for d in documents))
    assert other[0].file.path != again[0].file.path
    (folder,) = {path.parent.parent for path in tmp_path.rglob("tokens") if path.is_file()}
    assert len(list(folder.iterdir())) == 2  # nothing half-made stays
    copy = pickle.loads(pickle.dumps(flatten([d.ids for d in stored[::-1]])))
    np.testing.assert_array_equal(copy.starts, [24, 23, 0])
    np.testing.assert_array_equal(copy.tokens, np.arange(54))


def test_a_failure_leaves_no_file_that_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail():
        yield np.arange(3)
        raise RuntimeError("the tokenizer failed")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="the tokenizer failed"):
            store_tokens([b"one", b"two"], b"test", np.dtype(np.uint16), fail)
    assert not list((tmp_path / "moe_jax" / "tokens").iterdir())


def test_a_large_text_is_mapped_and_gives_the_same_batches(tmp_path, monkeypatch, rng):
    """9 MB of bytes: what worker processes are sent does not grow with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = tuple(Document(rng.bytes(450_000), "d", str(i)) for i in range(20))
    mapped = data.tokenize(documents, None)
    assert all(isinstance(document.ids, TokenSpan) for document in mapped)
    assert data.tokenize(documents[:2], None) == documents[:2] and data.tokenize(documents[:2], None)[0].ids is None
    config = DataConfig(sequence_length=512, batch_size=4)
    source = STEP_SOURCES["crop"](mapped, config, KEY, 10, slice(0, 4))
    assert isinstance(source, grain.sources.RandomAccessDataSource) and len(pickle.dumps(source)) < 10_000
    ours, theirs = (data.train_batches(d, config, KEY, 0, 10) for d in (mapped, documents))
    for step_ours, step_theirs in zip(ours, theirs, strict=True):
        assert_equal_batches(step_ours, step_theirs)
    scored = [data.pack(d[:1], 512) for d in (mapped, documents)]
    np.testing.assert_array_equal(scored[0].tokens, scored[1].tokens)
    np.testing.assert_array_equal(scored[0].num_bytes, scored[1].num_bytes)
