"""The text of a Llama 4 checkpoint that reads images too."""

import json

import numpy as np
import pytest

from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model, read_facts

from .hub_models import BODY, VOCAB

TEXT = BODY | {"head_dim": 8, "intermediate_size_mlp": 20, "num_local_experts": 4, "attention_chunk_size": 4}
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vision_output_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}


@pytest.fixture(scope="module")
def model():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Llama4Config(text_config=TEXT, vision_config=VISION)
    config._attn_implementation = "eager"
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith("language_model."):
                tensor.add_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    return model


@pytest.mark.parity
def test_the_text_is_imported_and_goes_back_as_a_model_of_text(model, tmp_path):
    import torch
    import transformers

    model.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "llama4"
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert read_facts(tmp_path / "ours").family == "llama4"
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 9))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    logits, _ = load_model(tmp_path / "ours")(tokens)
    np.testing.assert_allclose(logits, expected, atol=2e-5)

    with pytest.raises(HubError, match="reads images too, which ours does not; export with family 'llama4_text'"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again")
    export_checkpoint(tmp_path / "ours", tmp_path / "again", family="llama4_text")
    again = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-6)
    theirs = model.language_model.state_dict()
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
