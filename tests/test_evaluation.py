"""Held-out loss per sequence against a direct computation, for any number of sequences."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.data import Sequences
from moe_jax.models.decoder import Decoder
from moe_jax.routing import single_topology
from moe_jax.training.evaluation import bits_per_byte, compare_losses, make_evaluator
from tests.tiny_model import TINY

CONFIG = dataclasses.replace(TINY, vocab_size=20, layers=("moe",))


@pytest.mark.parametrize("topology", [None, single_topology(np.eye(4, dtype=bool)[:1], [1])])
def test_equals_log_probabilities_summed_in_numpy(topology):
    """Seven sequences in batches of four: the fill-up must not show."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (7, 9)).astype(np.uint8)
    mask = np.arange(9)[None, :] < rng.integers(1, 10, (7, 1))
    is_scored = mask[:, 1:] & (np.arange(8) >= 2)[None, :]
    sequences = Sequences(
        tokens, mask, is_scored, np.zeros(7, int), np.zeros(7, int), ("synthetic",), 3 * is_scored.sum(1)
    )
    graphdef, state = nnx.split(Decoder(CONFIG, key=jax.random.key(0)))
    nll, num_bytes = make_evaluator(graphdef, batch_size=4)(state, sequences, topology)
    logits, _ = nnx.merge(graphdef, state)(tokens[:, :-1].astype(np.int32), mask[:, :-1], topology)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for row in range(7):
        counted = [s for s in range(8) if is_scored[row, s]]
        expected = -sum(log_probabilities[row, s, tokens[row, s + 1]] for s in counted)
        np.testing.assert_allclose(nll[row], expected, rtol=1e-4, atol=1e-5)
        assert num_bytes[row] == 3 * len(counted)


def scored(document, domain):
    """Sequences of which only the owners are read."""
    empty = np.zeros((len(document), 3), np.uint8)
    owners = np.asarray(document, np.int32), np.asarray(domain, np.int32)
    return Sequences(empty, empty > 0, empty[:, 1:] > 0, owners[1], owners[0], ("prose", "code"), empty[:, 0])


def test_bits_per_byte_weigh_every_byte_alike():
    """Sums of nats over sequences of unlike length; the interval resamples documents."""
    sequences = scored(document=[0, 0, 1, 2], domain=[0, 0, 0, 1])
    nats, targets = np.log(2) * np.array([4.0, 6.0, 9.0, 1.0]), np.array([2, 3, 3, 1])
    bits = bits_per_byte(sequences, nats, targets)
    np.testing.assert_allclose([bits["all"], bits["prose"], bits["code"]], [20 / 9, 19 / 8, 1.0])
    low, high = bits["interval"]
    assert 1.0 <= low < bits["all"] < high <= 3.0  # the documents' own means are 2, 3 and 1


def test_a_comparison_is_paired_by_document():
    """Ours is better by one bit on every byte, however different the documents are."""
    sequences = scored(document=list(range(8)), domain=[0] * 8)
    targets = np.arange(1, 9)
    theirs = np.log(2) * targets * np.linspace(2, 9, 8)
    compared = compare_losses(sequences, theirs - np.log(2) * targets, theirs, targets)
    np.testing.assert_allclose([compared["difference"], *compared["interval"]], -1.0)
    assert compared["verdict"] == "better" and compared["win_rate"] == 1.0
    assert compared["p_value"] == 2 / 2**8  # of all sign patterns only the two extreme ones reach it
    assert compare_losses(sequences, theirs, theirs, targets)["verdict"] == "tie"
