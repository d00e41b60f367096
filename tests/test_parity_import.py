"""Imported checkpoints against `transformers`: logits, router logits, chosen experts, and the way back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.families import FAMILIES
from moe_jax.checkpoints.hub.tensor_files import Checkpoint
from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model, save_model
from moe_jax.models.config import DecoderConfig

from .hub_models import ALL, CASES, VOCAB, tiny_model

LENGTHS = (11, 7)


def test_every_family_has_cases():
    decoders = {name for name, family in FAMILIES.items() if family.kind is DecoderConfig}
    assert {*CASES, "llama4"} == decoders  # which has a test of its own below


def some_tokens():
    tokens = np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return np.where(mask, tokens, 0), mask


def their_logits(model, tokens, mask):
    """Logits `[B, S, V]`, and for each MoE layer its routers' logits `[B, S, E]`, experts and gates `[B, S, K]`."""
    import torch

    routers, chosen, hooks = [], [], []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and "experts" not in name:
            hooks.append(module.register_forward_hook(lambda module, args, output: routers.append(output)))
        elif name.endswith(".experts"):  # called with tokens, experts, gates
            hooks.append(module.register_forward_pre_hook(lambda module, args: chosen.append(args[1:])))
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()
    for hook in hooks:
        hook.remove()

    def of_tokens(outputs):
        return [output.reshape(*tokens.shape, -1).numpy() for output in outputs]

    if chosen and not chosen[0]:  # Llama 4's routers weigh all experts, most by 0, and its experts take weighed tokens
        chosen = [gates.topk(model.config.num_experts_per_tok)[::-1] for gates, _ in routers]
        routers = [logits for _, logits in routers]
    routers = of_tokens([output[0] if isinstance(output, tuple) else output for output in routers])
    return logits, routers, of_tokens([ids for ids, _ in chosen]), of_tokens([gates for _, gates in chosen])


def in_order_of_experts(ids, gates):
    """Both `[L, T, K]`, a token's experts in ascending order."""
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(np.asarray(ids), order, -1), np.take_along_axis(np.asarray(gates), order, -1)


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), ALL, ids=lambda value: value)
def test_import_equals_transformers_and_goes_back(family, case, tmp_path):
    model = tiny_model(family, case)
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    tokens, mask = some_tokens()
    expected, routers, chosen, gates = their_logits(model, tokens, mask)
    ours = load_model(tmp_path / "ours")
    logits, routed = jax.jit(lambda model, *args: model(*args, trace="full"))(
        ours, jnp.asarray(tokens), jnp.asarray(mask)
    )
    np.testing.assert_allclose(logits[mask], expected[mask], atol=2e-5)
    assert len(routers) == len(chosen) == ours.config.num_moe_layers
    if routers:
        np.testing.assert_allclose(routed.logits[:, mask.ravel()], np.stack(routers)[:, mask], atol=2e-5)
        plan = (array[:, mask.ravel()] for array in (routed.plan.expert_ids, routed.plan.gates))
        our_ids, our_gates = in_order_of_experts(*plan)
        their_ids, their_gates = in_order_of_experts(np.stack(chosen)[:, mask], np.stack(gates)[:, mask])
        np.testing.assert_array_equal(our_ids, their_ids)
        np.testing.assert_allclose(our_gates, their_gates, atol=2e-5)

    export_checkpoint(tmp_path / "ours", tmp_path / "again", shard_bytes=20_000)
    save_model(ours, tmp_path / "own")  # forgets where it came from, so its config is written anew
    export_checkpoint(tmp_path / "own", tmp_path / "written", family=family)
    for folder in (tmp_path / "again", tmp_path / "written"):
        again = type(model).from_pretrained(folder, attn_implementation="eager")
        if routers:
            again.set_experts_implementation("eager")
        again = copy.deepcopy(again.eval())  # torch rounds otherwise where a file's tensors are not aligned
        np.testing.assert_array_equal(their_logits(again, tokens, mask)[0], expected)
        before, after = Checkpoint(tmp_path / "theirs"), Checkpoint(folder)
        assert set(before.names()) == set(after.names())
        for name in before.names():
            np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), ALL, ids=lambda value: value)
def test_config_is_written_as_it_is_read(family, case, tmp_path):
    from moe_jax.checkpoints.hub.hub_config import HubConfig

    tiny_model(family, case).config.save_pretrained(tmp_path)
    config = FAMILIES[family].read(HubConfig.load(tmp_path / "config.json"))
    assert FAMILIES[family].refuses(config) == ""
