"""A tokenizer of one's own: byte-level BPE (Sennrich et al. 1508.07909; on bytes: GPT-2, 2019) by `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_jax.data.tokenizer import TextTokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # every byte, and the end of text


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> TextTokenizer:
    """Learns the merges that shorten the texts most; any text can be encoded, and the same texts give the same file.

    Args:
      texts: documents, read once.
      vocab_size: V, counting the 256 bytes and the end of text. Texts without so many merges give a smaller one.
      show_progress: let the library draw bars on stderr.

    Returns:
      The tokenizer. Its `eos_id` is "<|endoftext|>", which `encode` does not add.

    Raises:
      ValueError: V is too small.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {SMALLEST}: the bytes and the end of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return TextTokenizer(files, origin="the trained tokenizer")
