"""Documents as token ids; those of a large text in a file that is made once and mapped into memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe_jax.data.documents import Document
from moe_jax.data.token_file import store_tokens
from moe_jax.data.tokenizer import TextTokenizer

STORED_BYTES = 8_000_000  # a text of more is kept as a file of tokens
_GROUP_BYTES = 1_000_000  # of text that is encoded at once


def tokenize(
    documents: Sequence[Document],
    tokenizer: TextTokenizer | None,
    *,
    adds_end: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> tuple[Document, ...]:
    """Gives documents the ids of a tokenizer, its beginning and end of text included if it adds them.

    Bytes that are no UTF-8 become U+FFFD. Ids of more than 8 MB of text are kept in the user's cache folder, and are
    there when the same text is asked for again.

    Args:
      documents: a split.
      tokenizer: what makes the ids; None where the bytes are the tokens.
      adds_end: end every document with the tokenizer's end of text, if it has one, also where it adds none itself.
      on_bytes: told how many bytes of text were encoded since it was told last.

    Returns:
      The documents with ids.
    """
    texts = [document.text for document in documents]
    is_large = sum(map(len, texts)) > STORED_BYTES
    if tokenizer is None:
        if not is_large:
            return tuple(documents)
        spans = store_tokens(texts, b"bytes", np.dtype(np.uint8), lambda: (np.frombuffer(x, np.uint8) for x in texts))
        return _with_ids(documents, spans, np.ones(256, np.int64))
    end = tokenizer.eos_id if adds_end else None
    if not is_large:
        ids = list(_encode(texts, tokenizer, end, on_bytes))
        return _with_ids(documents, ids, tokenizer.token_bytes())
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    spans = store_tokens(texts, _key(tokenizer, end), dtype, lambda: _encode(texts, tokenizer, end, on_bytes))
    return _with_ids(documents, spans, tokenizer.token_bytes())


def _with_ids(documents: Sequence[Document], ids: Sequence, token_bytes: np.ndarray | None) -> tuple[Document, ...]:
    """The documents with their tokens."""
    return tuple(
        dataclasses.replace(document, ids=own, token_bytes=token_bytes)
        for document, own in zip(documents, ids, strict=True)
    )


def _encode(
    texts: Sequence[bytes], tokenizer: TextTokenizer, end: int | None, on_bytes: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """The ids of each text, `[N]` int32; a group of texts is encoded at once."""
    group: list[str] = []
    num_bytes = 0
    for index, text in enumerate(texts):
        group.append(text.decode(errors="replace"))
        num_bytes += len(text)
        if num_bytes >= _GROUP_BYTES or index == len(texts) - 1:
            for ids in tokenizer.encode_all(group):
                yield np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], np.int32)
            on_bytes(num_bytes)
            group, num_bytes = [], 0


def _key(tokenizer: TextTokenizer, end: int | None) -> bytes:
    """Tells a tokenizer and its use from all others."""
    files = sorted(tokenizer.files.items())
    return repr((end, [(name, hashlib.sha256(content).hexdigest()) for name, content in files])).encode()
