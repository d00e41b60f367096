"""Soft MoE against loops, its promises, the published parameter counts, and its refusal in a language model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.analysis import audit_causality, trace_routing
from moe_jax.evolution.genomes import mask_genome
from moe_jax.evolution.population import PopulationEvaluator
from moe_jax.models.cost import Part, model_cost
from moe_jax.models.decoder import Decoder
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.soft_moe import SoftMoELayer, SoftRouter
from moe_jax.routing import full_topology, get_balancer
from moe_jax.routing.soft import route_soft
from moe_jax.training.step import LossConfig, init_state, make_train_step
from moe_jax.trees import count_parameters
from moe_jax.types import RoutingPlan, Topology
from tests.oracles.soft import soft_outputs, soft_plan, soft_stats
from tests.tiny_model import TINY

B, S, D, F, E, C = 3, 4, 5, 6, 3, 2
T = B * S
MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)  # nothing of the second sequence
SOFT = dataclasses.replace(
    TINY, layers=("dense", "moe", "moe"), rule="soft", rule_settings={"slots_per_expert": 2}, allow_noncausal=True
)


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(T, E, C)).astype(np.float32) * 2


def random_inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)


def constraints(seed=1):
    """Two groups of tokens, the first without expert 1, and the mask."""
    keep = jnp.array([[True, False, True], [True, True, True]])
    groups = jnp.asarray(np.random.default_rng(seed).integers(0, 2, T), jnp.int32)
    return {
        "topology": Topology(keep, jnp.array([1, 1], jnp.int32)),
        "token_groups": groups,
        "token_mask": jnp.asarray(MASK.reshape(T)),
    }


def open_to(given):
    """`[T, E]` of the constraints."""
    return np.asarray(given["topology"].keep)[np.asarray(given["token_groups"])] & MASK.reshape(T, 1)


def make_layer(seed=0, num_experts=E, **settings):
    router_key, experts_key = jax.random.split(jax.random.key(seed))
    router = SoftRouter(D, num_experts, **({"slots_per_expert": C} | settings), key=router_key)
    return SoftMoELayer(router, ExpertStack(num_experts, D, F, key=experts_key))


@jax.jit
def run(layer, x, mask=None, topology=None, groups=None):
    return layer(x, mask, topology, groups)


def swiglu(w_in, w_out):
    def expert(row):
        gate, up = np.split(row @ w_in, 2)
        return (gate / (1 + np.exp(-gate)) * up) @ w_out

    return expert


def test_two_tokens_and_two_slots_by_hand():
    """Logits log (1, 2) of token 0 and log (3, 2) of token 1, on two experts of one slot."""
    plan = route_soft(jnp.log(jnp.array([[[1.0], [2.0]], [[3.0], [2.0]]]))).plan
    np.testing.assert_allclose(plan.dispatch[..., 0], [[1 / 4, 1 / 2], [3 / 4, 1 / 2]], rtol=1e-6)
    np.testing.assert_allclose(plan.combine[..., 0], [[1 / 3, 2 / 3], [3 / 5, 2 / 5]], rtol=1e-6)


@pytest.mark.parametrize("num_sequences", [1, B])
@pytest.mark.parametrize("constrained", [False, True])
def test_plan_and_statistics_equal_the_loops(constrained, num_sequences):
    given = constraints() if constrained else {}
    is_open = open_to(given) if constrained else np.ones((T, E), bool)
    routed = jax.jit(functools.partial(route_soft, num_sequences=num_sequences))(random_logits(), **given)
    logits = np.float64(random_logits())
    dispatch, combine = soft_plan(logits, is_open, num_sequences)
    np.testing.assert_allclose(routed.plan.dispatch, dispatch, atol=1e-6)
    np.testing.assert_allclose(routed.plan.combine, combine, atol=1e-6)
    for name, value in soft_stats(logits, is_open, dispatch, combine).items():
        np.testing.assert_allclose(getattr(routed.stats, name), value, rtol=1e-5, atol=1e-5, err_msg=name)
    masked = 5.0 if constrained else 0.0
    assert (routed.stats.num_tokens, routed.stats.num_masked) == (T - masked, masked)
    np.testing.assert_allclose(routed.logits, np.log(np.exp(logits).sum(2)), rtol=1e-5, atol=1e-6)


def test_weights_sum_to_one_and_every_expert_does_its_slots():
    given = constraints()
    routed = route_soft(random_logits(), num_sequences=B, **given)
    is_open = open_to(given)
    is_read = is_open.reshape(B, S, E).any(1)  # [B, E]
    slots = np.asarray(routed.plan.dispatch).reshape(B, S, E, C).sum(1)
    np.testing.assert_allclose(slots, np.broadcast_to(is_read[..., None], slots.shape), atol=1e-6)
    np.testing.assert_allclose(routed.plan.combine.sum((1, 2)), is_open.any(1), atol=1e-6)
    np.testing.assert_allclose(routed.stats.kept, C * is_read.sum(0), rtol=1e-6)
    assert (np.asarray(routed.plan.dispatch)[~is_open] == 0).all()
    assert (np.asarray(routed.plan.combine)[~is_open] == 0).all()


@pytest.mark.parametrize("groups", [B, T])
def test_statistics_of_groups_add_up_to_the_whole(groups):
    run = functools.partial(route_soft, random_logits(), num_sequences=B, **constraints())
    whole, parts = run().stats, run(stats_groups=groups).stats
    assert parts.chosen.shape == (groups, E) and parts.z_sum.shape == (groups,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-5, atol=1e-5), parts, whole)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_equals_the_loops(normalize, mask):
    layer, x = make_layer(normalize=normalize), random_inputs()
    if normalize:
        layer.router.scale[...] = jnp.float32(3)
    output, routed = run(layer, x, mask)
    phi, tokens = np.asarray(layer.router.phi[...], np.float64), np.float64(x).reshape(T, D)
    logits = np.zeros((T, E, C))
    for t, e, c in np.ndindex(T, E, C):
        slot = phi[:, e * C + c]
        logits[t, e, c] = tokens[t] @ slot
        if normalize:
            logits[t, e, c] *= 3 / (math.sqrt(tokens[t] @ tokens[t]) * math.sqrt(slot @ slot))
    is_token = np.ones(T, bool) if mask is None else mask.reshape(T)
    dispatch, combine = soft_plan(logits, np.repeat(is_token[:, None], E, 1), B)
    np.testing.assert_allclose(routed.plan.combine, combine, atol=1e-5)
    weights = (np.asarray(w[...], np.float64) for w in (layer.experts.w_in, layer.experts.w_out))
    experts = [swiglu(*pair) for pair in zip(*weights, strict=True)]
    expected = soft_outputs(tokens * is_token[:, None], dispatch, combine, B, experts)
    np.testing.assert_allclose(output.reshape(T, D), expected, rtol=1e-4, atol=1e-5)


def test_the_layer_sums_statistics_where_it_is_told():
    layer, x = make_layer(), random_inputs()
    by_sequence = SoftMoELayer(layer.router, layer.experts, stats_level="sequence")
    stats = run(by_sequence, x)[1].stats
    np.testing.assert_allclose(stats.chosen, np.full((B, E), C), rtol=1e-6)
    np.testing.assert_allclose(stats.prob_sums.sum(0), run(layer, x)[1].stats.prob_sums, rtol=1e-5)


def test_masked_tokens_are_inert_even_if_they_are_nan():
    layer, x = make_layer(), random_inputs()
    garbage = np.where(MASK[..., None], x, np.nan)
    (first, routed), (second, other) = run(layer, x, MASK), run(layer, garbage, MASK)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, routed.stats, other.stats)
    assert (np.asarray(first)[~MASK] == 0).all()


def test_order_of_tokens_and_of_experts_does_not_matter():
    layer, other, x = make_layer(), make_layer(), random_inputs()
    output, _ = run(layer, x)
    tokens, experts = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    np.testing.assert_allclose(run(layer, x[:, tokens])[0], output[:, tokens], rtol=1e-4, atol=1e-6)
    other.router.phi[...] = layer.router.phi[...].reshape(D, E, C)[:, experts].reshape(D, E * C)
    for name in ("w_in", "w_out"):
        getattr(other.experts, name)[...] = getattr(layer.experts, name)[...][experts]
    np.testing.assert_allclose(run(other, x)[0], output, rtol=1e-4, atol=1e-6)


def test_a_closed_expert_is_as_if_it_were_not_there():
    layer, smaller, x = make_layer(), make_layer(num_experts=E - 1), random_inputs()
    smaller.router.phi[...] = layer.router.phi[...][:, : (E - 1) * C]
    for name in ("w_in", "w_out"):
        getattr(smaller.experts, name)[...] = getattr(layer.experts, name)[...][: E - 1]
    two = Topology(jnp.array([[True] * E, [True] * (E - 1) + [False]]), jnp.array([1, 1], jnp.int32))
    groups = jnp.broadcast_to(jnp.array([[1], [0], [1]]), (B, S))  # the second sequence sees all experts
    output = run(layer, x, None, two, groups)[0]
    np.testing.assert_allclose(output[::2], run(smaller, x)[0][::2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output[1], run(layer, x)[0][1], rtol=1e-5, atol=1e-6)
    everything = jax.tree.map(lambda leaf: leaf[0], full_topology(1, E, 1))
    np.testing.assert_array_equal(run(layer, x, None, everything)[0], run(layer, x)[0])


def test_gradients_equal_finite_differences_and_are_finite_at_zero():
    graphdef, state = nnx.split(make_layer())
    weights = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)

    @jax.jit
    def value(state, x):
        output, routed = nnx.merge(graphdef, state)(x, jnp.asarray(MASK))
        return jnp.sum(weights * output) + routed.stats.z_sum + routed.stats.entropy_sum

    slope_at = jax.jit(jax.grad(value, argnums=(0, 1)))
    point, rng = (state, jnp.asarray(random_inputs())), np.random.default_rng(4)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), point)
    ahead, behind = (value(*jax.tree.map(lambda p, d, s=sign: p + s * 1e-2 * d, point, direction)) for sign in (1, -1))
    slope = optax.tree.vdot(slope_at(*point), direction)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-2, rtol=1e-2, atol=1e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope_at(state, jnp.zeros((B, S, D)))))


def test_a_population_is_a_vmap_over_layers():
    layers = [make_layer(seed) for seed in range(3)]
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    together = jax.vmap(lambda layer: run(layer, random_inputs())[0])(population)
    np.testing.assert_allclose(together[1], run(layers[1], random_inputs())[0], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_mixed_in_float32():
    x = jnp.asarray(random_inputs(), jnp.bfloat16)
    (low, routed), (high, exact) = run(make_layer(), x), run(make_layer(), x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16 and routed.plan.dispatch.dtype == jnp.float32
    np.testing.assert_array_equal(routed.plan.combine, exact.plan.combine)
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.03)


def test_length_does_not_move_the_logits_and_the_scale_does():
    router, x = make_layer().router, jnp.asarray(random_inputs())
    np.testing.assert_allclose(router(7 * x), router(x), rtol=1e-5, atol=1e-6)
    assert jnp.abs(router(x)).max() <= 1
    router.scale[...] *= 5
    np.testing.assert_allclose(router(x), 5 * make_layer().router(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "layers", "dense", "published"), [(768, 6, 108e6, "3.7"), (1024, 12, 333e6, "13.1")], ids=["B/16", "L/16"]
)
def test_published_parameter_counts(width, layers, dense, published):
    """Table 3, in billions: from the table's count of the ViT, with 128 experts of one slot for half of its MLPs."""
    mlp = 2 * width * 4 * width + 4 * width + width  # two matrices and their biases
    router = jax.eval_shape(lambda: SoftRouter(width, 128, key=jax.random.key(0)))
    assert count_parameters(nnx.state(router, nnx.Param)) == 128 * width + 1
    total = dense + layers * (127 * mlp + 128 * width + 1)
    assert f"{total / 1e9:.1f}" == published


@pytest.mark.parametrize(("num_sequences", "is_independent"), [(B, True), (1, False)])
def test_every_token_sees_the_future_and_other_sequences_only_if_asked(num_sequences, is_independent):
    def weights(name, logits):
        plan = route_soft(logits.reshape(T, E, C), num_sequences=num_sequences).plan
        return getattr(plan, name).reshape(B, S, E, C)

    given = [random_logits(seed).reshape(B, S, E, C) for seed in range(2)]
    dispatch, combine = (audit_causality(functools.partial(weights, name), *given) for name in ("dispatch", "combine"))
    assert not dispatch.is_causal and dispatch.is_independent == is_independent
    assert combine.is_causal and combine.is_independent  # a token's shares of the slots are its own


def test_the_layer_is_not_causal():
    audit = audit_causality(lambda x: run(make_layer(), x)[0], random_inputs(), random_inputs(1))
    assert audit.future.share > 0.9 and audit.is_independent


def test_a_language_model_refuses_it_unless_told():
    with pytest.raises(ValueError, match="rule='soft' lets a token's routing depend on later tokens"):
        dataclasses.replace(SOFT, allow_noncausal=False)
    with pytest.raises(ValueError, match="rule 'soft' has no setting 'slots'; it has: normalize, slots_per_expert"):
        dataclasses.replace(SOFT, rule_settings={"slots": 2})
    with pytest.raises(ValueError, match="leave router='mlp'"):
        dataclasses.replace(SOFT, router="mlp")
    with pytest.raises(ValueError, match=r"capacity_factor=1.25 and bias_bins=0 at their defaults"):
        dataclasses.replace(SOFT, capacity_factor=1.25)
    with pytest.raises(ValueError, match="slots_per_expert=0 must be at least 1"):
        dataclasses.replace(SOFT, rule_settings={"slots_per_expert": 0})


def test_a_model_with_it_trains_and_traces():
    optimizer = optax.adam(3e-2)
    graphdef, state = init_state(lambda key: Decoder(SOFT, key=key), jax.random.key(0), optimizer)
    tokens = np.random.default_rng(0).integers(0, SOFT.vocab_size, (3, 7)).astype(np.int32)
    mask = np.arange(7)[None, :] < np.array([[7], [4], [7]])
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig(balancer="sign")))
    losses = []
    for _ in range(10):
        state, metrics = step(state, tokens, mask)
        losses.append(float(metrics["cross_entropy"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(metrics["load"], np.full((2, 4), 1 / 4), rtol=1e-5)
    np.testing.assert_allclose(metrics["balance_loss"], [1, 1], rtol=1e-5)
    assert (metrics["dropped"] == 0).all()


def test_tools_that_need_choices_refuse_it():
    model = Decoder(SOFT, key=jax.random.key(0))
    tokens = jnp.zeros((2, 5), jnp.int32)
    _, routed = jax.jit(lambda model: model(tokens, trace="full"))(model)
    assert routed.plan.dispatch.shape == (2, 10, 4, 2) and routed.logits.shape == (2, 10, 4)
    model.update_balance(routed.stats, get_balancer("sign", rate=0.1))
    ids = np.zeros(10, np.int32)
    with pytest.raises(ValueError, match="plan and logits"):
        trace_routing(
            routed, token_ids=ids, token_mask=ids, position=ids, domain=ids, document=ids, domain_names=("x",)
        )
    plan = RoutingPlan(jnp.zeros((2, 10, 1), jnp.int32), jnp.ones((2, 10, 1)), 4, None)
    with pytest.raises(ValueError, match="no plan can be forced"):
        jax.eval_shape(lambda: model(tokens, forced=plan))
    with pytest.raises(ValueError, match="makes no choices"):
        PopulationEvaluator(nnx.graphdef(model), SOFT, mask_genome(2, 4, 6, 2, 2), 2)


def test_cost_by_hand():
    with pytest.raises(ValueError, match="give mean_choices"):
        model_cost(SOFT, 16)
    # 4 experts of 2 slots on 16 tokens: half a row for each token. phi is 16 x 8, and mixing costs that twice more.
    _, moe, _ = model_cost(SOFT, 16, [0.5, 0.5]).layers
    assert moe.router == Part(16 * 8 + 1, 3 * 2 * 16 * 8)
    assert moe.flops_by_part["experts"] == 0.5 * 2 * 3 * 16 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_sequences": 5}, "num_sequences=5 does not divide the 12 tokens"),
        ({"stats_groups": 7}, "stats_groups=7 does not divide"),
        ({"token_mask": jnp.ones(3, bool)}, r"token_mask must be \[12\]"),
        ({"token_groups": jnp.zeros(3, int)}, r"token_groups must be \[12\]"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        route_soft(random_logits(), **arguments)
