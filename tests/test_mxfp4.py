"""MXFP4 tensors: worked by hand, against the unpacking of `transformers`, and as a whole checkpoint of gpt-oss."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints.hub.mxfp4 import UnpackedTensors, unpack
from moe_jax.checkpoints.hub.tensor_files import Checkpoint, HubError, TensorFile, TensorWriter
from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint

from .hub_models import tiny_model

EXPERTS, ROWS, GROUPS = 3, 5, 2


def random_packed(rng, *shape):
    """Blocks and scales, of numbers around one."""
    blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    return blocks, rng.integers(118, 128, shape, dtype=np.uint8)


def write(path, tensors):
    writer = TensorWriter(path, tensors)
    for name, value in tensors.items():
        writer.arrays[name][...] = value
    writer.close()
    return TensorFile(path)


def test_a_block_worked_by_hand():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :3] = [0x21, 0xF7, 0x08]
    # 0x1 is 0.5 and comes first, 0x2 is 1; 0x7 is 6, 0xF is -6; 0x8 is -0. The scale 129 is 2^(129 - 127) = 4.
    numbers = unpack(blocks, np.array([129], np.uint8))
    assert numbers.shape == (32,)
    np.testing.assert_array_equal(numbers[:6], [2, 4, 24, -24, 0, 0])
    assert np.signbit(numbers[4])


def test_bfloat16_holds_every_number_of_every_scale():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (253, 1, 1))
    numbers = unpack(blocks, np.repeat(np.arange(253, dtype=np.uint8)[:, None], 16, 1))
    assert numbers.max() == 6 * 2.0**125
    np.testing.assert_array_equal(numbers.astype(ml_dtypes.bfloat16).astype(np.float32), numbers)


def test_packed_tensors_are_shown_unpacked(rng, tmp_path):
    blocks, scales = random_packed(rng, EXPERTS, ROWS, GROUPS)
    plain = rng.normal(size=(2, 2)).astype(np.float32)
    tensors = UnpackedTensors(
        write(tmp_path / "a.safetensors", {"w_blocks": blocks, "other": plain, "w_scales": scales})
    )
    assert tensors.names() == ["other", "w"]
    assert tensors.shape("w") == (EXPERTS, 32 * GROUPS, ROWS)
    assert tensors.shape("other") == (2, 2)
    np.testing.assert_array_equal(tensors.read("other"), plain)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = np.zeros((EXPERTS, 32 * GROUPS, ROWS))
    for e, row, group, byte, half in np.ndindex(EXPERTS, ROWS, GROUPS, 16, 2):
        bits = int(blocks[e, row, group, byte]) >> (4 * half) & 15
        sign = -1 if bits >= 8 else 1
        power = 2.0 ** (int(scales[e, row, group]) - 127)
        expected[e, 32 * group + 2 * byte + half, row] = sign * magnitudes[bits % 8] * power
    np.testing.assert_array_equal(tensors.read("w").astype(np.float64), expected)


def test_unpacking_needs_little_besides_the_result(rng, tmp_path):
    blocks, scales = random_packed(rng, 16, 64, 8)
    tensors = UnpackedTensors(write(tmp_path / "a.safetensors", {"w_blocks": blocks, "w_scales": scales}))
    tensors.read("w")
    tracemalloc.start()
    result = tensors.read("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * result.nbytes  # of 16 experts, one at a time is in float32 and integers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_scales": None}, "needs w_blocks .* and w_scales"),
        ({"w_blocks": None}, "needs w_blocks .* and w_scales"),
        ({"w_scales": np.zeros((EXPERTS, ROWS, GROUPS + 1), np.uint8)}, "got shapes"),
        ({"w_blocks": np.zeros((EXPERTS, ROWS, GROUPS, 8), np.uint8)}, "got shapes"),
        ({"w_scales": np.zeros((EXPERTS, ROWS, GROUPS), np.float32)}, "must be bytes"),
        ({"w_scales": np.full((EXPERTS, ROWS, GROUPS), 253, np.uint8)}, r"a scale of 2\^126"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message, rng, tmp_path):
    blocks, scales = random_packed(rng, EXPERTS, ROWS, GROUPS)
    tensors = {"w_blocks": blocks, "w_scales": scales} | changes
    file = write(tmp_path / "a.safetensors", {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(HubError, match=message):
        UnpackedTensors(file).read("w")


@pytest.mark.parity
def test_unpacking_equals_transformers(rng, tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, _ = random_packed(rng, EXPERTS, ROWS, GROUPS)
    scales = rng.integers(10, 245, (EXPERTS, ROWS, GROUPS), dtype=np.uint8)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32).numpy()
    file = write(tmp_path / "a.safetensors", {"w_blocks": blocks, "w_scales": scales})
    np.testing.assert_array_equal(UnpackedTensors(file).read("w").astype(np.float32), expected)


def packed_checkpoint(model, folder, rng):
    """Saves a tiny gpt-oss in bfloat16 with random packed experts, as the published ones are, without a dtype."""
    model.save_pretrained(folder)
    plain, tensors = Checkpoint(folder), {}
    for name in plain.names():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = plain.shape(name)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_packed(rng, experts, rows, width // 32)
        else:
            tensors[name] = plain.read(name).astype(ml_dtypes.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parity
def test_a_packed_checkpoint_is_imported_and_leaves_unpacked(rng, tmp_path):
    import torch
    from transformers import GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = packed_checkpoint(tiny_model("gpt_oss", "packed widths"), tmp_path / "theirs", rng)
    facts = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert facts.dtype == "bfloat16"
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    for name in again.names():
        ours = again.read(name)
        assert ours.dtype == ml_dtypes.bfloat16
        if f"{name}_blocks" in packed:
            parts = (torch.tensor(packed[f"{name}_{part}"]) for part in ("blocks", "scales"))
            expected = convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
        else:
            expected = packed[name].astype(np.float32)
        np.testing.assert_array_equal(ours.astype(np.float32), expected, err_msg=name)
    opened = GptOssForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert opened.dtype == torch.bfloat16
