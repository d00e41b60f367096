"""Small synthetic GGUF files with random weights, written by the package `gguf` as llama.cpp's converter would."""

import gguf
import numpy as np

SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50_000.0,
}
VOCAB = 96


def random_llama(rng, sizes=SIZES, num_experts=0, head_dim=None, tied=False):
    """Returns the weights of a Llama, or of a Mixtral, under their Hugging Face names."""
    width, hidden = sizes["embedding_length"], sizes["feed_forward_length"]
    head_dim = head_dim or width // sizes["attention.head_count"]
    queries, keys = (head_dim * sizes[f"attention.{name}"] for name in ("head_count", "head_count_kv"))
    shapes = {"model.embed_tokens": (VOCAB, width), "model.norm": (width,)}
    if not tied:
        shapes["lm_head"] = (VOCAB, width)
    for layer in range(sizes["block_count"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}_layernorm": (width,) for norm in ("input", "post_attention")}
        shapes[f"{prefix}self_attn.q_proj"] = (queries, width)
        shapes |= {f"{prefix}self_attn.{name}_proj": (keys, width) for name in "kv"}
        shapes[f"{prefix}self_attn.o_proj"] = (width, queries)
        if num_experts:
            shapes[f"{prefix}block_sparse_moe.gate"] = (num_experts, width)
        for expert in range(num_experts):
            matrices = {"w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width)}
            shapes |= {f"{prefix}block_sparse_moe.experts.{expert}.{name}": s for name, s in matrices.items()}
        if not num_experts:
            matrices = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
            shapes |= {f"{prefix}mlp.{name}_proj": shape for name, shape in matrices.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def to_gguf(weights, sizes=SIZES):
    """Renames the weights as llama.cpp's converter does, permutes q and k, and stacks the experts."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes["block_count"])
    heads = {"attn_q": sizes["attention.head_count"], "attn_k": sizes["attention.head_count_kv"]}
    tensors, experts = {}, {}
    for name, weight in weights.items():
        if ".experts." in name:
            prefix, _, matrix = name.removesuffix(".weight").rsplit(".", 2)
            experts.setdefault(f"{prefix}.{matrix}", []).append(weight)
            continue
        ours = names.get_name(name, try_suffixes=(".weight",))
        if (kind := ours.split(".")[-2]) in heads:
            # (H, 2, Dh/2) -> (H, Dh/2, 2)
            weight = weight.reshape(heads[kind], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        tensors[ours] = weight
    for name, matrices in experts.items():
        layer, matrix = name.split(".")[2], {"w1": "gate", "w2": "down", "w3": "up"}[name.split(".")[-1]]
        tensors[f"blk.{layer}.ffn_{matrix}_exps.weight"] = np.stack(matrices)
    return tensors


def write_gguf(path, metadata, tensors, architecture="llama", kinds=None):
    """Writes a file.

    Args:
      path: where.
      metadata: key -> bool, int, float, str or list of them.
      tensors: name -> float32 array.
      architecture: None for a file that names none.
      kinds: name -> how to quantise it, where not float32.
    """
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        adders[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = np.ascontiguousarray(gguf.quantize(tensor, kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(path, weights, metadata=None, kinds=None):
    """Writes a model of `SIZES` with these weights, and more metadata."""
    sizes = {f"llama.{key}": value for key, value in SIZES.items()}
    return write_gguf(path, {**sizes, **(metadata or {})}, to_gguf(weights), kinds=kinds)
