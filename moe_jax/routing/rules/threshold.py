"""Rules that use every expert that is good enough: more where the router is undecided.

With scores s, probabilities p = softmax(z), experts in falling order and tau the level:

    threshold         s_e > tau, the best one at least
    top_p             the fewest experts with sum p_e >= tau               Huang et al. (2403.07652)
    fixed_threshold   p_e > 0.3, perhaps nobody

All take at most K. A fixed level gives a mean number of experts that drifts as the router learns; with `target` set,
the level follows it (`pi_control`; DTop-p 2512.13996).
"""

import jax.numpy as jnp

from moe_jax.routing.scores import normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.types import Array, Choice, RoutingInputs


def threshold(
    inputs: RoutingInputs, num_choices: int, *, score_function: str = "sigmoid", renormalize: bool = False
) -> Choice:
    """Every expert whose score passes the level; the best one always, at most K.

    Sigmoid scores stand each for itself, so the level means the same for any E. Softmax scores are about 1 / E: start
    lower and divide the controller's gains by E with them.

    Args:
      inputs: the tokens' logits, constraints and level; the bias is added to the scores for the selection.
      num_choices: K, static; the most experts of a token.
      score_function: a key of `scores.SCORES`.
      renormalize: whether the gates of a token are divided by their sum. A lone expert's gate is then 1, and its
        router learns nothing from that token.
    """
    assert inputs.level is not None  # route fills it
    scores = score(score_function, inputs.logits, inputs.is_open)
    selection = biased(scores, inputs)
    ids = select_top_k(selection, num_choices, inputs.is_open, inputs.limit)
    is_used = (gather_chosen(selection, ids) > inputs.level).at[:, 0].set(True)
    probabilities = scores if score_function == "softmax" else normalize(scores)
    return _choice(ids, is_used, scores, probabilities, renormalize)


def top_p(inputs: RoutingInputs, num_choices: int, *, renormalize: bool = False) -> Choice:
    """The fewest best experts whose probabilities sum to the level or more; one at least, at most K.

    Huang et al. fix the level at 0.4, the start here, and keep a router from flattening by a loss on its entropy.
    DTop-p steers it (`target=8`), with K = E and renormalised gates.

    Args:
      inputs: the tokens' logits, constraints and level; the bias moves the order of the experts only.
      num_choices: K, static; the most experts of a token.
      renormalize: whether the gates of a token are divided by their sum, as in DTop-p; see `threshold`.
    """
    assert inputs.level is not None  # route fills it
    probabilities = score("softmax", inputs.logits, inputs.is_open)
    ids = select_top_k(biased(probabilities, inputs), num_choices, inputs.is_open, inputs.limit)
    chosen = gather_chosen(probabilities, ids)
    before = jnp.cumsum(chosen, axis=-1) - chosen
    return _choice(ids, (before < inputs.level).at[:, 0].set(True), probabilities, probabilities, renormalize)


def fixed_threshold(inputs: RoutingInputs, num_choices: int, *, minimum: float = 0.3) -> Choice:
    """Every expert with a softmax gate above 0.3, at most K: a rule as often stated, here to be compared with.

    As stated: gate above 0.3, at most 4 experts, capacity factor 1.25, balance loss of weight 0.01. The last three are
    the layer's `num_choices=4` and `capacity_factor=1.25` and the loss's `balance=0.01`. What is wrong with it:

    * Gates sum to 1, so at most 3 can be above 0.3 (4 * 0.3 > 1). The 4 never binds.
    * Where gates are flat, nobody is chosen and the token passes by the residual alone. Share of tokens without expert,
      and mean number of experts, for a million tokens with logits from N(0, sd^2):

          E      8            16           64
          sd 1   36 %, 0.68   78 %, 0.22   99 %, 0.01
          sd 2    5 %, 1.11   20 %, 0.87   60 %, 0.40

    * A capacity factor is meant relative to a load of T * K / E. With K = 4 that load is at least 3.6 times the real
      one, so 1.25 is a factor of 4.5 or more.

    Args:
      inputs: the tokens' logits and constraints; the bias is added to the gates for the selection.
      num_choices: K, static; the most experts of a token.
      minimum: what a gate must exceed.
    """
    gates = score("softmax", inputs.logits, inputs.is_open)
    selection = biased(gates, inputs)
    ids = select_top_k(selection, num_choices, inputs.is_open, inputs.limit)
    return _choice(ids, gather_chosen(selection, ids) > minimum, gates, gates, renormalize=False)


def _choice(ids: Array, is_used: Array, scores: Array, probabilities: Array, renormalize: bool) -> Choice:
    """The used of the ids `[T, K]`, weighed by their scores."""
    ids = jnp.where(is_used, ids, scores.shape[-1])
    gates = gather_chosen(scores, ids)
    return Choice(ids, normalize(gates) if renormalize else gates, probabilities)
