"""Checkpoints of 8 bits: unpacked block by block, and the same model as the one of their products."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints.hub.block_fp8 import BlockFp8, open_block_fp8
from moe_jax.checkpoints.hub.tensor_files import Checkpoint, HubError, TensorWriter
from moe_jax.checkpoints.model_folder import import_checkpoint, load_model

from .hub_models import tiny_model

FP8 = ml_dtypes.float8_e4m3fn


def write(folder, tensors):
    folder.mkdir(exist_ok=True)
    writer = TensorWriter(folder / "model.safetensors", tensors)
    for name, value in tensors.items():
        writer.arrays[name][...] = value
    writer.close()
    return Checkpoint(folder)


def packed(weight, block):
    """8 bits and a scale for each block, the largest of which becomes 448; and their products, one at a time."""
    rows, columns = block
    scale = np.empty((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
    small, products = np.empty(weight.shape, FP8), np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(scale.shape):
        part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        scale[i, j] = np.abs(weight[part]).max() / 448
        small[part] = (weight[part] / scale[i, j]).astype(FP8)
        products[part] = small[part].astype(np.float32) * scale[i, j]
    return small, scale, products


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 2), (9, 1)])
def test_a_tensor_is_the_product_of_its_blocks(tmp_path, shape):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    small, scale, products = packed(weight, (2, 3))
    tensors = BlockFp8(write(tmp_path, {"a": small, "a_scale_inv": scale, "b": weight}), (2, 3))
    assert tensors.names() == ["a", "b"]
    assert tensors.shape("a") == shape
    np.testing.assert_array_equal(tensors.read("a"), products)
    np.testing.assert_array_equal(tensors.read("b"), weight)
    np.testing.assert_allclose(products, weight, rtol=2**-4, atol=np.abs(weight).max() * 2**-9)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": ((4, 4), FP8)}, "'a_scale_inv' with its scales is missing"),
        ({"a_scale_inv": ((2, 2), np.float32)}, "without the tensor 'a'"),
        ({"a": ((5, 4), FP8), "a_scale_inv": ((2, 2), np.float32)}, r"shape \[2, 2\]; one number for each 2 x 2 block"),
        ({"a": ((4,), FP8), "a_scale_inv": ((2,), np.float32)}, "one number for each 2 x 2 block"),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, stored, message):
    tensors = write(tmp_path, {name: np.zeros(shape, dtype) for name, (shape, dtype) in stored.items()})
    with pytest.raises(HubError, match=message):
        BlockFp8(tensors, (2, 2)).read("a")


@pytest.mark.parametrize(
    "changes", [{"quant_method": "awq"}, {"weight_block_size": None}, {"weight_block_size": [128]}, {"fmt": "e5m2"}]
)
def test_other_packings_are_refused(tmp_path, changes):
    given = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]} | changes
    tensors = write(tmp_path, {"a": np.zeros(2, np.float32)})
    assert open_block_fp8(tensors, {}) is tensors
    with pytest.raises(HubError, match="is not supported: only quant_method 'fp8'"):
        open_block_fp8(tensors, {"quantization_config": given})


@pytest.mark.parity
def test_products_equal_those_of_transformers(tmp_path):
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)
    small, scale, _ = packed(weight, (4, 5))
    stored = {
        "weight": torch.tensor(small.view(np.uint8)).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.tensor(scale),
    }
    theirs = Fp8Dequantize(None).convert(stored)["weight"].numpy()
    tensors = BlockFp8(write(tmp_path, {"weight": small, "weight_scale_inv": scale}), (4, 5))
    np.testing.assert_array_equal(tensors.read("weight"), theirs)


@pytest.mark.parity
def test_a_model_of_8_bits_is_the_model_of_its_products(tmp_path):
    tiny_model("deepseek_v3", "groups").save_pretrained(tmp_path / "plain")
    plain, stored, unpacked = Checkpoint(tmp_path / "plain"), {}, {}
    for name in plain.names():
        weight = plain.read(name)
        unpacked[name] = stored[name] = weight
        if name.endswith("_proj.weight") or "kv_a_proj" in name:  # as published: no gate, norm, embedding or read-out
            stored[name], stored[f"{name}_scale_inv"], unpacked[name] = packed(weight, (8, 8))
    # The layer behind the last, which predicts a further token, is left unread.
    stored["model.layers.3.eh_proj.weight"] = np.zeros((4, 8), np.float32)
    hub_config = json.loads((tmp_path / "plain" / "config.json").read_text())
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    for name, tensors, more in (("eight", stored, {"quantization_config": quantised}), ("unpacked", unpacked, {})):
        write(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(hub_config | more))
        import_checkpoint(tmp_path / name, tmp_path / f"ours {name}")
    eight, expected = (Checkpoint(tmp_path / f"ours {name}") for name in ("eight", "unpacked"))
    assert set(eight.names()) == set(expected.names())
    for name in eight.names():
        np.testing.assert_array_equal(eight.read(name), expected.read(name), err_msg=name)
    assert load_model(tmp_path / "ours eight").config.rule == "group_limited_sigmoid_top_k"
