"""The text of an experiment, split by document."""

from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress

from moe_jax.data import (
    DataConfig,
    Document,
    TextTokenizer,
    domain_names,
    load_documents,
    open_tokenizer,
    split_documents,
    tokenize,
    train_tokenizer,
)
from moe_jax.runs import ConfigError, write_atomic
from moe_jax.runs.bars import bar

Splits = dict[str, tuple[Document, ...]]
TOKENIZER_BYTES = 24_000_000  # a tokenizer is trained on every n-th document, so that it learns from about so much


def read_text(config: DataConfig) -> Splits:
    """The splits, as bytes; what is wrong with the text or its settings is the user's to mend: a ConfigError."""
    if config.tokenizer:
        raise ConfigError(f"config.data.tokenizer is {config.tokenizer!r}, but this experiment works on bytes")
    return _read_splits(config)


def read_tokens(config: DataConfig, vocab_size: int, folder: Path, display: Progress) -> Splits:
    """The splits, as tokens of the tokenizer that the configuration names.

    Args:
      config: of the data.
      vocab_size: V of the model.
      folder: the run's; a tokenizer that is trained on the training split is kept there.
      display: where bars are drawn.

    Raises:
      ConfigError: something is wrong with the text or its settings, or the model has too small a vocabulary.
    """
    splits = _read_splits(config)
    tokenizer = None
    if config.tokenizer:
        try:
            tokenizer = _find_tokenizer(config.tokenizer, splits["train"], folder / "tokenizer", display)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"config.data.tokenizer: {error}") from None
    needed = 256 if tokenizer is None else tokenizer.vocab_size
    if vocab_size < needed:
        raise ConfigError(
            f"config.model.vocab_size is {vocab_size}, but the text has {needed} kinds of tokens; "
            f"set --config.model.vocab_size={needed}"
        )
    if tokenizer is None:
        return {name: tokenize(documents, None) for name, documents in splits.items()}
    total = sum(len(document.text) for documents in splits.values() for document in documents)
    with bar(display, "tokens", total) as progress:
        tokenized = {
            name: tokenize(documents, tokenizer, adds_end=True, on_bytes=progress.advance)
            for name, documents in splits.items()
        }
        progress.show(total)
    return tokenized


def _find_tokenizer(name: str, documents: tuple[Document, ...], folder: Path, display: Progress) -> TextTokenizer:
    """Opens a tokenizer; one to be trained is trained once, and then opened from the run's folder."""
    if not name.startswith("bpe:"):
        return open_tokenizer(Path(name).expanduser())
    if not (folder / "tokenizer.json").is_file():
        total = sum(len(document.text) for document in documents)
        documents = documents[:: -(-total // TOKENIZER_BYTES)]
        with bar(display, "tokenizer", len(documents)) as progress:

            def texts() -> Iterator[str]:
                for document in documents:
                    yield document.text.decode(errors="replace")
                    progress.advance()

            trained = train_tokenizer(texts(), int(name.removeprefix("bpe:")))
        # tokenizer.json, which says that all is there, comes last.
        for file in sorted(trained.files, key="tokenizer.json".__eq__):
            write_atomic(folder / file, trained.files[file])
    return open_tokenizer(folder)


def _read_splits(config: DataConfig) -> Splits:
    """The splits, as bytes."""
    try:
        splits = split_documents(load_documents(config), config)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from None
    names = domain_names(splits["train"])
    if config.domain_weights and len(config.domain_weights) != len(names):
        raise ConfigError(
            f"config.data.domain_weights has {len(config.domain_weights)} numbers for {len(names)} domains "
            f"({', '.join(names)}); give one each, or none (--config.data.domain_weights=) for equal shares"
        )
    return splits
