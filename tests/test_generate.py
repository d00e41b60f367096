"""Generation against the full forward pass run again for every token, in batches and one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.models.decoder import Decoder
from moe_jax.models.generate import Generator
from moe_jax.models.sampling import Sampling
from tests.tiny_model import TINY

LATENT = {"latent_width": 6, "content_width": 4, "rotary_width": 4, "value_width": 3}
CONFIGS = {
    "plain": {"layers": ("dense", "dense")},
    "moe": {},
    "sinks, window": {"attention_settings": {"use_sinks": True, "use_bias": True}, "windows": (0, 5, 3)},
    "latent": {"attention": "latent", "attention_settings": LATENT},
    "hash": {"rule": "hash"},
    "context": {"context": 2, "tie_embeddings": True},
    "shared, bias": {"expert": "gpt_oss", "shared_hidden": 5, "read_out_bias": True},
    "tight": {"capacity_factor": 0.1, "rule": "top_p"},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8], [2, 7, 1, 8, 2]]
SAMPLING = Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.01, repetition_penalty=1.3)


def make_model(**fields):
    return Decoder(dataclasses.replace(TINY, **fields), key=jax.random.key(1))


def greedy_by_rerunning(model, prompt, count):
    model.config = dataclasses.replace(model.config, capacity_factor=None)
    text = list(prompt)
    forward = jax.jit(lambda model, tokens, mask: model(tokens, mask)[0])
    length = len(prompt) + count
    for _ in range(count):
        padded = jnp.asarray([text + [0] * (length - len(text))])
        logits = forward(model, padded, jnp.arange(length)[None] < len(text))
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_the_full_forward_pass(name):
    model = make_model(**CONFIGS[name])
    texts = Generator(model).generate(PROMPTS, max_tokens=12).tokens
    free = make_model(**CONFIGS[name] | {"capacity_factor": None})
    assert texts == [greedy_by_rerunning(free, prompt, 12) for prompt in PROMPTS]
    assert len(set().union(*texts)) > 3


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["moe", "sinks, window"])
def test_a_batch_gives_what_its_prompts_give_alone(name, sampling):
    generator = Generator(make_model(**CONFIGS[name]))
    together = generator.generate(PROMPTS, max_tokens=20, sampling=sampling, seed=5).tokens
    for i, prompt in enumerate(PROMPTS):
        alone = generator.generate([prompt], max_tokens=20, sampling=sampling, seed=5, sequence_ids=[i])
        assert alone.tokens == [together[i]]
