"""GLaM as an architecture: the published sizes, and a tiny one that runs and generates."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.models.cost import model_cost
from moe_jax.models.decoder import Decoder
from moe_jax.models.generate import Generator
from moe_jax.models.glam import glam_config


@pytest.mark.parametrize(
    ("size", "billions"), [("0.1B/64E", 1.9), ("1.7B/64E", 27), ("8B/64E", 143), ("64B/64E", 1200)]
)
def test_sizes_are_those_of_the_paper(size, billions):
    """Table 1 of 2112.06905; the largest is printed as 1.2T."""
    config = glam_config(size, vocab_size=32_000)
    assert model_cost(config, 1).parameters / 1e9 == pytest.approx(billions, rel=0.04)


def test_a_relative_bias_is_no_matmul():
    """12 layers of 32 buckets and 12 heads, beside the same model without."""
    with_bias = model_cost(glam_config("0.1B/64E"), 8)
    without = model_cost(glam_config("0.1B/64E", attention_settings={}), 8)
    assert with_bias.parameters - without.parameters == 12 * 32 * 12
    assert with_bias.flops == without.flops


def test_a_small_one_runs_and_generates(rng):
    small = {"layers": ("dense", "moe"), "turns": (False, False), "width": 16, "dense_hidden": 24, "expert_hidden": 8}
    config = glam_config(
        "0.1B/64E",
        **small,
        vocab_size=19,
        num_heads=2,
        num_kv_heads=2,
        head_width=8,
        num_experts=4,
        capacity_factor=None,
    )
    model = Decoder(config, key=jax.random.key(0))
    assert model.stacks[0].feed_forward.experts.parameters(jnp.float32)["w_in"].shape == (1, 1, 16, 48)  # gated
    assert model.stacks[1].feed_forward.experts.parameters(jnp.float32)["w_in"].shape == (1, 4, 16, 8)
    tokens = rng.integers(0, 19, (1, 6))
    text = tokens[0].tolist()
    for _ in range(5):  # every token anew, without a cache
        logits, _ = model(jnp.asarray([text]))
        text.append(int(logits[0, -1].argmax()))
    assert Generator(model).generate([text[:6]], max_tokens=5).tokens == [text[6:]]


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"unknown size 'large' of GLaM; known: 0\.1B/64E"):
        glam_config("large")
