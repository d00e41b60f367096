"""Synthetic routing with a known truth, for the tests of the analysis."""

import numpy as np


def draw_uniform_ids(rng, num_tokens, num_experts, num_choices):
    """`[T, K]` distinct experts, uniformly."""
    return np.argsort(rng.random((num_tokens, num_experts)), -1)[:, :num_choices]


def make_documents(rng, num_documents=48, length=60, num_experts=6, effect=0.0, document_effect=0.0, byte_effect=0.0):
    """Synthetic routing with chosen causes: domain, document, or byte (bytes differ in frequency between domains)."""
    document = np.repeat(np.arange(num_documents), length)
    domain = document % 3
    token_ids = np.where(rng.random(len(document)) < 0.7, domain, rng.integers(0, 5, len(document)))
    logits = rng.gumbel(size=(1, len(document), num_experts))
    logits += effect * rng.normal(size=(3, num_experts))[domain]
    logits += document_effect * rng.normal(size=(num_documents, num_experts))[document]
    logits += byte_effect * rng.normal(size=(5, num_experts))[token_ids]
    return np.argsort(-logits, -1)[..., :2], domain, document, token_ids
