"""The one real pretrained model that a package registry has: SmolLM2-135M-Instruct, from its GGUF file."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model
from moe_jax.data import DataConfig, load_documents, open_tokenizer
from moe_jax.losses import cross_entropy
from moe_jax.models.generate import Generator
from moe_jax.models.upcycle import Upcycling, receipt, upcycle

WINDOW = 256


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """Imported."""
    path = tmp_path_factory.mktemp("models") / "smollm2"
    import_checkpoint(smollm2, path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_tokenizer(folder)


def test_it_answers(model, tokenizer):
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    prompts = [tokenizer.encode(chat, add_special_tokens=False), tokenizer.encode("One, two, three, four,")]
    made = Generator(model).generate(prompts, max_tokens=12, stop_tokens=tokenizer.stop_ids)
    answer, count = (tokenizer.decode(tokens) for tokens in made.tokens)
    assert "Paris" in answer
    assert count.startswith(" five, six, seven")


def test_bits_per_byte_of_english_prose(model, tokenizer):
    """About 1.3 on plain English is known to be right; half-turned rotary positions would give 2 and more."""
    documents = load_documents(DataConfig(domains=("speeches",), domain_weights=(1.0,)))
    text = b"\n\n".join(document.text for document in documents)[:12_000].decode(errors="ignore")
    ids = np.array(tokenizer.encode(text))
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    nats = jax.jit(lambda model, tokens: cross_entropy(model(tokens)[0][:, :-1], tokens[:, 1:]).sum())(model, windows)
    num_bytes = sum(len(tokenizer.decode(window[1:].tolist()).encode()) for window in windows)
    bits = float(nats) / math.log(2) / num_bytes
    print(f"\n{bits:.3f} bits/byte on {num_bytes} bytes of public-domain speeches")
    assert 0.9 < bits < 1.5


@pytest.mark.parity
def test_logits_equal_those_of_transformers(folder, model, tokenizer, tmp_path):
    import torch
    import transformers

    export_checkpoint(folder, tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    text = "It is a truth universally acknowledged, that 1 + 1 = 2; naïve façades cost €5 or more."
    tokens = np.array([tokenizer.encode(text)])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(model, jnp.asarray(tokens))
    # Logits of a real model reach 30: five digits of float32.
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_upcycling_preserves_it(model, tokenizer):
    """Four of the thirty layers; virtual groups of a quarter of the network, and plain copies."""
    tokens = jnp.asarray([tokenizer.encode("The President of the United States shall hold his office for four years.")])
    layers = (5, 12, 19, 26)
    for upcycling in (Upcycling(4, 2, layers=layers), Upcycling(8, 4, granularity=4, layers=layers)):
        moe = upcycle([model], upcycling, key=jax.random.key(0))
        found = receipt(model, moe, tokens)
        print(f"\n{upcycling.granularity} shards: logits differ by {found.logit_difference:.1e}, KL {found.kl:.1e}")
        largest = float(jnp.abs(model(tokens)[0]).max())
        assert found.logit_difference < 1e-5 * largest  # about 30, of which float32 keeps seven digits
