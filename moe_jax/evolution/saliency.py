"""One-shot expert saliencies of a trained model: what pruning without search goes by, and what orders a budget genome.

Over the tokens X_e routed to expert e, with gate g_e(x) and output f_e(x), of latent experts after the way up:

    frequency   |X_e|
    gate_sum    sum of g_e(x)
    reap        mean of g_e(x) * ||f_e(x)||      (Lasby et al. 2510.13999)
    gate_norm   sum of g_e(x) * ||f_e(x)||
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.evolution.genomes import LayerTopology
from moe_jax.models.decoder import Decoder
from moe_jax.nn.block import Block
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import MoELayer
from moe_jax.types import Array, RoutingPlan

SALIENCIES = ("frequency", "gate_sum", "reap", "gate_norm")


def measure_saliency(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Array, token_mask: Array
) -> dict[str, np.ndarray]:
    """All four saliencies in one pass over some text.

    Args:
      graphdef: structure of a decoder.
      state: its parameters and balance state.
      tokens: `[N, S]` int token ids; enough memory for one layer's hidden states of all of them is needed.
      token_mask: `[N, S]` bool.

    Returns:
      For each name in `SALIENCIES`, `[L, E]` float32, larger is more important. An expert that no token chose has 0;
      zero-compute experts are left out.
    """
    model: Decoder = nnx.merge(graphdef, state)
    x, rows = model.embed(tokens, token_mask), []
    for index, kind in enumerate(model.config.layers):
        block = model.layer(index)
        if kind == "moe":
            rows.append(_layer_sums(block, x, token_mask, tokens))
        x = _run_block(block, x, token_mask, tokens)
    counts, gates, products = (np.stack([np.asarray(row[i]) for row in rows]) for i in range(3))
    return {
        "frequency": counts,
        "gate_sum": gates,
        "reap": products / np.maximum(counts, 1.0),
        "gate_norm": products,
    }


def prune_uniformly(saliency: np.ndarray, total: int, num_choices: int) -> LayerTopology:
    """Keeps the most salient experts of every layer, equally many in each (the first layers get a remainder).

    Args:
      saliency: `[L, E]`.
      total: experts kept over all layers.
      num_choices: experts a token uses in every layer.
    """
    num_layers = len(saliency)
    budgets = total // num_layers + (np.arange(num_layers) < total % num_layers)
    place = np.argsort(np.argsort(-saliency, axis=1, kind="stable"), axis=1)
    return LayerTopology(jnp.asarray(place < budgets[:, None]), jnp.full(num_layers, num_choices, jnp.int32))


@jax.jit
def _run_block(block: Block, x: Array, token_mask: Array, token_ids: Array) -> Array:
    """One block's `[N, S, D]` output; compiled once for each kind of layer, not for each layer."""
    return block(x, token_mask, token_ids=token_ids)[0]


@jax.jit
def _layer_sums(block: Block, x: Array, token_mask: Array, token_ids: Array) -> tuple[Array, Array, Array]:
    """`[E]` counts, gate sums and sums of gate times output norm of one MoE block."""
    assert isinstance(block.feed_forward, MoELayer)  # the caller picks the layers of that kind
    layer = block.feed_forward
    normed = block.feed_forward_norm(block.attend(x, token_mask)[0])
    _, routed = layer(normed, token_mask, token_ids=token_ids)
    assert isinstance(routed.plan, RoutingPlan)  # a layer by itself returns everything
    assert isinstance(layer.experts, ExpertStack)  # a decoder's experts are feed-forward networks
    tokens, plan, expert = normed.reshape(-1, normed.shape[-1]), routed.plan, layer.experts.expert
    rows = tokens if layer.latent is None else layer.latent.enter(tokens)

    def of_expert(one: tuple[Array, dict[str, Array]]) -> tuple[Array, Array, Array]:
        index, params = one
        output = expert.outer(params, expert.inner(params, rows))
        output = output if layer.latent is None else layer.latent.leave(output)
        is_chosen = plan.expert_ids == index  # [T, K]
        gate = jnp.sum(plan.gates * is_chosen, axis=1)
        return is_chosen.sum(dtype=jnp.float32), gate.sum(), jnp.sum(gate * jnp.linalg.norm(output, axis=-1))

    params = layer.experts.parameters(tokens.dtype)
    return jax.lax.map(of_expert, (jnp.arange(layer.experts.num_experts), params))
