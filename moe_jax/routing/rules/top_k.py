"""Top-k in the forms that public models are trained with.

With scores s over the open experts and S the K chosen ones:

    top_k                 g_e = c * s_e               OLMoE (2409.02060), Switch at K = 1 (2101.03961, eq. 2)
    top_k, renormalize    g_e = c * s_e / sum_{S} s   Qwen3-MoE (softmax), DeepSeek-V3 (sigmoid; 2412.19437, eq. 13)
    top_k_softmax         g   = softmax(z_S)          Shazeer (1701.06538, eq. 3), Mixtral (2401.04088)

With softmax scores the second and third are equal in exact arithmetic; both orders are kept since checkpoints are
trained with one of them and differ in rounding. A bias, if given, moves the selection only, never the gates
(2408.15664, eq. 3).
"""

from moe_jax.routing.scores import normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k, softmax_of_chosen
from moe_jax.types import Choice, RoutingInputs


def top_k(
    inputs: RoutingInputs,
    num_choices: int,
    *,
    score_function: str = "softmax",
    by_logits: bool = False,
    renormalize: bool = False,
    least_sum: float = 0.0,
    scale: float = 1.0,
) -> Choice:
    """Scores, then the K best, weighed by their scores.

    Args:
      inputs: the tokens' logits and constraints; the bias is added to the scores for the selection.
      num_choices: K, static.
      score_function: a key of `scores.SCORES`.
      by_logits: whether the K best are those of the largest logits, which differ where a sigmoid is 1 in float32
        already (Llama 4). The bias is then added to the logits.
      renormalize: whether the gates of a token are divided by their sum.
      least_sum: what they are divided by where their sum is smaller (ERNIE 4.5), as it may be under a bias.
      scale: c, a factor on the gates (DeepSeek's routed scaling factor).
    """
    scores = score(score_function, inputs.logits, inputs.is_open)
    compared = inputs.logits if by_logits else scores
    ids = select_top_k(biased(compared, inputs), num_choices, inputs.is_open, inputs.limit)
    gates = gather_chosen(scores, ids)
    gates = scale * (normalize(gates, least_sum) if renormalize else gates)
    return Choice(ids, gates, scores if score_function == "softmax" else normalize(scores), scores=compared)


def top_k_softmax(inputs: RoutingInputs, num_choices: int) -> Choice:
    """The K largest logits, then softmax over them alone.

    The bias is added to the probabilities, here as in `top_k`, so that it means the same under both.
    """
    probabilities = score("softmax", inputs.logits, inputs.is_open)
    selection = inputs.logits if inputs.bias is None else biased(probabilities, inputs)
    ids = select_top_k(selection, num_choices, inputs.is_open, inputs.limit)
    return Choice(ids, softmax_of_chosen(inputs.logits, ids), probabilities, scores=probabilities)
