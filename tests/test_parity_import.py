"""Imported checkpoints against `transformers`: logits, router logits, chosen experts, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.families import FAMILIES
from moe_jax.checkpoints.hub.tensor_files import Checkpoint
from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model

from .hub_models import ALL, CASES, VOCAB, tiny_model

LENGTHS = (11, 7)


def test_every_family_has_cases():
    assert set(CASES) == set(FAMILIES)


def some_tokens():
    tokens = np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return np.where(mask, tokens, 0), mask


def their_logits(model, tokens, mask):
    """Logits `[B, S, V]`, and what each router gave: `[B, S, E]` logits, one for each MoE layer."""
    import torch

    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router")) and "experts" not in name
    ]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()
    for hook in hooks:
        hook.remove()
    outputs = [output[0] if isinstance(output, tuple) else output for output in seen]
    return logits, [output.float().reshape(*tokens.shape, -1).numpy() for output in outputs]


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), ALL, ids=lambda value: value)
def test_import_equals_transformers_and_goes_back(family, case, tmp_path):
    import transformers

    model = tiny_model(family, case)
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    tokens, mask = some_tokens()
    expected, routers = their_logits(model, tokens, mask)
    ours = load_model(tmp_path / "ours")
    logits, routed = jax.jit(lambda model, *args: model(*args, trace="full"))(
        ours, jnp.asarray(tokens), jnp.asarray(mask)
    )
    np.testing.assert_allclose(logits[mask], expected[mask], atol=2e-5)
    assert len(routers) == ours.config.num_moe_layers
    if routers:
        theirs = np.stack(routers)[:, mask]
        np.testing.assert_allclose(routed.logits[:, mask.ravel()], theirs, atol=2e-5)

    export_checkpoint(tmp_path / "ours", tmp_path / "again", shard_bytes=20_000)
    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "again", attn_implementation="eager")
    if routers:
        again.set_experts_implementation("eager")
    np.testing.assert_array_equal(their_logits(again.eval(), tokens, mask)[0], expected)
    before, after = Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "again")
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
