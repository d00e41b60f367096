"""Upcycling: kinds that preserve the function do, the others change what they say and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.structure import named_arrays
from moe_jax.models.upcycle import Upcycling, receipt, upcycle
from moe_jax.training.step import LossConfig, init_state, make_train_step

DENSE = DecoderConfig(
    vocab_size=32,
    width=16,
    layers=("dense",) * 3,
    num_heads=2,
    num_kv_heads=1,
    dense_hidden=24,
    tie_embeddings=True,
    expert_settings={"use_bias": True},
)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, 32)
MASK = jnp.arange(9)[None, :] < jnp.array([9, 6])[:, None]


def dense(seed=0):
    model = Decoder(DENSE, key=jax.random.key(seed))
    for name in ("b_in", "b_out"):  # they start at zero, which would hide a mistake
        bias = getattr(model.stacks[0].feed_forward.experts, name)
        bias[...] = jax.random.normal(jax.random.key(seed + 7), bias.shape)
    return model


PRESERVING = {
    "copy": ({}, 1),
    "copy, one choice": ({"num_choices": 1}, 1),
    "some layers": ({"layers": (0, 2)}, 1),
    "virtual groups": ({"num_experts": 12, "num_choices": 3, "granularity": 3}, 1),
    "virtual groups, two copies": ({"num_experts": 16, "num_choices": 8, "granularity": 4, "router_scale": 1.0}, 1),
    "equal parents": ({"num_experts": 6, "num_choices": 2}, 3),
    "another rule": ({"rule": "sigmoid_top_k"}, 1),
}


@pytest.mark.parametrize("name", PRESERVING)
def test_the_function_is_preserved(name):
    settings, num_parents = PRESERVING[name]
    parent = dense()
    model = upcycle([parent] * num_parents, Upcycling(**settings), key=jax.random.key(1))
    found = receipt(parent, model, TOKENS, MASK)
    assert found.logit_difference < 1e-5 and abs(found.kl) < 1e-6
    kinds = tuple("moe" if i in settings.get("layers", range(3)) else "dense" for i in range(3))
    assert model.config.layers == kinds


def test_virtual_groups_take_whole_copies():
    upcycling = Upcycling(num_experts=12, num_choices=6, granularity=3, router_scale=1.0)
    model = upcycle([dense()], upcycling, key=jax.random.key(1))
    ids = np.sort(model(TOKENS, trace="topk")[1].plan.expert_ids, axis=-1).reshape(-1, 2, 3)
    np.testing.assert_array_equal(ids // 3, np.broadcast_to(ids[..., :1] // 3, ids.shape))
    np.testing.assert_array_equal(ids % 3, np.broadcast_to(np.arange(3), ids.shape))


def test_different_parents_give_their_experts():
    parents = [dense(seed) for seed in range(2)]
    model = upcycle(parents, Upcycling(num_experts=4), key=jax.random.key(1))
    experts = model.stacks[0].feed_forward.experts.w_out[...]
    for expert in range(4):
        expected = parents[expert % 2].stacks[0].feed_forward.experts.w_out[...][:, 0]
        np.testing.assert_array_equal(experts[:, expert], expected)
    mean = (parents[0].embedding[...] + parents[1].embedding[...]) / 2
    np.testing.assert_allclose(model.embedding[...], mean, rtol=1e-6)


def test_noise_and_drop_change_what_they_say():
    parent = dense()
    base = named_arrays(upcycle([parent], Upcycling(), key=jax.random.key(1)))
    noisy = named_arrays(upcycle([parent], Upcycling(noise=0.1), key=jax.random.key(1)))
    dropped = named_arrays(upcycle([parent], Upcycling(drop=0.5), key=jax.random.key(1)))
    path = "stacks/0/feed_forward/experts/"
    for name, array in base.items():
        if name not in (path + "w_in", path + "w_out"):
            np.testing.assert_array_equal(noisy[name], array, err_msg=name)
            np.testing.assert_array_equal(dropped[name], array, err_msg=name)
    w_in, w_out = base[path + "w_in"], base[path + "w_out"]
    assert float(np.std(noisy[path + "w_in"] - w_in)) == pytest.approx(float(0.1 * np.std(w_in)), rel=0.1)
    is_new_in = np.any(dropped[path + "w_in"] != w_in, axis=2)  # [L, E, 2F]
    is_new_out = np.any(dropped[path + "w_out"] != w_out, axis=3)  # [L, E, F]
    np.testing.assert_array_equal(is_new_out.sum(-1), 12)  # half of 24
    np.testing.assert_array_equal(is_new_in, np.concatenate([is_new_out] * 2, axis=-1))
    assert len({row.tobytes() for row in is_new_out.reshape(-1, 24)}) > 4  # experts lose different units
    new = dropped[path + "w_out"][is_new_out]
    assert float(np.std(new)) == pytest.approx(float(np.std(w_out)), rel=0.2)


def test_an_upcycled_model_trains():

    model = upcycle([dense()], Upcycling(noise=0.01), key=jax.random.key(1))
    optimizer = optax.adamw(1e-2)
    graphdef, state = init_state(
        lambda key: upcycle([dense()], Upcycling(noise=0.01), key=key), jax.random.key(1), optimizer
    )
    del model
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig()))
    losses = []
    for _ in range(20):
        state, metrics = step(state, TOKENS, MASK, None)
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Upcycling(num_experts=8, granularity=3), "must be multiples of granularity=3"),
        (lambda: Upcycling(drop=2.0), r"drop=2.0 in \[0, 1\]"),
        (lambda: upcycle([dense()], Upcycling(layers=(3,)), key=jax.random.key(0)), "layer 3 of .* is no dense layer"),
        (
            lambda: upcycle([dense()], Upcycling(num_experts=10, num_choices=5, granularity=5), key=jax.random.key(0)),
            "granularity=5 does not divide dense_hidden=24",
        ),
        (
            lambda: upcycle(
                [dense(), Decoder(dataclasses.replace(DENSE, dense_hidden=8), key=jax.random.key(0))],
                Upcycling(),
                key=jax.random.key(0),
            ),
            "parents have different configs",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
