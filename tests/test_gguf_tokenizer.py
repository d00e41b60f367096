import json

import gguf
import numpy as np
import pytest

from moe_jax import data
from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.hub.gguf_tokenizer import tokenizer_files
from moe_jax.data.tokenizer import TextTokenizer
from tests.synthetic_gguf import write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = (
    "The quick brown fox's tail; it's  two spaces, don't!",
    "def f(x):\n    return x**2  # squared\n\n\tif a:\n\t\tb = {'k': [1, 2.5e-3]}\n",
    "1234567890 3.14159 1,000,000 in 1991, 50% of 0x1F",
    "Grüße, Ελλάδα, Россия, 世界, こんにちは, العربية 😀 👩‍👩‍👧 e\u0301 \u00a0\u3000\u200b",
    "   \n\n  \t x   y    z     \r\n\r\n  ",
    "a<|im_end|>b <|im_start|>user\nhi<|endoftext|>",
    "\x00\x01\x7f",
    " ",
    "",
)
# transformers knows no pre-tokenizer "smollm" and cuts "  12" as GPT-2 does, " ", " 12", where each digit stands alone.
DIGITS_BEHIND_BLANKS = "  12 ½"


@pytest.fixture(scope="module")
def real(smollm2):
    return TextTokenizer(tokenizer_files(GGUFFile(smollm2)), str(smollm2))


@pytest.mark.parametrize("text", [*TEXTS, DIGITS_BEHIND_BLANKS])
def test_text_comes_back_from_the_real_tokenizer(real, text):
    ids = real.encode(text)
    assert real.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= index < 49_152 for index in ids)


def test_the_real_tokenizer_cuts_digits_and_finds_special_tokens(real, smollm2):
    tokens = GGUFFile(smollm2).metadata["tokenizer.ggml.tokens"]

    def pieces(text):
        return [tokens[index] for index in real.encode(text)]

    assert pieces("Hello world") == ["Hello", "Ġworld"]
    assert pieces("in 1991") == ["in", "Ġ", "1", "9", "9", "1"]
    assert pieces("   42") == ["ĠĠĠ", "4", "2"]
    assert pieces("a<|im_end|>\n") == ["a", "<|im_end|>", "Ċ"]
    assert (real.vocab_size, real.bos_id, real.eos_id, real.stop_ids) == (49_152, 1, 2, (2,))


def test_the_corpus_takes_about_four_bytes_a_token_and_comes_back(real):
    documents = data.load_documents(data.DataConfig(domains=("speeches",)))
    text = "\n".join(document.text.decode() for document in documents)
    ids = real.encode(text)
    assert real.decode(ids) == text
    assert 4 < len(text.encode()) / len(ids) < 5


@pytest.mark.parity
def test_ids_equal_those_of_the_conversion_of_transformers(real, smollm2):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in TEXTS:
        assert real.encode(text) == theirs.encode(text), text
    assert real.encode(DIGITS_BEHIND_BLANKS) != theirs.encode(DIGITS_BEHIND_BLANKS)


def relabelled(smollm2, path, pre):
    """The real vocabulary with another pre-tokenizer."""
    metadata = {key: value for key, value in GGUFFile(smollm2).metadata.items() if key.startswith("tokenizer.")}
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"].tolist()
    settings = {"llama.context_length": 8192, "tokenizer.ggml.pre": pre}
    return write_gguf(path, {**metadata, **settings}, {"w": np.ones(4, np.float32)})


@pytest.mark.parity
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_other_pre_tokenizers_cut_as_those_of_transformers(pre, smollm2, tmp_path):
    from transformers import AutoTokenizer

    path = relabelled(smollm2, tmp_path / "model.gguf", pre)
    ours = TextTokenizer(tokenizer_files(GGUFFile(path)))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (*TEXTS, DIGITS_BEHIND_BLANKS):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text


# SentencePiece


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """A small SentencePiece model with the settings of Llama 2, trained on the shipped text."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    documents = data.load_documents(data.DataConfig(domains=("speeches", "novel")))
    (folder / "text.txt").write_bytes(b"\n".join(document.text for document in documents))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentencepiece_metadata(processor):
    """What llama.cpp's converter writes of a SentencePiece model."""

    def type_of(index):
        if processor.IsUnknown(index):
            return UNKNOWN
        if processor.IsControl(index):
            return CONTROL
        if processor.IdToPiece(index) == "<tool>":
            return USER_DEFINED
        return BYTE if processor.IsByte(index) else NORMAL

    size = range(processor.GetPieceSize())
    return {
        "llama.context_length": 2048,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.IdToPiece(index) for index in size],
        "tokenizer.ggml.scores": [processor.GetScore(index) for index in size],
        "tokenizer.ggml.token_type": [type_of(index) for index in size],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


def rebuild(path, metadata):
    return TextTokenizer(tokenizer_files(GGUFFile(write_gguf(path, metadata, {"w": np.ones(4, np.float32)}))))


def test_ids_equal_those_of_sentencepiece(processor, tmp_path):
    ours = rebuild(tmp_path / "model.gguf", sentencepiece_metadata(processor))
    documents = data.load_documents(data.DataConfig(domains=("mathematics", "python")))
    texts = [text for text in TEXTS if text and "\x00" not in text]
    for text in (*texts, *(document.text.decode()[:2000] for document in documents)):
        expected = processor.EncodeAsIds(text)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.decode(expected) == processor.DecodeIds(expected) == text


def test_a_text_begins_with_bos_unless_the_file_says_no(processor, tmp_path):
    metadata = sentencepiece_metadata(processor)
    bare = processor.EncodeAsIds("a cat")
    bos, eos = processor.bos_id(), processor.eos_id()
    assert rebuild(tmp_path / "1.gguf", metadata).encode("a cat") == [bos, *bare]
    flags = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert rebuild(tmp_path / "2.gguf", metadata | flags).encode("a cat") == [*bare, eos]
    no_blank = rebuild(tmp_path / "3.gguf", metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert no_blank.decode(no_blank.encode(" a cat")) == " a cat"
    assert no_blank.encode(" a cat", add_special_tokens=False) == bare


def test_special_tokens_are_found_and_text_behind_them_begins_anew(processor, tmp_path):
    ours = rebuild(tmp_path / "model.gguf", sentencepiece_metadata(processor))
    ids = ours.encode("<s>a cat</s><tool>", add_special_tokens=False)
    assert ids == [processor.bos_id(), *processor.EncodeAsIds("a cat"), processor.eos_id(), processor["<tool>"]]
    assert ours.decode(ids) == "a cat<tool>"  # <tool> is a user's token and no special one


@pytest.mark.parity
def test_transformers_reads_the_files_and_gives_the_same_ids(processor, tmp_path):
    from transformers import AutoTokenizer

    ours = rebuild(tmp_path / "model.gguf", sentencepiece_metadata(processor))
    ours.save(tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in (*TEXTS, "<s>a cat</s><tool>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# What is refused

TINY = {
    "llama.context_length": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
    "tokenizer.ggml.token_type": [NORMAL, NORMAL, NORMAL, CONTROL],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


def test_a_tiny_vocabulary_worked_by_hand(tmp_path):
    extra = {"tokenizer.ggml.eot_token_id": 2, "tokenizer.chat_template": "{{ eos_token }}"}
    path = write_gguf(tmp_path / "tiny.gguf", TINY | extra, {"w": np.ones(4, np.float32)})
    files = tokenizer_files(GGUFFile(path))
    ours = TextTokenizer(files)
    assert ours.encode("abb<end>a") == [2, 1, 3, 0]
    assert ours.stop_ids == (2, 3)  # the end of a turn and the end of a text
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": None,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
    }
    assert ours.apply_chat_template([{"role": "user", "content": "x"}]) == "<end>"


@pytest.mark.parametrize("bos", ["$B", "a:1", "$0", " "])
def test_a_special_token_may_be_spelt_in_any_way(bos, tmp_path):
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "ab", bos], "tokenizer.ggml.bos_token_id": 3}
    metadata = TINY | tokens | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = write_gguf(tmp_path / "tiny.gguf", metadata, {"w": np.ones(4, np.float32)})
    ours = TextTokenizer(tokenizer_files(GGUFFile(path)))
    assert ours.encode("ab") == [3, 2, 3]
    assert ours.decode([3, 2, 3], skip_special_tokens=False) == f"{bos}ab{bos}"


def test_llama_3_takes_whole_words_of_its_vocabulary_without_merging(tmp_path):
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "<bos>"], "tokenizer.ggml.pre": "llama-bpe"}
    types = {"tokenizer.ggml.token_type": [NORMAL] * 5 + [CONTROL], "tokenizer.ggml.bos_token_id": 5}
    path = write_gguf(tmp_path / "llama3.gguf", TINY | tokens | types, {"w": np.ones(4, np.float32)})
    # No merge makes "abc", which is a token all the same; "abca" is none, so the merge a+b is all that happens.
    ours = TextTokenizer(tokenizer_files(GGUFFile(path)))
    assert ours.encode("abc") == [5, 4]
    assert ours.encode("abca") == [5, 3, 2, 0]


REFUSED = {
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is missing, expected a list of strings"),
    "no kind": ({"tokenizer.ggml.model": None}, "'tokenizer.ggml.model' is missing, expected a string"),
    "kind": ({"tokenizer.ggml.model": "t5"}, r"'tokenizer.ggml.model' is 't5', expected one of \['gpt2', 'llama'\]"),
    "no cut": ({"tokenizer.ggml.pre": None}, r"'tokenizer.ggml.pre' is '', expected one of \['gpt-2', "),
    "cut": ({"tokenizer.ggml.pre": "tekken"}, "'tokenizer.ggml.pre' is 'tekken', expected one of"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "b", "b", "<end>"]}, "1 of the 4 tokens occur twice"),
    "types": ({"tokenizer.ggml.token_type": [1]}, r"token_type' is array.*, expected a list of 4 numbers"),
    "merge": ({"tokenizer.ggml.merges": ["a b", "ab"]}, "merge 'ab' is not two tokens with a blank between"),
    "unknown part": ({"tokenizer.ggml.merges": ["a z"]}, "tokens and merges make no tokenizer: .*`z`"),
    "id": ({"tokenizer.ggml.eos_token_id": 4}, "'tokenizer.ggml.eos_token_id' is 4, expected less than 4"),
    "flag": ({"tokenizer.ggml.add_bos_token": 1}, "'tokenizer.ggml.add_bos_token' is 1, expected true or false"),
    "template": ({"tokenizer.chat_template": 1}, "'tokenizer.chat_template' is 1, expected a string"),
    "normaliser": ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, r"not handled .*precompiled_charsmap = array"),
    "scores": ({"tokenizer.ggml.model": "llama"}, "'tokenizer.ggml.scores' is missing, expected a list of 4 numbers"),
}


@pytest.mark.parametrize("changes,message", REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_by_name(changes, message, tmp_path):
    metadata = {key: value for key, value in (TINY | changes).items() if value is not None}
    file = GGUFFile(write_gguf(tmp_path / "tiny.gguf", metadata, {"w": np.ones(4, np.float32)}))
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_files(file)
    assert str(file.path) in str(caught.value)


def test_the_types_of_tokens_are_those_of_the_package():
    names = {"NORMAL": NORMAL, "UNKNOWN": UNKNOWN, "CONTROL": CONTROL, "USER_DEFINED": USER_DEFINED, "BYTE": BYTE}
    assert {name: gguf.TokenType[name].value for name in names} == names
