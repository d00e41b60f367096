"""A model's `config.json` as `transformers` writes it, read key by key so that nothing in it is overlooked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from moe_jax.checkpoints.hub.tensor_files import HubError

_T = TypeVar("_T")
# Keys that change nothing in what the forward pass computes.
INERT = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
        *("use_cache", "initializer_range", "initializer_factor", "max_position_embeddings", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
        *("router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
        *("auto_map", "attn_implementation", "_attn_implementation", "_experts_implementation", "torchscript"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "tokenizer_class", "prefix"),
        *("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers"),
        *("_attn_implementation_autoset", "for_llm_compressor"),
        *("is_encoder_decoder", "is_decoder", "add_cross_attention", "task_specific_params", "finetuning_task"),
    }
)
# Keys that act in training only, or not at all at this value.
HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"attention_dropout": (), "router_jitter_noise": (), "hidden_dropout": (), "tie_encoder_decoder": (False,)}
)


class HubConfig:
    """The keys of a `config.json`; `finish` refuses those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json"):
        """Wraps the decoded JSON; `source` names it in messages."""
        if not isinstance(values, Mapping):
            raise HubError(f"{source} must be a JSON object, got {type(values).__name__}")
        self.values, self.source = dict(values), source
        self._asked: set[str] = set()

    @classmethod
    def load(cls, path: str | Path) -> HubConfig:
        """Reads the file.

        Raises:
          HubError: no such file, or no JSON object.
        """
        path = Path(path)
        if not path.is_file():
            raise HubError(f"{path} does not exist: a checkpoint needs its config.json")
        try:
            return cls(json.loads(path.read_bytes()), str(path))
        except (ValueError, RecursionError) as error:
            raise HubError(f"{path} is no JSON ({error})") from error

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of a key.

        Args:
          key: its name.
          kind: the type that it must have; an int is taken for a float.
          default: taken for a missing key or null; None means that the key is needed.

        Raises:
          HubError: a needed key is missing, or the type is wrong.
        """
        value = self.maybe(key, kind)
        if value is not None:
            return value
        if default is None:
            raise HubError(f"{self.source} lacks {key!r}, which this family needs")
        return default

    def maybe(self, key: str, kind: type[_T]) -> _T | None:
        """The value of a key, or None where it is missing or null; raises as `get`."""
        self._asked.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise HubError(f"{self.source}: {key!r} must be of type {kind.__name__}, got {value!r}")
        if isinstance(value, float) and not abs(value) < 3e38:  # NaN neither
            raise HubError(f"{self.source}: {key!r} must be a number that float32 holds, got {value!r}")
        return value

    def count(self, key: str, default: int | None = None, most: int = 2**24) -> int:
        """A whole number in [1, most]; raises as `get`, and for a number outside."""
        value = self.get(key, int, default)
        if not 1 <= value <= most:
            raise HubError(f"{self.source}: {key!r} must be in [1, {most}], got {value}")
        return value

    def take_all(self) -> dict[str, Any]:
        """Every key, for a family that checks them all itself."""
        self._asked.update(self.values)
        return self.values

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses a value that the import does not handle; a missing key is fine.

        Raises:
          HubError: another value than those allowed.
        """
        self._asked.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise HubError(
                f"{self.source}: {key}={self.values[key]!r} is not supported for this family; known: "
                f"{', '.join(map(repr, allowed))}"
            )

    def finish(self) -> None:
        """Refuses keys that neither were asked for nor are known to change nothing.

        Raises:
          HubError: naming them.
        """
        unknown = {}
        for key, value in self.values.items():
            is_harmless = key in HARMLESS and (not HARMLESS[key] or value in HARMLESS[key])
            if key not in self._asked and key not in INERT and not is_harmless:
                unknown[key] = value
        if unknown:
            listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
            raise HubError(
                f"{self.source} says {listed}, which this import does not know: the model might compute something else"
            )
