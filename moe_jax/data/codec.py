"""Libraries that turn text into token ids, behind one set of functions: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


class Codec(NamedTuple):
    """A tokenizer as functions.

    Attributes:
      encode: `(text, add_special_tokens) -> ids`. A special token that is written out in the text becomes its one id.
      encode_all: the same for a list of texts, on all cores where the library can.
      decode: `(ids, skip_special_tokens) -> text`. Bytes that are no UTF-8 become U+FFFD.
      token_id: `token -> id`, None for one that the vocabulary does not have.
      vocab_size: V, one more than the largest id.
      special_tokens: those that the file itself names, such as `{"bos_token": "<s>"}`.
      token_bytes: gives `[V]` int64, the bytes of text that a token stands for, 0 for special ones; None where that
        depends on what is around it.
    """

    encode: Callable[[str, bool], list[int]]
    encode_all: Callable[[list[str], bool], list[list[int]]]
    decode: Callable[[Sequence[int], bool], str]
    token_id: Callable[[str], int | None]
    vocab_size: int
    special_tokens: Mapping[str, str]
    token_bytes: Callable[[], np.ndarray | None]


def tokenizers_codec(json: bytes) -> Codec:
    """Opens a `tokenizer.json`.

    Raises:
      ValueError: if it is not one.
    """
    try:
        tokenizer = Tokenizer.from_buffer(json)
        tokenizer.no_truncation()  # a file may ask for either; text is taken as it is
        tokenizer.no_padding()
        tokenizer.encode("")  # what is put around a text is looked at only when there is one
    except BaseException as error:  # the library raises bare exceptions, and Rust's panics, which are none
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"tokenizer.json describes no tokenizer: {error}") from error
    return Codec(
        encode=lambda text, add_special_tokens: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids,
        encode_all=lambda texts, add_special_tokens: [
            one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ],
        decode=lambda ids, skip_special_tokens: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens),
        token_id=tokenizer.token_to_id,
        vocab_size=1 + max(tokenizer.get_vocab().values(), default=-1),
        special_tokens={},
        token_bytes=lambda: _byte_level_token_bytes(tokenizer),
    )


def _byte_level_token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """`[V]` int64 bytes of each token, which a byte-level vocabulary writes with one character a byte."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    counts = np.zeros(1 + max(vocabulary.values(), default=-1), np.int64)
    for token, index in vocabulary.items():
        counts[index] = len(token)
    for index, extra in added.items():
        counts[index] = 0 if extra.special else len(extra.content.encode())
    return counts


def sentencepiece_codec(model: bytes, adds_bos: bool, adds_eos: bool) -> Codec:
    """Opens a `tokenizer.model`.

    Args:
      model: its content.
      adds_bos: whether the beginning of a text, if the model has one, is one of the special tokens to add.
      adds_eos: and its end.

    Raises:
      ImportError: if the package `sentencepiece` is missing.
      ValueError: if it is no SentencePiece model.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("a tokenizer.model needs the package sentencepiece: pip install 'moe_jax[text]'") from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"tokenizer.model is no SentencePiece model: {error}") from error
    vocab_size = processor.GetPieceSize()
    control = {processor.IdToPiece(index): index for index in range(vocab_size) if processor.IsControl(index)}
    ids_of_control = frozenset(control.values())
    boundaries = re.compile(f"({'|'.join(re.escape(piece) for piece in sorted(control, key=len, reverse=True))})")
    named = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    special_tokens = {name: processor.IdToPiece(index) for name, index in named.items() if index >= 0}
    before = [named["bos_token"]] if adds_bos and "bos_token" in special_tokens else []
    after = [named["eos_token"]] if adds_eos and "eos_token" in special_tokens else []

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for part in boundaries.split(text) if control else [text]:
            ids += [control[part]] if part in control else processor.EncodeAsIds(part)
        return [*before, *ids, *after] if add_special_tokens else ids

    def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            return processor.DecodeIds([int(index) for index in ids if int(index) not in ids_of_control])
        parts = itertools.groupby(map(int, ids), ids_of_control.__contains__)
        return "".join(
            "".join(map(processor.IdToPiece, run)) if is_control else processor.DecodeIds(list(run))
            for is_control, run in parts
        )

    def token_id(token: str) -> int | None:
        index = processor.PieceToId(token)
        return index if processor.IdToPiece(index) == token else None

    def encode_all(texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [encode(text, add_special_tokens) for text in texts]

    return Codec(encode, encode_all, decode, token_id, vocab_size, special_tokens, lambda: None)


def byte_tokenizer_json() -> bytes:
    """Makes the `tokenizer.json` of a vocabulary of the 256 bytes, in which a byte's id is its value."""
    # The library writes a byte as a character: printable ones as themselves, the others as the first from U+0100 on.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character): character for character in characters if ord(character) < 256}
    others = iter(characters[len(printable) :])
    vocabulary = {printable.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()
