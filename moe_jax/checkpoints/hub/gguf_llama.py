"""A GGUF file of the Llama architecture, seen as a read-only Hugging Face checkpoint: config, names, layout.

llama.cpp calls several families "llama": Llama, Mistral, SmolLM, and, with experts, Mixtral. Its converter reorders the
rows of q and k within each head, since its rotary embedding turns neighbouring pairs (2i, 2i+1) where Hugging Face
turns (i, i + head_dim/2); here they are put back. The experts of a layer are one tensor there, `[E, F, D]`, and split
here into the matrices that Mixtral's checkpoints have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.hub.gguf_metadata import Metadata
from moe_jax.checkpoints.store import CheckpointError

# Names at Hugging Face and in the file, axes in the file: V vocabulary, D width, Q and K all heads of the queries and
# of the keys or values, F hidden, E experts.
_MODEL = (("model.embed_tokens", "token_embd", "VD"), ("model.norm", "output_norm", "D"))
_READ_OUT = (("lm_head", "output", "VD"),)
_ATTENTION = (
    ("input_layernorm", "attn_norm", "D"),
    ("self_attn.q_proj", "attn_q", "QD"),
    ("self_attn.k_proj", "attn_k", "KD"),
    ("self_attn.v_proj", "attn_v", "KD"),
    ("self_attn.o_proj", "attn_output", "DQ"),
    ("post_attention_layernorm", "ffn_norm", "D"),
)
_DENSE = (("mlp.gate_proj", "ffn_gate", "FD"), ("mlp.up_proj", "ffn_up", "FD"), ("mlp.down_proj", "ffn_down", "DF"))
_EXPERTS = (
    ("block_sparse_moe.gate", "ffn_gate_inp", "ED"),
    ("block_sparse_moe.experts.{expert}.w1", "ffn_gate_exps", "EFD"),
    ("block_sparse_moe.experts.{expert}.w2", "ffn_down_exps", "EDF"),
    ("block_sparse_moe.experts.{expert}.w3", "ffn_up_exps", "EFD"),
)


class _Source(NamedTuple):
    """Where a tensor of the Hugging Face checkpoint lies in the file.

    Attributes:
      tensor: name in the file.
      shape: of the result.
      first_row: which row of the file's tensor, along the last axis, it begins with.
      rotary_heads: number of heads within which rows are reordered, or 0.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    rotary_heads: int = 0


class LlamaGGUF:
    """The tensors of a file under their Hugging Face names, in its layout, as float32.

    Attributes:
      file: the file behind it.
      config: what Hugging Face's `config.json` would say; `model_type` is "llama", or "mixtral" with experts.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a file and checks that it holds the model that its metadata describe, and nothing else.

        Raises:
          CheckpointError: if it cannot be used, naming the metadata key or tensor, what was found and what expected.
          ImportError: if the package `gguf` is missing.
        """
        self.file = GGUFFile(path)
        self.config = llama_config(self.file)
        self._sources = _find_sources(self.file, self.config)

    def names(self) -> list[str]:
        """Lists the tensors: "model.layers.3.self_attn.q_proj.weight" and so on."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises `KeyError` for an unknown name."""
        return self._sources[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype in which a tensor is read: float32, whatever its quantisation in the file."""
        del name
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """Dequantises one tensor.

        Args:
          name: one of `names()`.

        Returns:
          Float32 array of `shape(name)`.

        Raises:
          KeyError: for an unknown name.
          CheckpointError: if a value is not finite.
        """
        source = self._sources[name]
        rows = source.first_row + np.arange(math.prod(source.shape[:-1]))
        if source.rotary_heads:
            rows = rows.reshape(source.rotary_heads, -1, 2).swapaxes(1, 2).ravel()  # (H, Dh/2, 2) -> (H, 2, Dh/2)
        return self.file.read_rows(source.tensor, rows).reshape(source.shape)


def llama_config(file: GGUFFile) -> dict[str, Any]:
    """Translates metadata into the entries of Hugging Face's `LlamaConfig` or `MixtralConfig`.

    Args:
      file: of which the metadata, the shape of the embedding and the presence of a read-out are looked at.

    Returns:
      Every entry that the forward pass depends on, whatever the library's defaults.

    Raises:
      CheckpointError: if the file is of another architecture or is a part of one, or a key is missing, impossible, or
        might change the arithmetic in a way that is not handled, such as rotary scaling.
    """
    metadata = Metadata(file)
    metadata.expect("general.architecture", "llama")
    metadata.expect("general.type", "model", None)
    metadata.expect("split.count", 0, 1, None)
    metadata.expect("llama.rope.scaling.type", "none", None)
    metadata.expect("llama.attention.causal", True, None)
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor 'token_embd.weight', the embedding; it is incomplete")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    metadata.expect("llama.vocab_size", vocab_size, None)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab_size:
        raise CheckpointError(f"{file.path} has {len(tokens)} tokens, expected {vocab_size}, the rows of the embedding")
    config = {
        **_attention_config(metadata),
        **_feed_forward_config(metadata),
        "num_hidden_layers": metadata.count("llama.block_count"),
        "max_position_embeddings": metadata.count("llama.context_length"),
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": vocab_size,
        "bos_token_id": metadata.token_id("bos", vocab_size),
        "eos_token_id": metadata.token_id("eos", vocab_size),
        "pad_token_id": metadata.token_id("padding", vocab_size),
    }
    metadata.refuse_unread("llama.")
    return config


def _attention_config(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries about width, heads and rotary positions."""
    width = metadata.count("llama.embedding_length")
    num_heads = metadata.count("llama.attention.head_count")
    num_kv_heads = metadata.count("llama.attention.head_count_kv", num_heads)
    head_dim = metadata.count("llama.attention.key_length", width // num_heads)
    metadata.expect("llama.attention.value_length", head_dim, None)
    metadata.expect("llama.rope.dimension_count", head_dim, None)
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{metadata.path}: {num_heads} heads of width {head_dim} share {num_kv_heads} heads of keys and values; "
            "expected an even width, and a divisor of the number of heads"
        )
    return {
        "hidden_size": width,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.number("llama.rope.freq_base", 10000.0)},
    }


def _feed_forward_config(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries about feed-forward layers, in which dense models and mixtures of experts differ."""
    shared = {"intermediate_size": metadata.count("llama.feed_forward_length"), "hidden_act": "silu"}
    num_experts = metadata.count("llama.expert_count", 0, least=0)
    num_choices = metadata.count("llama.expert_used_count", 0, least=0)
    if num_choices > num_experts or bool(num_choices) != bool(num_experts):
        raise CheckpointError(
            f"{metadata.path}: llama.expert_used_count is {num_choices} and llama.expert_count is {num_experts}; "
            "expected at least one choice of the experts that there are, or neither"
        )
    if not num_experts:
        dense = {"attention_bias": False, "mlp_bias": False}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shared, **dense}
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": num_choices, "sliding_window": None}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **shared, **experts}


def _find_sources(file: GGUFFile, config: dict[str, Any]) -> dict[str, _Source]:
    """Maps Hugging Face names to tensors of the file, which must be exactly those that the config implies."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = {"V": config["vocab_size"], "D": config["hidden_size"], "F": config["intermediate_size"]}
    sizes |= {"Q": heads * config["head_dim"], "K": kv_heads * config["head_dim"]}
    sizes["E"] = config.get("num_local_experts", 0)
    rotary_heads = {"attn_q": heads, "attn_k": kv_heads}
    sources: dict[str, _Source] = {}
    for prefix, file_prefix, table in _tables(config):
        for name, file_name, axes in table:
            tensor, shape = f"{file_prefix}{file_name}.weight", tuple(sizes[axis] for axis in axes)
            found = file.tensors[tensor].shape if tensor in file.tensors else None
            if found != shape:
                problem = "missing" if found is None else f"of shape {found}"
                raise CheckpointError(f"{file.path}: tensor {tensor!r} is {problem}, expected one of shape {shape}")
            if len(shape) == 3:
                for expert in range(shape[0]):
                    matrix = _Source(tensor, shape[1:], expert * shape[1])
                    sources[f"{prefix}{name.format(expert=expert)}.weight"] = matrix
            else:
                sources[f"{prefix}{name}.weight"] = _Source(tensor, shape, 0, rotary_heads.get(file_name, 0))
    if extra := sorted(file.tensors.keys() - {source.tensor for source in sources.values()}):
        raise CheckpointError(
            f"{file.path} has tensors that are not handled and may change the result: {', '.join(extra[:5])}"
            f"{' and more' if extra[5:] else ''}; use the model's Hugging Face folder instead"
        )
    return sources


def _tables(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[tuple[str, str, str], ...]]]:
    """Yields prefixes of names at Hugging Face and in the file, and the table of what follows them."""
    yield "", "", _MODEL if config["tie_word_embeddings"] else _MODEL + _READ_OUT
    for layer in range(config["num_hidden_layers"]):
        feed_forward = _EXPERTS if "num_local_experts" in config else _DENSE
        yield f"model.layers.{layer}.", f"blk.{layer}.", _ATTENTION + feed_forward
