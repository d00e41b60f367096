"""Our own BPE: the same from the same text, without loss, blind to held-out text; bits per byte with it by hand."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from experiments.text import read_text, read_tokens
from moe_jax import data
from moe_jax.cli import main
from moe_jax.data import DataConfig, Document
from moe_jax.runs import ConfigError
from moe_jax.training.evaluation import LOG2, bits_per_byte

SPEECHES = data.load_documents(DataConfig(domains=("speeches",)))
TEXTS = [document.text.decode() for document in SPEECHES]
TOKENIZER = data.train_tokenizer(TEXTS, 600)
TOKEN_BYTES = TOKENIZER.token_bytes()


def test_the_same_text_gives_the_same_file_in_another_process():
    program = (
        "import hashlib; from moe_jax import data\n"
        "texts = [d.text.decode() for d in data.load_documents(data.DataConfig(domains=('speeches',)))]\n"
        "print(hashlib.sha256(data.train_tokenizer(texts, 600).files['tokenizer.json']).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parent.parent)
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert other.strip() == hashlib.sha256(TOKENIZER.files["tokenizer.json"]).hexdigest()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_every_byte_counts_once(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKEN_BYTES[ids].sum() == len(text.encode())


def test_it_has_the_asked_size_and_shortens_text():
    assert TOKENIZER.vocab_size == 600 and TOKENIZER.eos_id == 0 and TOKENIZER.decode([0], False) == "<|endoftext|>"
    lengths = [len(TOKENIZER.encode(text)) for text in TEXTS]
    assert sum(map(len, TEXTS)) / sum(lengths) > 2
    assert data.train_tokenizer(["aaaa"], 600).vocab_size < 262  # there is nothing more to merge
    with pytest.raises(ValueError, match="vocab_size is 256, expected at least 257"):
        data.train_tokenizer(TEXTS, 256)


def test_documents_end_with_the_end_of_text_and_keep_count_of_their_bytes():
    documents = (Document("Übung".encode(), "d", "0"), Document(b"The Congress", "d", "1"), Document(b"\xff", "d", "2"))
    with_end = data.tokenize(documents, TOKENIZER, adds_end=True)
    plain = data.tokenize(documents, TOKENIZER)
    for ended, other in zip(with_end, plain, strict=True):
        np.testing.assert_array_equal(ended.tokens, [*other.tokens, 0])
        assert ended.byte_counts.sum() == len(ended.text)
        assert TOKENIZER.decode(other.tokens) == ended.text.decode(errors="replace")
    pieces = [TOKENIZER.decode([index]) for index in with_end[1].tokens[:-1]]
    np.testing.assert_array_equal(with_end[1].byte_counts, [*map(len, pieces), 0])


def test_bits_per_byte_by_hand():
    """Tokens of 5, 1, 2 and 0 bytes. Windows of 2 targets score (1, 2) and (0): 3 bytes, for which 9 bits are spent."""
    table = np.array([0, 1, 2, 5])
    known = Document(b"eightbyt", "d", "0", np.array([3, 1, 2, 0], np.int32), token_bytes=table)
    packed = data.pack([known], 2)
    np.testing.assert_array_equal(packed.num_bytes, [3, 0])
    bits = bits_per_byte(packed, LOG2 * np.array([6.0, 3.0]), packed.num_bytes)
    assert bits["all"] == bits["d"] == pytest.approx(3.0)
    # Where the tokenizer does not tell, or what it tells is not the text, 8 bytes are 2 for each of 4 tokens.
    for vague in (None, table + 1):
        spread = data.pack([Document(known.text, "d", "0", known.ids, token_bytes=vague)], 2)
        np.testing.assert_array_equal(spread.num_bytes, [4, 2])
    np.testing.assert_array_equal(data.pack([Document(b"abcd", "d", "0")], 2).num_bytes, [2, 1])


@pytest.fixture
def corpus(tmp_path):
    """A configuration with 40 documents, each with a word of its own, many times."""
    for i in range(40):
        word = f"word{'abcdefghij'[i % 10]}{'klmn'[i // 10]}xyz"
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(f"{word} and the others\n{TEXTS[0][i * 50 : i * 50 + 300]}\n" * 9)
    return DataConfig(domains=(), folders=(f"mine={tmp_path}/text",), tokenizer="bpe:700")


def test_a_run_trains_its_tokenizer_on_its_training_split_and_keeps_it(corpus, tmp_path):
    with Progress(disable=True) as display:
        splits = read_tokens(corpus, 700, tmp_path / "run", display)
        kept = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
        expected = data.train_tokenizer([d.text.decode() for d in splits["train"]], 700)
        assert kept == expected.files["tokenizer.json"]
        for split, documents in splits.items():
            words = [document.text.split()[0] for document in documents]
            lengths = [len(expected.encode(" " + word.decode())) for word in words]
            assert max(lengths) < min(lengths) + 3 if split == "train" else min(lengths) > 1
        # A resumed run opens what is there, whatever would be trained now.
        other = data.train_tokenizer(TEXTS[:5], 300)
        (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_bytes(other.files["tokenizer.json"])
        again = read_tokens(corpus, 700, tmp_path / "run", display)
        document = again["test"][0]
        np.testing.assert_array_equal(document.tokens, [*other.encode(document.text.decode()), other.eos_id])


def test_what_does_not_fit_is_refused(corpus, tmp_path):
    with Progress(disable=True) as display:
        with pytest.raises(ConfigError, match=r"vocab_size is 256, but the text has \d+ kinds.*set --config.model"):
            read_tokens(corpus, 256, tmp_path / "run", display)
        nowhere = DataConfig(domains=("speeches",), tokenizer=str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match=r"config.data.tokenizer: .*nowhere has no tokenizer.json"):
            read_tokens(nowhere, 256, tmp_path / "run", display)
    with pytest.raises(ConfigError, match="tokenizer is 'bpe:700', but this experiment works on bytes"):
        read_text(corpus)


def test_the_command_trains_on_files_and_folders(tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text(TEXTS[0])
    (tmp_path / "two.txt").write_text(TEXTS[1])
    command = ["train-tokenizer", "--vocab-size=400", f"{tmp_path}/out", f"{tmp_path}/books", f"{tmp_path}/two.txt"]
    assert main(command) == 0
    assert "400 tokens" in capsys.readouterr().out
    opened = data.open_tokenizer(tmp_path / "out")
    assert opened.files == data.train_tokenizer(TEXTS[:2], 400).files
    for argv, message in (
        (command, "has a tokenizer already; choose another folder"),
        ([*command[:2], f"{tmp_path}/new", f"{tmp_path}/three.txt"], "cannot read"),
        (["train-tokenizer", "--vocab-size=9", f"{tmp_path}/new", f"{tmp_path}/two.txt"], "vocab_size is 9"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err
