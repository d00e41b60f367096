"""Rules that balance the batch as an assignment problem: BASE (2103.16716) and Sinkhorn (S-BASE, 2202.01169).

Both choose by a balanced assignment in training and weigh by the raw logits; at test time BASE's paper, and Megatron's
Sinkhorn, let each token take its best experts. Here both stay balanced unless `greedy_evaluation` says so: a balanced
choice depends on later tokens and on other sequences, so the rules are not causal, and a change of rule between
training and evaluation should be asked for. With it, the key tells the two apart: a training step needs one.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops.assignment import assign_by_auction
from moe_jax.ops.sinkhorn import sinkhorn_potentials
from moe_jax.routing.scores import normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.routing.statistics import count_assignments
from moe_jax.types import Array, Choice, RoutingInputs


def base(
    inputs: RoutingInputs, num_choices: int, *, greedy_evaluation: bool = False, tolerance: float = 1e-3
) -> Choice:
    """BASE: the assignment of the largest summed logits among those that load all experts equally.

        max sum_t z_{t, a(t)}  subject to  |{t: a(t) = e}| = T / E for every e;    gate = sigmoid(z_{t, a(t)})

    Where the number of tokens is no multiple of the open experts, loads differ by one, and the experts that most tokens
    like best have the larger ones. Masked tokens have no part in it. If a topology leaves no balanced assignment, the
    tokens without a seat go to their best open expert. The selection bias is added to the logits; it moves nothing
    while loads are equal.

    Args:
      inputs: the tokens' logits and constraints.
      num_choices: K, which must be 1.
      greedy_evaluation: whether, without a key, each token takes its best expert.
      tolerance: the mean logit of the assignment is within this share of the open logits' range of the optimum.

    Returns:
      A choice without a promised capacity; `capacity_factor=1` drops nothing while no topology closes an expert.
    """
    affinities = biased(inputs.logits, inputs)
    is_open = jnp.ones(affinities.shape, bool) if inputs.is_open is None else inputs.is_open
    ids = select_top_k(affinities, num_choices, is_open, inputs.limit)
    if not (greedy_evaluation and inputs.key is None):
        seats = _equal_seats(ids, is_open)
        assigned = assign_by_auction(affinities, seats, is_open, tolerance=tolerance).expert_ids[:, None]
        ids = jnp.where(assigned < affinities.shape[1], assigned, ids)
    scores = score("sigmoid", inputs.logits, inputs.is_open)
    return Choice(ids, gather_chosen(scores, ids), normalize(scores))


def sinkhorn(
    inputs: RoutingInputs,
    num_choices: int,
    *,
    greedy_evaluation: bool = False,
    score_function: str | None = None,
    num_iterations: int = 100,
    tolerance: float = 1e-4,
) -> Choice:
    """The K largest entries of each token's row in the balanced matrix; gates are scores of the raw logits.

    The matrix `exp(z_te + u_t + v_e)` has equal row sums and equal column sums, so v is a bias that balances this very
    batch; loads are equal in probability mass, not in number. The selection bias is added to the logits, and balancing
    cancels it where it converges.

    Args:
      inputs: the tokens' logits and constraints.
      num_choices: K, static.
      greedy_evaluation: whether, without a key, each token takes its K best experts by the raw logits.
      score_function: a key of `scores.SCORES` for the gates; None means sigmoid for K = 1 and else softmax, as in
        Megatron.
      num_iterations: the most iterations of `ops.sinkhorn`.
      tolerance: relative error of the column sums at which they stop.
    """
    selection = biased(inputs.logits, inputs)
    if not (greedy_evaluation and inputs.key is None):
        v = sinkhorn_potentials(selection, inputs.is_open, num_iterations=num_iterations, tolerance=tolerance)
        selection = selection + v[None, :]
    ids = select_top_k(selection, num_choices, inputs.is_open, inputs.limit)
    name = score_function or ("sigmoid" if num_choices == 1 else "softmax")
    scores = score(name, inputs.logits, inputs.is_open)
    return Choice(ids, gather_chosen(scores, ids), scores if name == "softmax" else normalize(scores))


def _equal_seats(favorites: Array, is_open: Array) -> Array:
    """Seats `[E]` that differ by one at most, the larger where `favorites [T, 1]` point most often."""
    num_experts = is_open.shape[1]
    is_expert = is_open.any(0)
    popularity = jnp.where(is_expert, count_assignments(favorites, num_experts), -1.0)
    _, by_popularity = jax.lax.top_k(popularity, num_experts)
    rank = jnp.zeros(num_experts, jnp.int32).at[by_popularity].set(jnp.arange(num_experts), unique_indices=True)
    num_tokens, num_open = is_open.any(1).sum(), jnp.maximum(is_expert.sum(), 1)
    return jnp.where(is_expert, num_tokens // num_open + (rank < num_tokens % num_open), 0)
