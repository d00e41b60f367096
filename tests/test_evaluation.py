"""Held-out loss per sequence against a direct computation, for any number of sequences."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.data import Sequences
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.routing import single_topology
from moe_jax.training.evaluation import make_evaluator

CONFIG = DecoderConfig(
    vocab_size=20,
    width=16,
    layers=("moe",),
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    expert_hidden=8,
    backend="gather",
)


@pytest.mark.parametrize("topology", [None, single_topology(np.eye(4, dtype=bool)[:1], [1])])
def test_equals_log_probabilities_summed_in_numpy(topology):
    """Seven sequences in batches of four: the fill-up must not show."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (7, 9)).astype(np.uint8)
    mask = np.arange(9)[None, :] < rng.integers(1, 10, (7, 1))
    is_scored = mask[:, 1:] & (np.arange(8) >= 2)[None, :]
    sequences = Sequences(tokens, mask, is_scored, np.zeros(7, int), np.zeros(7, int), ("synthetic",))
    graphdef, state = nnx.split(Decoder(CONFIG, key=jax.random.key(0)))
    nll, targets = make_evaluator(graphdef, batch_size=4)(state, sequences, topology)
    logits, _ = nnx.merge(graphdef, state)(tokens[:, :-1].astype(np.int32), mask[:, :-1], topology)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for row in range(7):
        counted = [s for s in range(8) if is_scored[row, s]]
        expected = -sum(log_probabilities[row, s, tokens[row, s + 1]] for s in counted)
        np.testing.assert_allclose(nll[row], expected, rtol=1e-4, atol=1e-5)
        assert targets[row] == len(counted)
