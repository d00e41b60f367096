"""Published configs are read whole, written back, and describe models of the published size."""

import pytest

from moe_jax.checkpoints.families import FAMILIES, family_of
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.cost import model_cost

from .hub_configs_deepseek import CONFIGS


def read(values):
    hub = HubConfig(values)
    config = family_of(hub).read(hub)
    hub.finish()
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_give_the_published_parameters(name):
    values, published, published_active = CONFIGS[name]
    config = read(values)
    family = family_of(HubConfig(values))
    assert FAMILIES["llama4_text" if family.name == "llama4" else family.name].refuses(config) == ""
    cost = model_cost(config, 1)
    assert cost.parameters / 1e9 == pytest.approx(published, rel=0.01, abs=0.9)
    # Some authors count embedding and read-out among what a token uses, others leave one or both out; all round.
    inner = cost.active_parameters - cost.embedding.parameters - cost.read_out.parameters
    assert 0.97 * inner / 1e9 < published_active < 1.03 * cost.active_parameters / 1e9


def test_deepseek_v3_has_every_parameter():
    # The hub counts 671,026,419,200 numbers without the layer that predicts a further token; 58 sparse layers keep a
    # bias for each of 256 experts, which is no parameter of ours.
    cost = model_cost(read(CONFIGS["deepseek-ai/DeepSeek-V3"][0]), 1)
    assert cost.parameters == 671_026_419_200 - 58 * 256


def test_llama_4_turns_three_of_four_layers_and_keeps_these_within_chunks():
    config = read(CONFIGS["meta-llama/Llama-4-Maverick-17B-128E"][0])
    assert config.turns[:8] == (True, True, True, False) * 2
    assert config.chunks[:4] == (8192, 8192, 8192, 0)
    assert config.layers[:4] == ("dense", "moe", "dense", "moe")
    assert config.attention_settings == {"far_scale": 0.1, "far_length": 8192}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "must hold a 0 or 1 for each of 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, "must name 48 layers"),
        ({"hidden_act": "gelu"}, "text_config: hidden_act='gelu'"),
        ({"mystery": 7}, "text_config says mystery=7"),
    ],
)
def test_the_text_of_llama_4_is_checked_like_a_config(changes, message):
    scout = CONFIGS["meta-llama/Llama-4-Scout-17B-16E"][0]
    with pytest.raises(HubError, match=message):
        read(scout | {"text_config": scout["text_config"] | changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek-ai/DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("deepseek-ai/DeepSeek-V2", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek-ai/DeepSeek-V2", {"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ("deepseek-ai/DeepSeek-V2", {"topk_method": "noaux_tc"}, "known: 'greedy', 'group_limited_greedy'"),
        ("deepseek-ai/DeepSeek-V2", {"partial_rotary_factor": 0.5}, "heads of this family turn whole"),
        ("deepseek-ai/DeepSeek-V3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek-ai/DeepSeek-V3", {"scoring_func": "softmax"}, "known: 'sigmoid'"),
        ("deepseek-ai/DeepSeek-V3", {"index_topk": 2048}, "index_topk=2048, which this import does not know"),
        ("zai-org/GLM-4.5", {"partial_rotary_factor": 1.5}, "must be in \\(0, 1\\]"),
        ("MiniMaxAI/MiniMax-M2", {"attn_type_list": [0] * 62}, "attn_type_list"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", {"moe_use_aux_free": False}, "moe_use_aux_free=False"),
        ("MiniMaxAI/MiniMax-M2", {"shared_intermediate_size": 8192}, "shared_intermediate_size=8192"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(name, changes, message):
    with pytest.raises(HubError, match=message):
        read(CONFIGS[name][0] | changes)
