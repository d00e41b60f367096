"""Published configs are read whole, written back, and describe models of the published size."""

import pytest

from moe_jax.checkpoints.families import family_of
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.cost import model_cost

from .hub_configs_b import CONFIGS


def read(values):
    hub = HubConfig(values)
    config = family_of(hub).read(hub)
    hub.finish()
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_give_the_published_parameters(name):
    values, published, published_active = CONFIGS[name]
    config = read(values)
    assert family_of(HubConfig(values)).refuses(config) == ""
    cost = model_cost(config, 1)
    assert cost.parameters / 1e9 == pytest.approx(published, rel=0.01)
    # Some authors count the embedding among what a token uses, others leave it out; both round.
    without_embedding = cost.active_parameters - cost.embedding.parameters
    assert 0.97 * without_embedding / 1e9 < published_active < 1.03 * cost.active_parameters / 1e9


def test_deepseek_v3_has_every_parameter():
    # The hub counts 671,026,419,200 numbers without the layer that predicts a further token; 58 sparse layers keep a
    # bias for each of 256 experts, which is no parameter of ours.
    cost = model_cost(read(CONFIGS["deepseek-ai/DeepSeek-V3"][0]), 1)
    assert cost.parameters == 671_026_419_200 - 58 * 256


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("DeepSeek-V2", {"attention_bias": True}, "attention_bias=True"),
        ("DeepSeek-V2", {"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "known: 'greedy', 'group_limited_greedy'"),
        ("DeepSeek-V2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor has no meaning"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave=False"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "known: 'sigmoid'"),
        ("DeepSeek-V3", {"index_topk": 2048}, "index_topk=2048, which this import does not know"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(name, changes, message):
    with pytest.raises(HubError, match=message):
        read(CONFIGS[f"deepseek-ai/{name}"][0] | changes)
