"""The tokenizer that a command needs, or an error in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.runs import ConfigError

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import TextTokenizer


def open_model_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    """The tokenizer of a model folder; `ConfigError` where there is none that fits."""
    from moe_jax.data.tokenizer import find_tokenizer

    try:
        return find_tokenizer(folder, vocab_size)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
