import itertools
import struct
import sys
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.hub.gguf_llama import LlamaGGUF
from tests.synthetic_gguf import SIZES, VOCAB, random_llama, to_gguf, write_gguf, write_llama

KINDS = gguf.GGMLQuantizationType
QUANTISED = [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1]
TOKEN_IDS = {f"tokenizer.ggml.{name}_token_id": index for index, name in enumerate(("bos", "eos", "padding"))}


def everything(name, file):
    """All rows of a tensor."""
    return file.read_rows(name, np.arange(file.tensors[name].num_rows))


# The file


def test_metadata_of_every_type_come_back(tmp_path):
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "none")
    integers = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -5, "uint32": 2**32 - 1, "int32": -7}
    integers |= {"uint64": 2**64 - 1, "int64": -(2**63)}
    for name, value in integers.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_float32("float32", 0.25)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "Größe ▁")
    writer.add_array("strings", ["a", "", "世界"])
    writer.add_array("floats", [0.5, -2.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(path).metadata
    assert {name: metadata[name] for name in integers} == integers
    assert (metadata["float32"], metadata["float64"], metadata["bool"]) == (0.25, 0.1, True)
    assert (metadata["string"], metadata["strings"]) == ("Größe ▁", ["a", "", "世界"])
    np.testing.assert_array_equal(metadata["floats"], np.array([0.5, -2.0], np.float32))


def test_a_block_of_q8_0_worked_by_hand(tmp_path):
    # A block is a float16 scale and 32 signed bytes: 0.5 * (-3, 0, 4, 0, ...) = (-1.5, 0, 2, 0, ...).
    block = struct.pack("<e32b", 0.5, -3, 0, 4, *[0] * 29)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    entry = struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 32, KINDS.Q8_0, 0)
    path = tmp_path / "block.gguf"
    start = -(-len(header + entry) // 32) * 32
    path.write_bytes((header + entry).ljust(start, b"\0") + block)
    file = GGUFFile(path)
    assert file.tensors["w"].shape == (32,)
    np.testing.assert_array_equal(everything("w", file), [[-1.5, 0.0, 2.0] + [0.0] * 29])


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_rows_equal_those_of_the_package(kind, rng, tmp_path):
    weight = rng.normal(size=(3, 700, 512)).astype(np.float32)  # more than one chunk
    path = write_gguf(
        tmp_path / "w.gguf", {"general.alignment": 64}, {"v": weight[0, 0], "w": weight}, kinds={"w": kind}
    )
    file = GGUFFile(path)
    reader = gguf.GGUFReader(path)
    expected = gguf.dequantize(reader.tensors[1].data, kind)
    np.testing.assert_array_equal(everything("w", file).reshape(weight.shape), expected)
    np.testing.assert_allclose(expected, weight, atol=0.6)
    some = np.array([1400, 0, 7, 0])
    np.testing.assert_array_equal(file.read_rows("w", some), expected.reshape(-1, 512)[some])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name.startswith(("Q2_K", "Q4_K", "Q6_K", "IQ", "MX"))])
def test_formats_that_the_package_only_reads_are_read(kind, tmp_path):
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "blocks.gguf"
    # Small bytes, so that what is a float16 scale among them is finite.
    block = np.arange(2 * block_bytes, dtype=np.uint8) % 60
    path.write_bytes((header(1) + entry(sizes=(block_size, 2), kind=kind)).ljust(96, b"\0") + block.tobytes())
    file = GGUFFile(path)
    assert file.tensors["w"].shape == (2, block_size)
    np.testing.assert_array_equal(everything("w", file), gguf.dequantize(block.reshape(2, -1), kind))


def test_reading_takes_little_memory_beside_the_result(rng, tmp_path):
    weight = rng.normal(size=(16_384, 1024)).astype(np.float32)
    file = GGUFFile(write_gguf(tmp_path / "w.gguf", {}, {"w": weight}, kinds={"w": KINDS.Q4_1}))
    tracemalloc.start()
    result = everything("w", file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.2 * result.nbytes


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'moe_jax\[gguf\]'"):
        GGUFFile(tmp_path / "any.gguf")


# Damaged and hostile files


def header(num_tensors=0, num_entries=0, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, num_tensors, num_entries)


def string(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(sizes=(4,), kind=0, offset=0, name="w"):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARRAY, UINT8, STRING, NESTED = 9, 0, 8, 9
HOSTILE = {
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "the magic number takes 4 bytes .* has only 3 more"),
    "no GGUF": (b"PK\x03\x04" + bytes(60), r"begins with b'PK\\x03\\x04', expected b'GGUF'"),
    "version": (header(version=1), r"version 1, expected one of \(2, 3\)"),
    "big-endian": (header(version=3 << 24), "in big-endian order, expected one of"),
    "many entries": (header(num_entries=2**62), "the length of a metadata key takes 8 bytes"),
    "many tensors": (header(num_tensors=2**62), "the length of the name of a tensor takes 8 bytes"),
    "long key": (header(0, 1) + string("k", 2**63), "a metadata key takes 9223372036854775808 bytes"),
    "no UTF-8": (header(0, 1) + string(b"\xff\xfe"), "a metadata key is not UTF-8"),
    "type": (header(0, 1) + string("k") + struct.pack("<I", 99), "'k' has type 99, expected 0 to 12"),
    "long list": (header(0, 1) + string("k") + struct.pack("<IIQ", ARRAY, UINT8, 2**40), "takes 1099511627776 bytes"),
    "many strings": (header(0, 1) + string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**60), "the length of the value"),
    "nested list": (header(0, 1) + string("k") + struct.pack("<IIQ", ARRAY, NESTED, 1), "is a list of type 9"),
    "key twice": (header(0, 2) + (string("k") + struct.pack("<IB", UINT8, 1)) * 2, "key 'k' occurs twice"),
    "alignment": (
        header(0, 1) + string("general.alignment") + struct.pack("<IB", UINT8, 24),
        "general.alignment is 24, expected a power of two",
    ),
    "no axes": (header(1) + entry(sizes=()), "'w' has 0 axes, expected 1 to 4"),
    "many axes": (header(1) + string("w") + struct.pack("<I", 2**31), "'w' has 2147483648 axes"),
    "size 0": (header(1) + entry(sizes=(4, 0)), r"'w' has shape \(0, 4\); expected sizes of at least 1"),
    "huge": (header(1) + entry(sizes=(2**62, 2**62)), "ends at byte .* but the file has"),
    "wraps around": (header(1) + entry(sizes=(2**33, 2**33)), "ends at byte .* but the file has"),
    "part of a block": (header(1) + entry(sizes=(33,), kind=KINDS.Q8_0), "multiple of 32, the block of Q8_0"),
    "unknown kind": (header(1) + entry(kind=12345), r"quantisation 12345 \(unknown\)"),
    "integers": (header(1) + entry(kind=KINDS.I32), r"quantisation 26 \(I32\), which cannot be dequantised"),
    "offset": (header(1) + entry(offset=5) + bytes(100), "begins at offset 5, expected a multiple of 32"),
    "far offset": (header(1) + entry(offset=2**63), "ends at byte .* but the file has"),
    "tensor twice": (header(2) + entry() * 2 + bytes(100), "tensor 'w' occurs twice"),
    "overlap": (header(2) + entry() + entry(name="v") + bytes(100), "begins at byte 96, inside tensor 'w', which ends"),
}


@pytest.mark.parametrize("content,message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_by_name_at_once(content, message, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert time.monotonic() - start < 1
    assert str(path) in str(caught.value)


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path):
    path = tmp_path / "list.gguf"
    path.write_bytes(header(0, 1) + string("k") + struct.pack("<IIQ", ARRAY, UINT8, 3_000_000) + bytes(3_000_000))
    tracemalloc.start()
    assert GGUFFile(path).metadata["k"].shape == (3_000_000,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path} is not a file"):
            GGUFFile(path)


def test_a_file_cut_anywhere_is_refused(rng, tmp_path):
    content = write_llama(tmp_path / "whole.gguf", random_llama(rng), metadata=TOKEN_IDS).read_bytes()
    path = tmp_path / "cut.gguf"
    last = GGUFFile(tmp_path / "whole.gguf")
    data_end = max(tensor.end for tensor in last.tensors.values())
    for length in [*range(0, 3000, 41), *rng.integers(3000, data_end, 60).tolist(), data_end - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut off|is empty"):
            LlamaGGUF(path)


def test_a_file_with_changed_bytes_is_read_or_refused(rng, tmp_path):
    content = np.frombuffer(
        write_llama(tmp_path / "whole.gguf", random_llama(rng), metadata=TOKEN_IDS).read_bytes(), np.uint8
    )
    path = tmp_path / "changed.gguf"
    refused = 0
    for _ in range(400):
        changed = content.copy()
        where = rng.integers(0, 2600, rng.integers(1, 4))  # the header
        changed[where] = rng.integers(0, 256, len(where))
        path.write_bytes(changed.tobytes())
        try:
            model = LlamaGGUF(path)
            for name in model.names():
                assert model.read(name).shape == model.shape(name)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
    assert 100 < refused < 400


def test_values_that_are_not_finite_are_refused(rng, tmp_path):
    weights = random_llama(rng)
    weights["model.norm.weight"][3] = np.nan
    model = LlamaGGUF(write_llama(tmp_path / "nan.gguf", weights))
    model.read("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' holds values that are not finite"):
        model.read("model.norm.weight")


# The Llama architecture


@pytest.mark.parametrize("num_experts", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_comes_back_under_its_hugging_face_name(num_experts, tied, rng, tmp_path):
    weights = random_llama(rng, num_experts=num_experts, tied=tied)
    extra = {"llama.expert_count": num_experts, "llama.expert_used_count": 2 if num_experts else 0}
    model = LlamaGGUF(write_llama(tmp_path / "model.gguf", weights, metadata=extra))
    assert sorted(model.names()) == sorted(weights)
    for name, weight in weights.items():
        assert model.shape(name) == weight.shape
        assert model.dtype(name) == np.float32
        np.testing.assert_array_equal(model.read(name), weight)
    with pytest.raises(KeyError):
        model.read("model.layers.2.input_layernorm.weight")


def test_heads_wider_than_their_share_are_read(rng, tmp_path):
    weights = random_llama(rng, head_dim=12)
    extra = {f"llama.{key}": 12 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    model = LlamaGGUF(write_llama(tmp_path / "model.gguf", weights, metadata=extra))
    assert model.config["head_dim"] == 12
    assert model.shape("model.layers.1.self_attn.o_proj.weight") == (32, 48)
    for name, weight in weights.items():
        np.testing.assert_array_equal(model.read(name), weight)


def test_experts_of_quantised_stacks_are_read_one_by_one(rng, tmp_path):
    weights = random_llama(rng, num_experts=3)
    extra = {"llama.expert_count": 3, "llama.expert_used_count": 2}
    stack = to_gguf(weights)["blk.1.ffn_down_exps.weight"]
    kinds = {"blk.1.ffn_down_exps.weight": KINDS.Q8_0}
    model = LlamaGGUF(write_llama(tmp_path / "model.gguf", weights, metadata=extra, kinds=kinds))
    expected = gguf.dequantize(gguf.quantize(stack, KINDS.Q8_0), KINDS.Q8_0)
    for expert in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        np.testing.assert_array_equal(model.read(name), expected[expert])


def test_half_split_rotation_of_ours_gives_the_scores_of_interleaved_rotation_of_the_files(rng, tmp_path):
    """llama.cpp turns the file's rows in pairs (2i, 2i+1), and the converter's permutation makes up for it."""
    weights = random_llama(rng)
    model = LlamaGGUF(write_llama(tmp_path / "model.gguf", weights))
    x, heads, head_dim, base = rng.normal(size=(5, 32)), 4, 8, 50_000.0

    def interleaved(vector, position):
        turned = np.empty_like(vector)
        for i in range(head_dim // 2):
            angle = position * base ** (-2 * i / head_dim)
            a, b = vector[2 * i], vector[2 * i + 1]
            turned[2 * i] = a * np.cos(angle) - b * np.sin(angle)
            turned[2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    def half_split(vector, position):
        turned, half = np.empty_like(vector), head_dim // 2
        for i in range(half):
            angle = position * base ** (-2 * i / head_dim)
            a, b = vector[i], vector[i + half]
            turned[i] = a * np.cos(angle) - b * np.sin(angle)
            turned[i + half] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    def scores(rotate, queries, keys):
        return [
            rotate(q[h], s) @ rotate(k[h // 2], t)
            for (s, q), (t, k) in itertools.product(enumerate(queries), enumerate(keys))
            for h in range(heads)
        ]

    def project(read, q, k):
        return (x @ read(q).T).reshape(5, heads, head_dim), (x @ read(k).T).reshape(5, 2, head_dim)

    ours = project(model.read, *(f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk"))
    theirs = project(lambda name: everything(name, model.file), "blk.0.attn_q.weight", "blk.0.attn_k.weight")
    np.testing.assert_allclose(scores(half_split, *ours), scores(interleaved, *theirs), rtol=1e-10)
    assert not np.allclose(scores(half_split, *theirs), scores(interleaved, *theirs), rtol=0.1)


def test_the_config_says_all_that_the_forward_pass_depends_on(rng, tmp_path):
    path = write_llama(tmp_path / "model.gguf", random_llama(rng), metadata=TOKEN_IDS)
    assert LlamaGGUF(path).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,  # not 9.99999975e-06, which is what float32 makes of it
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def test_what_the_file_leaves_out_has_the_defaults_of_llama_cpp(rng, tmp_path):
    sizes = {**SIZES, "attention.head_count_kv": 4}
    weights = random_llama(rng, sizes)
    unnamed = {**sizes, "attention.head_count_kv": None, "rope.freq_base": None}
    path = tmp_path / "model.gguf"
    tensors = to_gguf(weights, sizes)
    config = LlamaGGUF(write_gguf(path, {f"llama.{k}": v for k, v in unnamed.items() if v is not None}, tensors)).config
    assert config["num_key_value_heads"] == 4
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)


def test_experts_make_it_a_mixtral(rng, tmp_path):
    extra = {"llama.expert_count": 3, "llama.expert_used_count": 2, "llama.vocab_size": VOCAB}
    config = LlamaGGUF(write_llama(tmp_path / "model.gguf", random_llama(rng, num_experts=3), metadata=extra)).config
    assert (config["model_type"], config["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)


REFUSED = {
    "architecture": ({"general.architecture": "qwen2"}, {}, "'general.architecture' is 'qwen2', expected 'llama'"),
    "adapter": ({"general.type": "adapter"}, {}, "'general.type' is 'adapter', expected 'model'"),
    "part": ({"split.count": 3}, {}, "'split.count' is 3, expected 0 or 1"),
    "linear rope": (
        {"llama.rope.scaling.type": "linear"},
        {},
        "'llama.rope.scaling.type' is 'linear', expected 'none'",
    ),
    "rope factor": ({"llama.rope.scaling.factor": 4.0}, {}, r"not handled .*llama\.rope\.scaling\.factor = 4\.0"),
    "soft cap": ({"llama.attn_logit_softcapping": 50.0}, {}, r"not handled .*llama\.attn_logit_softcapping = 50\.0"),
    "encoder": ({"llama.attention.causal": False}, {}, "'llama.attention.causal' is False, expected True"),
    "part of the head": ({"llama.rope.dimension_count": 4}, {}, "'llama.rope.dimension_count' is 4, expected 8"),
    "values": ({"llama.attention.value_length": 16}, {}, "'llama.attention.value_length' is 16, expected 8"),
    "kv heads": ({"llama.attention.head_count_kv": 3}, {}, "4 heads of width 8 share 3 heads"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, {}, r"head_count' is array\(\[4, 4\].*an integer"),
    "text": ({"llama.block_count": "two"}, {}, "'llama.block_count' is 'two', expected an integer of at least 1"),
    "layers": ({"llama.block_count": 2**31}, {}, r"tensor 'blk\.2\.attn_norm\.weight' is missing, expected .*\(32,\)"),
    "no layers": ({"llama.block_count": 0}, {}, "'llama.block_count' is 0, expected an integer of at least 1"),
    "width": ({"llama.embedding_length": 64, "llama.attention.key_length": 8}, {}, r"'token_embd\.weight' is of shape"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, {}, "is -1.0, expected a positive number"),
    "theta": ({"llama.rope.freq_base": float("nan")}, {}, "'llama.rope.freq_base' is nan, expected a positive number"),
    "vocabulary": ({"llama.vocab_size": 97}, {}, "'llama.vocab_size' is 97, expected 96"),
    "tokens": ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "has 2 tokens, expected 96, the rows of the embedding"),
    "token id": ({"tokenizer.ggml.eos_token_id": 96}, {}, "'tokenizer.ggml.eos_token_id' is 96, expected less than 96"),
    "choices": ({"llama.expert_count": 2, "llama.expert_used_count": 3}, {}, "expert_used_count is 3 and .* is 2"),
    "no experts": (
        {"llama.expert_count": 2, "llama.expert_used_count": 2},
        {},
        r"'blk\.0\.ffn_gate_inp\.weight' is miss",
    ),
    "many experts": (
        {"llama.expert_count": 2**31, "llama.expert_used_count": 2},
        {"blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)},
        r"'blk\.0\.ffn_gate_inp\.weight' is of shape \(2, 32\), expected one of shape \(2147483648, 32\)",
    ),
    "missing": (
        {},
        {"blk.1.ffn_up.weight": None},
        r"'blk\.1\.ffn_up\.weight' is missing, expected one of shape \(64, 32",
    ),
    "no embedding": ({}, {"token_embd.weight": None}, r"no tensor 'token_embd\.weight'"),
    "shape": (
        {},
        {"blk.0.attn_v.weight": np.ones((32, 32), np.float32)},
        r"is of shape \(32, 32\), expected .*\(16, 32",
    ),
    "rope factors": ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, "not handled .*rope_freqs.weight"),
    "bias": ({}, {"blk.0.attn_q.bias": np.ones(32, np.float32)}, "not handled .*blk.0.attn_q.bias"),
}


@pytest.mark.parametrize("metadata,tensors,message", REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_result_is_refused_by_name(metadata, tensors, message, rng, tmp_path):
    sizes = {f"llama.{key}": value for key, value in SIZES.items()}
    present = {n: t for n, t in {**to_gguf(random_llama(rng)), **tensors}.items() if t is not None}
    architecture = metadata.get("general.architecture", "llama")
    extra = {key: value for key, value in metadata.items() if key != "general.architecture"}
    path = write_gguf(tmp_path / "model.gguf", {**sizes, **extra}, present, architecture)
    with pytest.raises(CheckpointError, match=message) as caught:
        LlamaGGUF(path)
    assert str(path) in str(caught.value)


def test_a_file_without_metadata_is_refused(rng, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", {}, {"w": rng.normal(size=4).astype(np.float32)}, architecture=None)
    with pytest.raises(CheckpointError, match=r"'general\.architecture' is missing, expected 'llama'"):
        LlamaGGUF(path)


# The real model


def test_the_real_model_has_the_published_architecture(smollm2):
    model = LlamaGGUF(smollm2)
    sizes = {np.prod(model.shape(name), dtype=int) for name in model.names()}
    assert len(model.names()) == 272 and max(sizes) == 49_152 * 576
    assert sum(np.prod(model.shape(name), dtype=int) for name in model.names()) == 134_515_008
    assert model.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    assert model.config["tie_word_embeddings"] and "lm_head.weight" not in model.names()
    assert model.config["rms_norm_eps"] == 1e-5


def test_the_header_of_the_real_model_is_what_the_package_reads(smollm2):
    file, reader = GGUFFile(smollm2), gguf.GGUFReader(smollm2)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for key, value in fields.items():
        np.testing.assert_array_equal(file.metadata[key], value, err_msg=key)
    places = {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset) for t in reader.tensors}
    assert {name: (t.shape, t.kind, t.start) for name, t in file.tensors.items()} == places


@pytest.mark.parity
def test_the_tensors_of_the_real_model_equal_those_of_transformers_bit_for_bit(smollm2):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaGGUF(smollm2)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**model.config))
    expected = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=skeleton)
    assert expected["tensors"].keys() == set(model.names())
    for name, tensor in expected["tensors"].items():
        np.testing.assert_array_equal(model.read(name).view(np.uint32), tensor.numpy().view(np.uint32), err_msg=name)
    theirs = LlamaConfig(**expected["config"]).to_dict()
    theirs |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": float(str(np.float32(theirs["rms_norm_eps"])))}
    assert {key: theirs[key] for key in model.config} == model.config
