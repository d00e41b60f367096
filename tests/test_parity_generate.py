"""Imported models generate what `transformers` generates, and have its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.model_folder import import_checkpoint, load_model
from moe_jax.models.generate import Generator
from moe_jax.models.structure import named_arrays

from .hub_models import CASES, VOCAB, tiny_model

NUM_TOKENS = 64
# Random models with tied embeddings repeat one token for ever, which shows nothing.
FIRST_TWO = [
    (family, case)
    for family, (_, _, cases) in CASES.items()
    for case in [case for case, changes in cases.items() if not changes.get("tie_word_embeddings")][:2]
]


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), FIRST_TWO, ids=lambda value: value)
def test_greedy_text_is_the_same(family, case, tmp_path):
    """Two prompts of different lengths at once here, one after the other there."""
    import torch

    model = tiny_model(family, case)
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (9, 5)]
    expected = []
    for prompt in prompts:
        settings = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(torch.tensor([prompt]), **settings)
        expected.append(text[0, len(prompt) :].tolist())
    made = Generator(load_model(tmp_path / "ours")).generate(prompts, max_tokens=NUM_TOKENS)
    assert made.tokens == expected
    assert len({*expected[0]}) > 1  # a text of one token would show nothing


@pytest.mark.parity
def test_gradients_of_mixtral(tmp_path):
    import torch

    model = tiny_model("mixtral", "plain")
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    tokens = np.random.default_rng(2).integers(3, VOCAB, (2, 9))
    weights = np.random.default_rng(3).normal(size=(2, 9, VOCAB)).astype(np.float32)
    (model(torch.tensor(tokens)).logits * torch.tensor(weights)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    def loss(ours):
        return jnp.sum(ours(jnp.asarray(tokens))[0] * weights)

    gradient = jax.jit(jax.grad(loss, allow_int=True))(load_model(tmp_path / "ours"))
    ours = {name: np.asarray(value) for name, value in named_arrays(gradient).items()}
    heads = ours["stacks/0/attention/qkv"]  # [L, D, H, Dh]
    for layer in range(3):
        expected = {
            "self_attn.q_proj.weight": heads[layer, :, :4].reshape(32, -1).T,
            "self_attn.k_proj.weight": heads[layer, :, 4:6].reshape(32, -1).T,
            "self_attn.v_proj.weight": heads[layer, :, 6:].reshape(32, -1).T,
            "self_attn.o_proj.weight": ours["stacks/0/attention/out"][layer].reshape(-1, 32).T,
            "mlp.gate.weight": ours["stacks/0/feed_forward/router/kernel"][layer].T,
            "mlp.experts.gate_up_proj": ours["stacks/0/feed_forward/experts/w_in"][layer].swapaxes(1, 2),
            "mlp.experts.down_proj": ours["stacks/0/feed_forward/experts/w_out"][layer].swapaxes(1, 2),
            "input_layernorm.weight": ours["stacks/0/attention_norm/scale"][layer],
            "post_attention_layernorm.weight": ours["stacks/0/feed_forward_norm/scale"][layer],
        }
        for name, mine in expected.items():
            reference = theirs[f"model.layers.{layer}.{name}"]
            np.testing.assert_allclose(mine, reference, atol=2e-5 * np.abs(reference).max(), err_msg=f"{layer} {name}")
    for name, mine in (("model.embed_tokens.weight", ours["embedding"][0]), ("lm_head.weight", ours["read_out"].T)):
        np.testing.assert_allclose(mine, theirs[name], atol=2e-5 * np.abs(theirs[name]).max(), err_msg=name)
