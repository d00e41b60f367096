"""What the families read from a config, beyond what the parity tests run, and what they refuse by name."""

import pytest

from moe_jax.checkpoints.families import FAMILIES, family_of
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError

from .hub_configs_mixtral import (
    GPT_OSS_20B,
    GRANITE_1B_A400M,
    HUB_CONFIGS,
    OLMOE_1B_7B,
    PHI_3_5_MOE,
    QWEN1_5_MOE_A2_7B,
    QWEN3_0_6B,
    QWEN3_30B_A3B,
)

WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "factor": 2.0}


def read(values, **changes):
    hub = HubConfig(values | changes)
    config = family_of(hub).read(hub)
    hub.finish()
    return config


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_an_attribute_that_nobody_knows_is_refused_by_name(name):
    with pytest.raises(HubError, match="mystery=7"):
        read(HUB_CONFIGS[name][0], mystery=7)


def test_which_layers_have_a_window():
    assert read(QWEN3_0_6B, **WINDOWED, max_window_layers=3).windows == (0, 0, 0, 9)
    assert read(QWEN1_5_MOE_A2_7B, **WINDOWED, max_window_layers=3).windows == (9, 0, 9, 0)
    assert read(QWEN3_30B_A3B, **WINDOWED).windows == (9, 9, 9, 9)
    assert read(QWEN3_30B_A3B, **WINDOWED | {"use_sliding_window": False}).windows == ()
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert read(QWEN3_0_6B, **WINDOWED, layer_types=types).windows == (0, 9, 0, 0)
    by_default = {key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"}
    assert read(by_default) == read(GPT_OSS_20B)


def test_which_layers_are_sparse():
    shape = {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert read(QWEN3_30B_A3B, **shape).layers == ("dense", "moe", "dense", "dense", "dense")
    written = FAMILIES["qwen3_moe"].write(read(QWEN3_30B_A3B, **shape))
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [0, 2, 3, 4])


def test_the_length_before_stretching_is_that_of_the_config_unless_given():
    def original(**changes):
        return read(QWEN3_0_6B, **changes).rotary_settings["original_length"]

    assert original(rope_scaling=YARN) == 40960
    assert original(rope_scaling=YARN | {"original_max_position_embeddings": 64}) == 64
    assert original(rope_scaling=YARN, original_max_position_embeddings=128) == 128


def test_experts_go_by_either_name():
    renamed = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_experts"}
    assert read(renamed, num_local_experts=128) == read(QWEN3_30B_A3B)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (QWEN3_0_6B, {"layer_types": ["full_attention"]}, "must name 28 layers"),
        (QWEN3_0_6B, {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "chunked_attention"),
        (QWEN3_0_6B, {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "no sliding_window"),
        (QWEN3_0_6B, {"sliding_window": -1}, "must not be negative"),
        (QWEN3_0_6B, {"rope_scaling": {"rope_type": "yarn"}}, "need a factor"),
        (QWEN3_0_6B, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' are not supported"),
        (QWEN3_0_6B, {"rope_scaling": {"rope_type": ["yarn"]}}, r"\['yarn'\]\" are not supported"),
        (QWEN3_0_6B, {"rope_scaling": YARN | {"factor": "4"}}, "'factor' .* must be a positive number, got '4'"),
        (QWEN3_0_6B, {"rope_scaling": YARN | {"truncate": 1}}, "'truncate' .* must be true or false, got 1"),
        (QWEN3_0_6B, {"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number that float32 holds, got nan"),
        (QWEN3_0_6B, {"rope_theta": 10**400}, "'rope_theta' must be a number that float32 holds, got inf"),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, "num_experts=128"),
        (OLMOE_1B_7B, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (GRANITE_1B_A400M, {"logits_scaling": 0}, "must be positive"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "awq"}}, "'awq' are not supported"),
        (GPT_OSS_20B, {"rope_scaling": None}, "lacks 'rope_scaling'"),
        (GPT_OSS_20B, {"experts_per_token": 2}, "experts_per_token=2 is not supported"),
        (PHI_3_5_MOE, {"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not supported"),
        (PHI_3_5_MOE, {"router_jitter_noise": 1.5}, "router_jitter_noise must be in"),
        (PHI_3_5_MOE, {"rope_scaling": PHI_3_5_MOE["rope_scaling"] | {"short_factor": [1.0, None]}}, "'short_factor'"),
        (PHI_3_5_MOE, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' are not supported"),
    ],
)
def test_what_is_not_handled_is_refused(values, changes, message):
    with pytest.raises(HubError, match=message):
        read(values, **changes)


def test_a_family_refuses_what_it_would_read_back_otherwise():
    config = read(QWEN3_30B_A3B)
    assert FAMILIES["qwen3_moe"].refuses(config) == ""
    assert "attention_settings" in FAMILIES["mixtral"].refuses(config)
    assert "layers" in FAMILIES["qwen3"].refuses(config)
