"""The tokenizer inside a GGUF file, rebuilt as the files of a Hugging Face folder.

Files of the Llama architecture have one of two kinds. "gpt2" is byte-level BPE: the merges are listed, and the name of
a pre-tokenizer says how text is cut first. "llama" is SentencePiece's BPE: the pair whose result has the highest score
is merged, what is not in the vocabulary falls back to bytes, blanks are written "▁", and one is put before the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.hub.gguf_metadata import Metadata
from moe_jax.checkpoints.store import CheckpointError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_BLANK = "▁"
# Keys without a bearing on one kind or the other, as they end.
_HARMLESS = (".add_sep_token", ".add_space_prefix", ".merges", ".pre", ".scores", ".token_type_count", "_token_id")
_LLAMA3 = ("llama-bpe", "llama-v3", "llama3")
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """Rebuilds the tokenizer of a file.

    Args:
      file: of which only the metadata are read.

    Returns:
      Name -> content of `tokenizer.json`, `tokenizer_config.json` (special tokens, chat template) and
      `generation_config.json` (where generation stops), as `transformers.AutoTokenizer` reads them.

    Raises:
      CheckpointError: if there is no tokenizer, or one of a kind or with a setting that is not handled.
    """
    metadata = Metadata(file)
    tokens = metadata.texts(f"{_PREFIX}tokens")
    if repeated := len(tokens) - len(set(tokens)):
        raise CheckpointError(f"{file.path}: {repeated} of the {len(tokens)} tokens occur twice")
    kind = metadata.text(f"{_PREFIX}model")
    if kind not in _KINDS:
        raise metadata.error(f"{_PREFIX}model", kind, f"one of {sorted(_KINDS)}")
    types = metadata.numbers(f"{_PREFIX}token_type", len(tokens))
    tokenizer = _KINDS[kind](metadata, tokens, types)
    _add_whole_tokens(tokenizer, tokens, types)
    ids = {name: metadata.token_id(name, len(tokens)) for name in ("bos", "eos", "unknown", "padding", "eot")}
    _add_around(tokenizer, metadata, tokens, ids, adds_bos=kind == "llama" or metadata.get(f"{_PREFIX}pre") in _LLAMA3)
    metadata.refuse_unread(_PREFIX, but=_HARMLESS)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _to_json(_tokenizer_config(metadata, tokens, ids)),
        "generation_config.json": _to_json(_generation_config(ids)),
    }


def _byte_level(metadata: Metadata, tokens: Sequence[str], types: np.ndarray) -> Tokenizer:
    """Builds byte-level BPE as of GPT-2, with the pre-tokenizer that the file names."""
    del types
    listed = metadata.texts(f"{_PREFIX}merges")
    if malformed := [merge for merge in listed if merge.count(" ") != 1]:
        raise CheckpointError(f"{metadata.path}: merge {malformed[0]!r} is not two tokens with a blank between them")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in listed)]
    cut = metadata.text(f"{_PREFIX}pre", "")
    if cut not in _CUTS:
        raise metadata.error(f"{_PREFIX}pre", cut, f"one of {sorted(_CUTS)}")
    tokenizer = _build_bpe(metadata, tokens, merges, ignore_merges=cut in _LLAMA3)
    tokenizer.pre_tokenizer = _CUTS[cut]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], types: np.ndarray) -> Tokenizer:
    """Builds SentencePiece's BPE, whose merges follow from the scores."""
    scores = metadata.numbers(f"{_PREFIX}scores", len(tokens))
    mergeable = {tokens[index]: scores[index] for index in np.flatnonzero(types == _NORMAL).tolist()}
    ranked = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    merges = [(left, right) for _, _, left, right in sorted(ranked)]
    unknown = metadata.token_id("unknown", len(tokens))
    settings = {} if unknown is None else {"unk_token": tokens[unknown], "fuse_unk": True}
    tokenizer = _build_bpe(metadata, tokens, merges, byte_fallback=True, **settings)
    prefix = [normalizers.Prepend(_BLANK)] if metadata.flag(f"{_PREFIX}add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _build_bpe(metadata: Metadata, tokens: Sequence[str], merges: list[tuple[str, str]], **settings: Any) -> Tokenizer:
    """Builds a tokenizer without its cut and its decoder."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **settings))
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"{metadata.path}: tokens and merges make no tokenizer: {error}") from error


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: np.ndarray) -> None:
    """Lets tokens be found in the text before it is cut: control tokens, which are special, and user-defined ones."""
    for wanted, is_special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        found = [tokens[index] for index in np.flatnonzero(np.isin(types, wanted)).tolist()]
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in found])


def _add_around(
    tokenizer: Tokenizer, metadata: Metadata, tokens: Sequence[str], ids: Mapping[str, int | None], adds_bos: bool
) -> None:
    """Puts the beginning and the end of a text around it, as the file says or else as llama.cpp does by itself."""
    wanted = {
        "bos": metadata.flag(f"{_PREFIX}add_bos_token", adds_bos),
        "eos": metadata.flag(f"{_PREFIX}add_eos_token", False),
    }
    # The template names them by what they are, since a token's text may have a meaning in the template's own language.
    added = [
        {"id": name, "ids": [index], "tokens": [tokens[index]]}
        for name in wanted
        if wanted[name] and (index := ids[name]) is not None
    ]
    names = [piece["id"] for piece in added]
    single = [name for name in ("bos", "$A", "eos") if name in names or name == "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)


def _tokenizer_config(metadata: Metadata, tokens: Sequence[str], ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns what `tokenizer_config.json` says: special tokens, chat template."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.count("llama.context_length"),
        **{names[name]: tokens[index] for name, index in ids.items() if index is not None and name in names},
    }
    if metadata.get("tokenizer.chat_template") is not None:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return config


def _generation_config(ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns what `generation_config.json` says: generation stops at the end of a text and of a turn."""
    stops = sorted({index for name in ("eos", "eot") if (index := ids[name]) is not None})
    return {"bos_token_id": ids["bos"], "eos_token_id": stops or None, "pad_token_id": ids["padding"]}


def _to_json(value: dict[str, Any]) -> bytes:
    """Writes JSON for people."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


_LLAMA3_PIECES = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(_LLAMA3_CUT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
)
# llama.cpp, src/llama-vocab.cpp: "smollm" isolates every digit and then cuts as GPT-2 does.
_CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    **dict.fromkeys(_LLAMA3, _LLAMA3_PIECES),
}
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
