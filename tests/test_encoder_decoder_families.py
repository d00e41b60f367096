"""Configs and tables of Switch Transformers and NLLB-MoE, without the reference: complete, strict, both ways."""

import dataclasses

import jax
import pytest
from flax import nnx

from moe_jax.checkpoints.families.nllb_moe import NLLB_MOE
from moe_jax.checkpoints.families.switch_transformers import SWITCH_TRANSFORMERS
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig

SMALL_SWITCH = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2, "num_layers": 4, "num_experts": 3}
SMALL_NLLB = {
    "vocab_size": 40,
    "d_model": 8,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_ffn_dim": 6,
    "decoder_ffn_dim": 6,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_experts": 3,
    "decoder_sparse_step": 1,
}
FAMILIES = {"switch": (SWITCH_TRANSFORMERS, SMALL_SWITCH), "nllb": (NLLB_MOE, SMALL_NLLB)}


def read(family, values):
    return family.read(HubConfig(values))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "router_bias": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_has_every_parameter_once(name, changes):
    family, hf = FAMILIES[name]
    config = read(family, hf | changes)
    model = jax.eval_shape(lambda: nnx.state(EncoderDecoder(config, key=jax.random.key(0)), nnx.Param))
    paths = ["/".join(str(part) for part in path) for path, _ in nnx.to_flat_state(model)]
    entries = list(family.table(config))
    assert sorted(entry.ours for entry in entries) == sorted(paths)
    names = [entry.theirs for entry in entries]
    assert len(set(names)) == len(names)
    assert {entry.experts for entry in entries if ".experts." in entry.theirs} == {3}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_as_the_same(name):
    family, hf = FAMILIES[name]
    config = read(family, hf)
    assert read(family, family.write(config)) == config
    elsewhere = dataclasses.replace(config, backend="gather", stats_level="sequence", compute_dtype="bfloat16")
    assert family.write(elsewhere) == family.write(config)
    several = dataclasses.replace(config, stop_ids=(2, 3), encoder_layers=("dense",) * 4)
    assert read(family, family.write(several)) == several
    assert read(family, family.write(dataclasses.replace(config, stop_ids=()))).stop_ids == ()


def test_sparse_layers_of_switch():
    def layers(**changes):
        config = read(SWITCH_TRANSFORMERS, SMALL_SWITCH | changes)
        return ["".join(kind[0] for kind in side) for side in (config.encoder_layers, config.decoder_layers)]

    assert layers(num_sparse_encoder_layers=2, num_sparse_decoder_layers=4) == ["dmdm", "mmmm"]
    assert layers(num_decoder_layers=6, num_sparse_decoder_layers=2) == ["mmmm", "dmddmd"]
    assert layers(num_sparse_encoder_layers=0) == ["dmdd", "mmmm"]  # as theirs, whose step of 4 makes one of none
    assert layers(encoder_sparse_step=0, decoder_sparse_step=3) == ["dddd", "dmdd"]


def test_sparse_layers_of_nllb():
    config = read(NLLB_MOE, SMALL_NLLB | {"encoder_sparse_step": 3, "decoder_sparse_step": 0})
    assert (config.encoder_layers, config.decoder_layers) == (("dense", "dense", "moe", "dense"), ("dense", "dense"))


def test_capacity_of_nllb():
    capacity = lambda **changes: read(NLLB_MOE, SMALL_NLLB | changes).token_capacity  # noqa: E731
    assert capacity() is None
    assert capacity(moe_eval_capacity_token_fraction=0.3) == (0.3, "share", False)
    assert capacity(moe_eval_capacity_token_fraction=-1.0, expert_capacity=7) == (7, "tokens", False)


def test_attributes_of_older_versions_are_read():
    older = {
        "add_router_probs": False,
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "batch_prioritized_routing": False,
        "capacity_factor": 1.25,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "num_selected_experts": 1,
        "output_past": True,
        "router_jitter": 0.01,
        "router_type": "tokens_masked",
        "torch_dtype": "float32",
        "transformers_version": "4.25.0.dev0",
    }
    assert read(SWITCH_TRANSFORMERS, SMALL_SWITCH | older) == read(SWITCH_TRANSFORMERS, SMALL_SWITCH)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("switch", {"qk_norm": True}, "switch_transformers has unknown attributes qk_norm=True"),
        ("switch", {"quantization_config": {}}, "unknown attributes quantization_config"),
        ("switch", {"model_type": "t5"}, "model_type 't5', expected 'switch_transformers'"),
        ("switch", {"router_dtype": "bfloat16"}, "router_dtype='bfloat16' is not supported, only .*'float32'"),
        ("switch", {"num_selected_experts": 2}, "num_selected_experts=2 is not supported"),
        ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn='gated-gelu' is not supported; known: relu, gelu"),
        ("switch", {"d_model": "8"}, "d_model='8' must be int"),
        ("switch", {"d_model": True}, "d_model=True must be int"),
        ("switch", {"d_model": 0}, "width=0 must be a positive number"),
        ("switch", {"num_layers": 10**12}, "1000000000000 layers, expected 1 to 10,000"),
        ("switch", {"num_layers": 0}, "0 layers, expected 1 to 10,000"),
        ("switch", {"layer_norm_epsilon": None}, "layer_norm_epsilon=None must be float or int"),
        ("switch", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be bool"),
        ("switch", {"pad_token_id": None}, "pad_token_id=None must be int"),
        ("switch", {"eos_token_id": [1, "2"]}, "eos_token_id='2' must be int"),
        ("nllb", {"second_expert_policy": "random"}, "second_expert_policy='random' is not supported, only .*'all'"),
        ("nllb", {"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens=True is not supported"),
        ("nllb", {"activation_function": "tanh"}, "activation_function='tanh' is not supported"),
        ("nllb", {"encoder_attention_heads": 3}, "width=8 must be a multiple of encoder_heads=3"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(name, changes, message):
    family, hf = FAMILIES[name]
    with pytest.raises(ValueError, match=message):
        read(family, hf | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("switch", {"encoder_heads": 1}, r"switch_transformers model cannot have decoder_heads=2 \(it has 1\)"),
        ("switch", {"norm": "layer"}, r"cannot have norm='layer' \(it has 'rms'\)"),
        ("switch", {"capacity_unit": "share"}, "cannot have capacity=Capacity.amount=64, unit='share'"),
        ("switch", {"scale_logits": False}, "cannot have scale_logits=False"),
        ("switch", {"encoder_layers": ("moe", "dense")}, r"encoder_layers=\('moe', 'dense'\) has no regular step"),
        ("nllb", {"rule": "softmax_top_k", "rule_settings": {}}, "cannot have rule='softmax_top_k'"),
        ("nllb", {"expert": "swiglu", "expert_settings": {"use_bias": True}}, "'gelu' is not|cannot have expert="),
        ("nllb", {"head_width": 4, "decoder_heads": 4}, r"cannot have head_width=\[4, 4\] \(it has \[4, 2\]\)"),
        ("nllb", {"positions": "relative"}, "cannot have positions='relative'"),
    ],
)
def test_what_a_family_cannot_be_is_not_written(name, changes, message):
    family, hf = FAMILIES[name]
    with pytest.raises(ValueError, match=message):
        family.write(dataclasses.replace(read(family, hf), **changes))


def test_defaults_may_be_spelled_out_or_not():
    config = EncoderDecoderConfig(capacity=4, capacity_unit="tokens")
    hf = SWITCH_TRANSFORMERS.write(config)
    assert (hf["d_kv"], hf["router_bias"], hf["router_jitter_noise"], hf["expert_capacity"]) == (32, False, 0.0, 4)
    spelled_out = read(SWITCH_TRANSFORMERS, hf)
    assert spelled_out != config and SWITCH_TRANSFORMERS.write(spelled_out) == hf
