"""Our encoder-decoder against Switch Transformers and NLLB-MoE of `transformers`: logits, routing, generated text.

All weights of the tiny reference models are redrawn, so that routers decide and no norm or bias is at its start.
"""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model, save_model
from moe_jax.models.generate_target import generate_target
from moe_jax.ops.relative_position import relative_position_buckets
from moe_jax.ops.sinusoid import sinusoidal_positions

VOCABULARY = 48
SWITCH = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 5,
    "expert_capacity": 64,
    "decoder_start_token_id": 0,
}
NLLB = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "num_experts": 5,
    "max_position_embeddings": 64,
}
CASES = {  # family, its config, whether the capacity is short
    "switch": ("switch", SWITCH, False),
    "switch, short of capacity": ("switch", SWITCH | {"expert_capacity": 2}, True),
    "switch, untied, gelu, all layers sparse or every third, heads narrower than the model": (
        "switch",
        SWITCH
        | {
            "tie_word_embeddings": False,
            "dense_act_fn": "gelu_new",
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 3,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "d_kv": 5,
            "router_bias": True,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
            "expert_capacity": 3,
        },
        True,
    ),
    "switch, dense decoder": ("switch", SWITCH | {"num_decoder_layers": 1, "decoder_sparse_step": 0}, False),
    "nllb": ("nllb", NLLB, False),
    "nllb, short of capacity": ("nllb", NLLB | {"moe_eval_capacity_token_fraction": 0.2}, True),
    "nllb, short of capacity, the likely tokens first": (
        "nllb",
        NLLB | {"moe_eval_capacity_token_fraction": 0.2, "batch_prioritized_routing": True},
        True,
    ),
    "nllb, untied, gelu, counted capacity, normalised before": (
        "nllb",
        NLLB
        | {
            "tie_word_embeddings": False,
            "activation_function": "gelu",
            "router_bias": True,
            "scale_embedding": False,
            "moe_token_dropout": 0.0,
            "moe_eval_capacity_token_fraction": -1.0,
            "expert_capacity": 5,
            "normalize_router_prob_before_dropping": True,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 3,
            "decoder_layers": 3,
        },
        True,
    ),
}


def experts_by_gates(self, hidden, top_1_mask, gates):
    """What an NLLB layer is meant to compute: every expert of a token, by its gate."""
    outputs = [gates[:, index, None] * self[f"expert_{index}"](hidden) for index in range(self.num_experts)]
    return (1 - self.moe_token_dropout) * sum(outputs)


def reference(family, settings, monkeypatch):
    """A model of `transformers` with weights of a size at which everything in it matters."""
    import torch
    import transformers
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    torch.set_num_threads(1)  # of such small matrices several only wait for each other
    monkeypatch.setattr(NllbMoeExperts, "forward", experts_by_gates)
    name = {"switch": "SwitchTransformers", "nllb": "NllbMoe"}[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if re.search(r"shared|embed|lm_head", path):
                parameter.copy_(noise * (config.d_model**-0.5 if family == "nllb" else 1.0))
                parameter[config.pad_token_id] = 0
            elif "norm" in path and path.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2))
    return model


def ours_from(theirs, folder):
    theirs.save_pretrained(folder / "theirs")
    import_checkpoint(folder / "theirs", folder / "ours")
    return load_model(folder / "ours")


def padded(lengths, pad_id, seed):
    """Random ids behind which come padding, and the mask."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
    return np.where(mask, ids, pad_id), mask


def batch_for(theirs):
    source, source_mask = padded((17, 9, 4), theirs.config.pad_token_id, 1)
    target, target_mask = padded((12, 14, 5), theirs.config.pad_token_id, 2)
    target[:, 0] = theirs.config.decoder_start_token_id
    return source, target, source_mask, target_mask


def run_reference(theirs, source, target, source_mask, target_mask):
    """Logits, and of each router in encoder and decoder the gates `[B, S, E]` of what it dispatches and its logits."""
    import torch

    seen = {"encoder": [], "decoder": []}

    def listen(side, module):
        def hook(_, inputs, outputs):
            first, probabilities, logits = outputs
            gates = first * probabilities if first.ndim == 3 else probabilities  # Switch's mask, NLLB's own gates
            seen[side].append((gates.numpy(), logits.numpy()))

        return module.register_forward_hook(hook)

    modules = [(name, module) for name, module in theirs.named_modules() if name.endswith("mlp.router")]
    modules += [(name, module) for name, module in theirs.named_modules() if name.endswith("ffn.router")]
    hooks = [listen("encoder" if "encoder." in name else "decoder", module) for name, module in modules]
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(source),
            attention_mask=torch.tensor(source_mask).long(),
            decoder_input_ids=torch.tensor(target),
            decoder_attention_mask=torch.tensor(target_mask).long(),
        )
    for hook in hooks:
        hook.remove()
    return output.logits.numpy(), seen


def dense_gates(plan):
    """`[L, T, K]` slots to gates `[L, T, E]`."""
    gates = np.zeros((*plan.expert_ids.shape[:2], plan.num_experts + 1), np.float32)
    np.put_along_axis(gates, np.asarray(plan.expert_ids), np.asarray(plan.gates), axis=-1)
    return gates[..., :-1]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_logits_and_routing_equal_the_reference(case, monkeypatch, tmp_path):
    family, settings, is_short = CASES[case]
    theirs = reference(family, settings, monkeypatch)
    model, batch = ours_from(theirs, tmp_path), batch_for(theirs)
    expected, seen = run_reference(theirs, *batch)
    graphdef, state = nnx.split(model)
    logits, *routed = jax.jit(lambda state: nnx.merge(graphdef, state)(*batch, trace="full"))(state)
    masks = batch[2:]
    assert np.abs(expected).mean() > 0.3
    np.testing.assert_allclose(logits[masks[1]], expected[masks[1]], atol=2e-5)
    scale = model.config.rule_settings.get("scale", 1.0)
    for side, mask, output in zip(("encoder", "decoder"), masks, routed, strict=True):
        if output.plan is None:
            assert seen[side] == []
            continue
        num_dropped = 0
        for layer, (gates, router_logits) in enumerate(seen[side]):
            shape = (-1, gates.shape[-1])
            mine = dense_gates(output.plan)[layer][mask.ravel()] / scale
            gates = gates.reshape(shape)[mask.ravel()]
            np.testing.assert_array_equal(mine > 0, gates > 0)
            np.testing.assert_allclose(mine, gates, atol=5e-6)
            router_logits = router_logits.reshape(shape)[mask.ravel()]
            np.testing.assert_allclose(output.logits[layer][mask.ravel()], router_logits, atol=2e-5)
            num_dropped += mask.sum() * model.config.num_choices - (gates > 0).sum()
        assert num_dropped == output.stats.dropped_capacity.sum()
        assert (num_dropped > 0) == is_short
        assert len(seen[side]) == len(output.logits)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_equals_the_reference(case, monkeypatch, tmp_path):
    """64 tokens for sources of different lengths, then again with a stop token that only some of the texts hold."""
    import torch

    family, settings, _ = CASES[case]
    if settings.get("moe_eval_capacity_token_fraction", 1.0) < 1:
        settings = settings | {"moe_eval_capacity_token_fraction": 1.0}  # else ended texts push others out, in theirs
    theirs = reference(family, settings, monkeypatch)
    model = ours_from(theirs, tmp_path)
    source, _, mask, _ = batch_for(theirs)
    given = {"forced_bos_token_id": 7} if family == "nllb" else {}  # the target's language
    start = np.array([[model.config.start_id, *given.values()]] * len(source))

    def texts_of_both(stop_id):
        theirs.generation_config.eos_token_id = stop_id
        expected = theirs.generate(
            torch.tensor(source),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=64,
            do_sample=False,
            num_beams=1,
            **given,
        ).numpy()
        stop_ids = [-1 if stop_id is None else stop_id]
        target = generate_target(model, source, mask, max_tokens=65 - start.shape[1], given=start, stop_ids=stop_ids)
        length = max(target.lengths)
        np.testing.assert_array_equal(target.tokens[:, :length], expected)
        assert (np.asarray(target.tokens[:, length:]) == model.config.pad_id).all()
        return expected, target.lengths

    texts, lengths = texts_of_both(None)
    assert texts.shape == (3, 65) and set(lengths.tolist()) == {65}
    free = texts[:, start.shape[1] :]
    holds = {int(token): sum(token in row for row in free) for token in np.unique(free) if token not in start}
    stop_id = min(holds, key=holds.get)  # in as few of the texts as there are such
    _, lengths = texts_of_both(stop_id)
    assert min(lengths) < 65


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_export_builds_the_same_reference_and_import_of_it_is_exact(case, monkeypatch, tmp_path):
    family, settings, _ = CASES[case]
    theirs = reference(family, settings, monkeypatch)
    model = ours_from(theirs, tmp_path)
    save_model(model, tmp_path / "own")  # forgets where it came from, so its config is written anew
    batch = batch_for(theirs)
    expected = run_reference(theirs, *batch)[0]
    for ours, out in (("ours", "again"), ("own", "written")):
        export_checkpoint(tmp_path / ours, tmp_path / out, family=theirs.config.model_type)
        again = copy.deepcopy(type(theirs).from_pretrained(tmp_path / out).eval())
        np.testing.assert_array_equal(run_reference(again, *batch)[0], expected)
        import_checkpoint(tmp_path / out, tmp_path / f"{out} ours")
        back = load_model(tmp_path / f"{out} ours")
        jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.parity
def test_the_reference_sends_all_nllb_tokens_to_two_experts():
    """The fault that `experts_by_gates` repairs; once this fails, the repair can go."""
    import torch
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(0)
    layer = NllbMoeSparseMLP(NllbMoeConfig(d_model=8, num_experts=4), 6).eval()
    hidden = torch.randn(1, 20, 8)
    with torch.no_grad():
        before = layer(hidden)
        assert set(layer.router(hidden[0])[1].argmax(-1).tolist()) >= {2, 3}
        for index in (2, 3):
            layer.experts[f"expert_{index}"].fc2.bias.add_(1)
        torch.testing.assert_close(layer(hidden), before, rtol=0, atol=0)


@pytest.mark.parity
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 10), (20, 50), (7, 33)])
@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_buckets_equal_the_reference(num_buckets, max_distance, is_bidirectional):
    import torch
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

    relative = np.arange(-3 * max_distance, 3 * max_distance)
    expected = SwitchTransformersAttention._relative_position_bucket(
        torch.tensor(relative), is_bidirectional, num_buckets, max_distance
    )
    buckets = relative_position_buckets(
        jnp.asarray(relative), num_buckets=num_buckets, max_distance=max_distance, is_bidirectional=is_bidirectional
    )
    np.testing.assert_array_equal(buckets, expected)


@pytest.mark.parity
@pytest.mark.parametrize("width", [4, 24, 1024])
def test_sinusoids_equal_the_reference(width):
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSinusoidalPositionalEmbedding

    expected = NllbMoeSinusoidalPositionalEmbedding.get_embedding(1024, width)
    np.testing.assert_allclose(sinusoidal_positions(jnp.arange(1024), width), expected, atol=2e-5)
