"""Text to token ids and back, by the tokenizer files of a model folder; conversations and streams of tokens too.

tokenizer = open_tokenizer("path/of/model")
ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]), add_special_tokens=False)
stream = tokenizer.stream()
for index in generate(ids, stop=tokenizer.stop_ids):
    print(stream.push(index), end="")
print(stream.finish())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.data.codec import Codec, byte_tokenizer_json, sentencepiece_codec, tokenizers_codec

if TYPE_CHECKING:
    from moe_jax.data.chat import Message

_JSON = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", *_JSON)
_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def open_tokenizer(folder: str | Path) -> TextTokenizer:
    """Opens the tokenizer of a model folder.

    Args:
      folder: with `tokenizer.json` or else `tokenizer.model`, and `tokenizer_config.json`, `special_tokens_map.json`,
        `generation_config.json`, `chat_template.jinja` as far as they exist.

    Raises:
      ValueError: if there is none, or a file is not what its name says.
      ImportError: if there is only a `tokenizer.model` and the package `sentencepiece` is missing.
    """
    folder = Path(folder)
    return TextTokenizer({n: (folder / n).read_bytes() for n in _FILES if (folder / n).is_file()}, origin=str(folder))


def find_tokenizer(folder: str | Path, vocab_size: int) -> TextTokenizer:
    """Opens the tokenizer of a model folder, or for a vocabulary of 256 the bytes, where the folder has none.

    Args:
      folder: of the model.
      vocab_size: V of the model.

    Raises:
      ValueError: if there is none, or it has ids that the model does not know.
      ImportError: as `open_tokenizer`.
    """
    has_files = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = open_tokenizer(folder) if has_files or vocab_size != 256 else byte_tokenizer()
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    return tokenizer


def byte_tokenizer() -> TextTokenizer:
    """Makes the tokenizer of models whose 256 tokens are the bytes: the UTF-8 of a text, without special tokens."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": byte_tokenizer_json(), "tokenizer_config.json": json.dumps(config).encode()}
    return TextTokenizer(files, origin="the byte tokenizer")


class TextTokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
      files: name -> content of the files that it was made from.
      vocab_size: V, one more than the largest id.
      bos_id: id of the beginning of a text, or None.
      eos_id: id of its end, or None.
      stop_ids: ids after which generation stops: those of `generation_config.json`, else `eos_id`, else none.
    """

    def __init__(self, files: Mapping[str, bytes], origin: str = "the tokenizer") -> None:
        """Builds a tokenizer from the contents of its files.

        Args:
          files: name -> content, as in a folder; see `open_tokenizer`.
          origin: where they come from, for error messages.

        Raises:
          ValueError: if they make no tokenizer.
          ImportError: if the package `sentencepiece` is needed and missing.
        """
        self.files = dict(files)
        self._origin = origin
        self._config = self._read_json("special_tokens_map.json") | self._read_json("tokenizer_config.json")
        self._codec = self._open_codec()
        self._special_tokens = {**self._codec.special_tokens, **self._named_special_tokens()}
        self.vocab_size = self._codec.vocab_size
        self.bos_id, self.eos_id = (self._special_id(name) for name in ("bos_token", "eos_token"))
        self.stop_ids = self._read_stop_ids()
        self._chat_templates = self._read_chat_templates()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turns text into ids.

        Args:
          text: in which a special token that is written out becomes its id.
          add_special_tokens: put around it what the model was trained with, as `tokenizer.json` says or, beside a
            `tokenizer.model`, `add_bos_token` and `add_eos_token` in the config; not around what
            `apply_chat_template` returns, which has it.

        Returns:
          The ids.
        """
        return self._codec.encode(text, add_special_tokens)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Turns texts into ids, on all cores if it can; as `encode`."""
        return self._codec.encode_all(texts, True)

    def token_bytes(self) -> np.ndarray | None:
        """`[V]` int64, the bytes of text that each token stands for, special ones for 0; None if that depends."""
        return self._codec.token_bytes()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turns ids into text; bytes that are no UTF-8 become U+FFFD."""
        return self._codec.decode(ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Begins to turn ids into text one by one."""
        return TextStream(lambda ids: self._codec.decode(ids, skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders a conversation as the text that the model was trained on, special tokens included.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": …}`, and what else the template knows.
          add_generation_prompt: end with the beginning of an answer.
          **variables: what else the template may ask for, such as `tools`.

        Returns:
          Text, for `encode(text, add_special_tokens=False)`.

        Raises:
          ValueError: if there is no template, or it refuses the messages.
          ImportError: if the package `jinja2` is missing.
        """
        try:
            from moe_jax.data.chat import render_chat
        except ImportError as error:
            raise ImportError("chat templates need the package jinja2: pip install 'moe_jax[text]'") from error
        kind = "tool_use" if variables.get("tools") and "tool_use" in self._chat_templates else "default"
        if kind not in self._chat_templates:
            raise ValueError(f"{self._origin} has no chat template; it is a base model, give it plain text")
        defaults = {"tools": None, "documents": None, **self._special_tokens}
        settings = {**defaults, **variables, "add_generation_prompt": add_generation_prompt}
        return render_chat(self._chat_templates[kind], messages, **settings)

    def save(self, folder: str | Path) -> None:
        """Writes the files that it was made from; `transformers.AutoTokenizer` reads the folder too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def _open_codec(self) -> Codec:
        """Opens the file that has the vocabulary."""
        try:
            if "tokenizer.json" in self.files:
                return tokenizers_codec(self.files["tokenizer.json"])
            if "tokenizer.model" in self.files:
                adds_bos, adds_eos = self._flag("add_bos_token", True), self._flag("add_eos_token", False)
                return sentencepiece_codec(self.files["tokenizer.model"], adds_bos, adds_eos)
        except ValueError as error:
            raise ValueError(f"{self._origin}: {error}") from error
        raise ValueError(
            f"{self._origin} has no tokenizer.json and no tokenizer.model; save the tokenizer there with "
            "transformers' save_pretrained, which writes the former"
        )

    def _read_json(self, name: str) -> dict[str, Any]:
        """Reads a file of settings, which may be missing."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._origin}: {name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self._origin}: {name} holds {type(value).__name__}, expected an object")
        return value

    def _flag(self, name: str, default: bool) -> bool:
        """Returns a setting that is true or false."""
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self._origin}: {name} is {value!r}, expected true or false")
        return value

    def _named_special_tokens(self) -> dict[str, str]:
        """Returns the special tokens by name; each is a string, or an object with that string as its content."""
        tokens = {}
        for name in _SPECIAL_TOKENS:
            value = self._config.get(name)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                tokens[name] = token
            elif value is not None:
                raise ValueError(f"{self._origin}: {name} is {value!r}, expected a string")
        return tokens

    def _special_id(self, name: str) -> int | None:
        """Returns the id of a special token, or None if it is not named."""
        if name not in self._special_tokens:
            return None
        index = self._codec.token_id(self._special_tokens[name])
        if index is None:
            raise ValueError(f"{self._origin}: {name} is {self._special_tokens[name]!r}, not one of the vocabulary")
        return index

    def _read_stop_ids(self) -> tuple[int, ...]:
        """Returns the ids after which generation stops."""
        value = self._read_json("generation_config.json").get("eos_token_id")
        if value is None:
            return () if self.eos_id is None else (self.eos_id,)
        ids = value if isinstance(value, list) else [value]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise ValueError(f"{self._origin}: eos_token_id in generation_config.json is {value!r}, expected ids")
        return tuple(ids)

    def _read_chat_templates(self) -> dict[str, str]:
        """Returns the chat templates by name; a single one is the default."""
        if "chat_template.jinja" in self.files:
            try:
                return {"default": self.files["chat_template.jinja"].decode()}
            except UnicodeDecodeError as error:
                raise ValueError(f"{self._origin}: chat_template.jinja is not UTF-8: {error}") from error
        value = self._config.get("chat_template")
        if value is None:
            return {}
        entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
        try:
            templates = {entry["name"]: entry["template"] for entry in entries}
        except (TypeError, KeyError) as error:
            raise ValueError(f"{self._origin}: chat_template is a list without names and templates") from error
        if not all(isinstance(text, str) for pair in templates.items() for text in pair):
            raise ValueError(f"{self._origin}: chat_template is {value!r:.100}, expected text")
        return templates


class TextStream:
    """Text of tokens as they come; a character is held back until all its bytes are there."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Begins a text.

        Args:
          decode: turns ids into text.
        """
        self._decode = decode
        # The last tokens that were shown stay, since what a token's text is may depend on those before it.
        self._ids: list[int] = []
        self._num_shown = 0

    def push(self, token: int) -> str:
        """Takes a token; returns what can be shown, maybe nothing."""
        self._ids.append(token)
        text = self._pending()
        return "" if text.endswith(_REPLACEMENT) else self._show(text)

    def finish(self) -> str:
        """Ends the text; returns what was held back, with U+FFFD for characters that were never completed."""
        return self._show(self._pending())

    def _pending(self) -> str:
        """Returns the text that has not been shown."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_shown])) :]

    def _show(self, text: str) -> str:
        """Forgets all but the last tokens."""
        if text:
            del self._ids[: self._num_shown]
            self._num_shown = len(self._ids)
        return text
