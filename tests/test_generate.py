"""Generation against the full forward pass run again for every token, in batches and one at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import generate
from moe_jax.models.decoder import Decoder
from moe_jax.models.decoding import Request, decode, prefill
from moe_jax.models.generate import Generator, bucket
from moe_jax.models.sampling import Sampling
from moe_jax.routing import single_topology
from tests.tiny_model import TINY

LATENT = {"latent_width": 6, "content_width": 4, "rotary_width": 4, "value_width": 3}
STRETCHED = {"short_factors": (1.0,) * 4, "long_factors": (1.0, 2.0, 3.0, 4.0), "original_length": 40}
CONFIGS = {
    "plain": {"layers": ("dense", "dense")},
    "moe": {"rule": "top_p"},
    "sinks, window": {"attention_settings": {"use_sinks": True, "use_bias": True}, "windows": (0, 5, 3)},
    "latent": {"attention": "latent", "attention_settings": LATENT},
    "hash": {"rule": "hash", "rotary": "longrope", "rotary_settings": STRETCHED},
    "context": {"context": 2, "tie_embeddings": True},
    "shared, bias": {"expert": "gpt_oss", "shared_hidden": 5, "read_out_bias": True, "capacity_factor": 0.1},
    "latent experts": {"latent_width": 8, "gates_on_input": True, "expert_hidden_sizes": (6, 3, 1, 5)},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8], [2, 7, 1, 8, 2]]
SAMPLED = {"sampling": Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.01, repetition_penalty=1.3), "seed": 5}
COUNT = 12  # of new tokens
LENGTH = 32  # of every forward pass, at least that of all texts


@functools.cache
def make_model(name):
    return Decoder(dataclasses.replace(TINY, **CONFIGS[name]), key=jax.random.key(1))


@functools.cache
def make_generator(name):
    return Generator(make_model(name))


def greedy_by_rerunning(model, prompt, topology=None):
    """The argmax of the whole model on the text so far, as often as a token is wanted."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for stack in model.stacks:
        stack.feed_forward.capacity = None
    text = list(prompt)
    for _ in range(COUNT):
        padded = jnp.asarray([text + [0] * (LENGTH - len(text))])
        logits = forward(model, padded, jnp.arange(LENGTH)[None] < len(text), topology)
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@jax.jit
def forward(model, tokens, mask, topology):
    return model(tokens, mask, topology, trace="off")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_the_full_forward_pass(name):
    texts = make_generator(name).generate(PROMPTS, max_tokens=COUNT).tokens
    assert texts == [greedy_by_rerunning(make_model(name), prompt) for prompt in PROMPTS]
    assert len(set().union(*texts)) > 3  # a text that repeats itself would show little


@pytest.mark.parametrize("request_", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["moe", "sinks, window"])
def test_a_batch_gives_what_its_prompts_give_alone(name, request_):
    generator = make_generator(name)
    together = generator.generate(PROMPTS, max_tokens=COUNT, **request_).tokens
    alone = [
        generator.generate([prompt], max_tokens=COUNT, sequence_ids=[i], **request_).tokens[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_sampling_depends_on_seed_and_id_alone():
    generator, prompt = make_generator("moe"), PROMPTS[2]
    sample = functools.partial(generator.generate, max_tokens=COUNT, sampling=SAMPLED["sampling"])
    texts = sample([prompt] * 3, seed=1, sequence_ids=[0, 1, 0]).tokens
    assert texts[0] == texts[2] != texts[1]
    assert sample([prompt] * 3, seed=2).tokens[0] != texts[0]


def test_few_experts_branch_and_many_do_not(monkeypatch):
    """Both ways of decoding give the same text; without branches the weights are those of prefill."""
    expected = make_generator("sinks, window").generate(PROMPTS, max_tokens=COUNT).tokens
    monkeypatch.setattr(generate, "SLOTS_PER_EXPERT", 0)
    assert make_generator("sinks, window").generate(PROMPTS, max_tokens=COUNT).tokens == expected
    monkeypatch.setattr(generate, "MOST_BRANCHES", 7)
    generator = Generator(make_model("moe"))
    assert generator._weights_for_few is generator._weights


def test_weights_are_not_copied():
    model = make_model("moe")
    generator = Generator(model)
    whole = model.stacks[1].feed_forward.experts.w_in[...]  # [2, 4, D, 2F]
    layer = generator._weights.blocks[2].feed_forward.experts.w_in[...]
    expert = generator._weights_for_few.blocks[2].feed_forward.experts.experts[3].w_in[...]
    start = whole.unsafe_buffer_pointer()
    assert layer.unsafe_buffer_pointer() == start + layer.nbytes
    assert expert.unsafe_buffer_pointer() == start + layer.nbytes + 3 * expert.nbytes


def test_chunks_are_the_text_as_it_comes():
    generator = make_generator("moe")
    whole = generator.generate(PROMPTS, max_tokens=COUNT, with_routing=True)
    chunks = list(generator.stream(PROMPTS, max_tokens=COUNT, with_routing=True, chunk=4))
    assert [len(chunk.tokens[0]) for chunk in chunks] == [1, 4, 4, 3]
    for i, text in enumerate(whole.tokens):
        assert [token for chunk in chunks for token in chunk.tokens[i]] == text
        parts = np.concatenate([chunk.expert_ids[i] for chunk in chunks], axis=1)
        np.testing.assert_array_equal(parts, whole.expert_ids[i])
    assert whole.prefill_tokens_per_second > 0 and whole.decode_tokens_per_second > 0


def test_routing_is_that_of_the_forward_pass():
    model = make_model("sinks, window")
    made = make_generator("sinks, window").generate(PROMPTS, max_tokens=COUNT, with_routing=True)
    for prompt, text, expert_ids in zip(PROMPTS, made.tokens, made.expert_ids, strict=True):
        _, routed = jax.jit(lambda model, tokens: model(tokens, trace="topk"))(model, jnp.asarray([prompt + text[:-1]]))
        np.testing.assert_array_equal(expert_ids, routed.plan.expert_ids)


def test_a_text_ends_behind_a_stop_token():
    generator = make_generator("moe")
    free = generator.generate(PROMPTS, max_tokens=COUNT).tokens
    stops = {free[0][4], free[1][0]}
    texts = generator.generate(PROMPTS, max_tokens=COUNT, stop_tokens=sorted(stops)).tokens
    for text, longer in zip(texts, free, strict=True):
        ends = [i for i, token in enumerate(longer) if token in stops]
        assert text == (longer[: ends[0] + 1] if ends else longer)
    assert len(texts[1]) == 1
    alone = generator.generate(PROMPTS[1:2], max_tokens=COUNT, stop_tokens=sorted(stops))
    assert alone.tokens == texts[1:2] and alone.decode_tokens_per_second == 0


def test_a_topology_generates():
    model = make_model("moe")
    keep = np.array([[0, 1, 1, 1], [1, 1, 0, 0]], bool)
    topology = single_topology(jnp.asarray(keep), jnp.array([2, 1]))
    made = make_generator("moe").generate(PROMPTS, max_tokens=COUNT, topology=topology, with_routing=True)
    assert made.tokens == [greedy_by_rerunning(model, prompt, topology) for prompt in PROMPTS]
    used = [set(np.concatenate([ids[layer].ravel() for ids in made.expert_ids])) - {4} for layer in range(2)]
    assert used[0] <= {1, 2, 3} and used[1] <= {0, 1}
    groups = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:, :1] * 0 + 1], 1), topology)
    mixed = make_generator("moe").generate(PROMPTS, max_tokens=COUNT, topology=groups, token_groups=[0, 1, 0])
    assert [mixed.tokens[i] for i in (0, 2)] == [made.tokens[i] for i in (0, 2)]


def test_few_programs_compile():
    """Prompts of 1 to 24 tokens, texts up to 64, any sampling numbers and stop tokens: two lengths of prompts."""
    generator = Generator(make_model("plain"), capacity=64)
    before = prefill._cache_size(), decode._cache_size()
    for length, count, settings in [(1, 3, (0.5, 3)), (16, 40, (0.7, 9)), (17, 20, (1.3, 2)), (24, 40, (2, 5))]:
        sampling = Sampling(temperature=settings[0], top_k=settings[1])
        list(generator.stream([[1] * length], max_tokens=count, sampling=sampling, stop_tokens=range(count // 10)))
    assert (prefill._cache_size() - before[0], decode._cache_size() - before[1]) == (2, 1)


def test_buckets():
    assert [bucket(n) for n in (0, 16, 17, 24, 25, 48, 49, 1000)] == [16, 16, 24, 24, 32, 48, 64, 1024]


def test_decoding_copies_neither_weights_nor_cache():
    """What the program needs besides its arguments is less than one expert's matrix; the cache is an alias."""
    model = Decoder(dataclasses.replace(TINY, width=64, expert_hidden=256), key=jax.random.key(0))
    weights = Generator(model)._weights_for_few
    keys = jax.random.split(jax.random.key(0), 1)
    request = Request(jnp.array([16]), jnp.array([-1]), {}, keys, topology=None, token_groups=None)
    progress = prefill(weights, jnp.array([[1, 2]]), jnp.array([2]), request, 16, with_routing=False)
    memory = decode.lower(weights, progress, request, 1).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 256 * 4
    assert memory.alias_size_in_bytes > sum(part.nbytes for part in jax.tree.leaves(progress.cache))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "expert_choice", "allow_noncausal": True}, "'expert_choice' routes a token by later tokens or other"),
        ({"rule": "soft", "allow_noncausal": True}, "'soft' routes a token by later tokens or other sequences"),
        ({"rule": "forced_zipf"}, "'forced_zipf' routes a token by its number in the sequence"),
        ({"router": "recurrent"}, "'recurrent' keeps a state along the sequence"),
        ({"router": "load_aware"}, "'load_aware' keeps a state along the sequence"),
    ],
)
def test_models_that_cannot_generate(fields, message):
    with pytest.raises(ValueError, match=message):
        Generator(Decoder(dataclasses.replace(TINY, **fields), key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty: give at least one token"),
        ([[1, 19]], {}, r"prompt 0 has token 19, outside of the vocabulary \[0, 19\)"),
        ([[1] * 30], {"max_tokens": 3}, "prompt 0 has 30 tokens, which with max_tokens=3 is more than .* capacity=32"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0 and chunk=16 must be at least 1"),
        ([[1]], {"sequence_ids": [1, 2]}, "sequence_ids has 2 values for 1 prompts"),
        ([[1]], {"with_routing": True}, "has no layer that routes"),
    ],
)
def test_requests_that_cannot_be_met(prompts, fields, message):
    generator = Generator(make_model("plain"), capacity=32)
    with pytest.raises(ValueError, match=message):
        next(generator.stream(prompts, **({"max_tokens": 2} | fields)))
