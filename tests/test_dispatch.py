"""Every dispatch backend against a loop over assignments: outputs, gradients, vmap, and what must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.dispatch import BACKENDS, get_backend
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.grouped import dispatch_grouped
from moe_jax.ops.expert_order import expert_order, rank_in_expert
from moe_jax.ops.grouped_matmul.blocked import block_ladder
from moe_jax.types import Expert, RoutingPlan
from tests.dispatch_oracle import dispatch_loop

WIDTH, HIDDEN = 5, 3


def swiglu_inner(params, rows):
    return rows @ params["gate_up"]


def swiglu_outer(params, hidden):
    gate, up = jnp.split(hidden, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ params["down"]


def swiglu_grouped(params, rows, matmul, spread):
    gate, up = jnp.split(matmul(rows, params["gate_up"]), 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, params["down"])


def biased_network(params, rows):
    return jnp.tanh(rows @ params["in"] + params["bias"][None]) @ params["out"]


def biased_grouped(params, rows, matmul, spread):
    return matmul(jnp.tanh(matmul(rows, params["in"]) + spread(params["bias"])), params["out"])


SWIGLU = Expert(swiglu_inner, swiglu_outer, swiglu_grouped)
WHOLE = Expert(biased_network, lambda params, rows: rows, biased_grouped)
# Short blocks, so that small cases meet several rungs of the ladder and blocks that reach into the next expert.
SHORT_BLOCKS = functools.partial(dispatch_blocked, block_lengths=(4, 2))
PADDED_BLOCKS = functools.partial(dispatch_grouped, impl="einsum")
DISPATCHERS = {**BACKENDS, "blocked, short blocks": SHORT_BLOCKS, "grouped, einsum": PADDED_BLOCKS}
every_backend = pytest.mark.parametrize("dispatch", DISPATCHERS.values(), ids=DISPATCHERS.keys())


def swiglu_params(rng, num_experts):
    return {
        "gate_up": jnp.asarray(rng.normal(size=(num_experts, WIDTH, 2 * HIDDEN)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(num_experts, HIDDEN, WIDTH)), jnp.float32),
    }


def make_plan(ids, gates, num_experts, capacity=None):
    ids = np.asarray(ids, np.int32)
    gates = np.where(ids < num_experts, gates, 0).astype(np.float32)
    return RoutingPlan(jnp.asarray(ids), jnp.asarray(gates), num_experts, capacity)


def random_ids(rng, num_tokens, num_experts, num_choices):
    return np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :num_choices]


def case_top_2(rng):
    return make_plan(random_ids(rng, 19, 4, 2), rng.random((19, 2)), 4)


def case_dropped_over_capacity(rng):
    ids, capacity = random_ids(rng, 19, 4, 2), 5
    for e in range(4):
        where = np.argwhere(ids == e)
        ids[tuple(where[capacity:].T)] = 4
    return make_plan(ids, rng.random((19, 2)), 4, capacity)


def case_forbidden_experts(rng):
    """A topology that leaves experts 1 and 3 of 4, so two experts are empty."""
    return make_plan(np.array([1, 3])[random_ids(rng, 19, 2, 2)], rng.random((19, 2)), 4)


def case_one_expert_takes_all(rng):
    return make_plan(np.tile([2, 4], (19, 1)), rng.random((19, 2)), 4)


def case_nothing_routed(rng):
    return make_plan(np.full((19, 2), 4), np.zeros((19, 2)), 4)


def case_one_token(rng):
    return make_plan([[3, 1]], [[0.25, 0.75]], 5)


def case_equal_gates(rng):
    return make_plan(random_ids(rng, 19, 4, 2), np.full((19, 2), 0.5), 4)


def case_masked_tokens(rng):
    ids = random_ids(rng, 19, 4, 2)
    ids[rng.random(19) < 0.5] = 4
    ids[3, 0] = 4  # a half-empty token too
    return make_plan(ids, rng.random((19, 2)), 4)


CASES = {name[5:]: case for name, case in dict(globals()).items() if name.startswith("case_")}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def problem(case, seed=0):
    """Tokens, plan, parameters and the output's cotangent of a case."""
    rng = np.random.default_rng(seed)
    plan = case(rng)
    tokens, output_grad = (jnp.asarray(rng.normal(size=(plan.gates.shape[0], WIDTH)), jnp.float32) for _ in range(2))
    return tokens, plan, swiglu_params(rng, plan.num_experts), output_grad


@functools.partial(jax.jit, static_argnames=("dispatch", "expert"))
def output_and_grads(dispatch, tokens, plan, params, output_grad, expert=SWIGLU):
    """What the oracle returns, through autodiff, under jit; compiled once per shape of problem."""

    def forward(tokens, gates, params):
        return dispatch(tokens, dataclasses.replace(plan, gates=gates), expert, params)

    output, vjp = jax.vjp(forward, tokens, plan.gates, params)
    return output, vjp(output_grad)


def assert_trees_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def test_order_of_five_assignments():
    # ids       2 0 2 3(empty) 0      expert 0: assignments 1, 4 -> places 0, 1; expert 1: none; expert 2: 0, 2 -> 2, 3
    order = expert_order(jnp.array([2, 0, 2, 3, 0]), 3)
    np.testing.assert_array_equal(order.positions, [2, 0, 3, 4, 1])
    np.testing.assert_array_equal(order.assignments, [1, 4, 0, 2, 3])
    np.testing.assert_array_equal(order.starts, [0, 2, 2, 4])


@pytest.mark.parametrize(("num_assignments", "num_experts"), [(1, 7), (16, 1), (1000, 7)])
def test_order_is_a_stable_argsort(num_assignments, num_experts):
    ids = np.random.default_rng(num_assignments).integers(0, num_experts + 1, num_assignments).astype(np.int32)
    ranks, counts = jax.jit(rank_in_expert, static_argnums=1)(jnp.asarray(ids), num_experts)
    np.testing.assert_array_equal(ranks, [np.sum(ids[:i] == e) for i, e in enumerate(ids)])
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=num_experts + 1))
    order = jax.jit(expert_order, static_argnums=1)(jnp.asarray(ids), num_experts)
    np.testing.assert_array_equal(order.assignments, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(order.positions[order.assignments], np.arange(num_assignments))


def test_block_ladder():
    assert block_ladder(32768, 64) == (512, 128)  # mean load 512
    assert block_ladder(8192, 8) == (512, 128)  # mean load 1024, but 512 is the longest
    assert block_ladder(5000, 16) == (256, 64)  # mean load 312
    assert block_ladder(2, 64) == (32, 8)  # one token


@every_backend
def test_two_tokens_by_hand(dispatch):
    # Expert e multiplies by 10^e. Token 0 (value 1): 0.5 * 10 + 0.5 * 100 = 55; token 1 (value 2): 0.25 * 2 + nothing.
    plan = make_plan([[1, 2], [0, 3]], [[0.5, 0.5], [0.25, 0.0]], 3)
    scaling = Expert(
        lambda scale, rows: rows,
        lambda scale, rows: rows * scale,
        lambda scale, rows, matmul, spread: rows * spread(scale)[:, None],
    )
    run = jax.jit(lambda tokens, params: dispatch(tokens, plan, scaling, params))
    output = run(jnp.array([[1.0], [2.0]]), jnp.array([1.0, 10.0, 100.0]))
    np.testing.assert_allclose(output, [[55.0], [0.5]], rtol=1e-6)


@every_backend
@every_case
def test_output_and_gradients_equal_the_loop(dispatch, case):
    tokens, plan, params, output_grad = problem(case)
    expected = dispatch_loop(tokens, np.asarray(plan.expert_ids), plan.gates, params, output_grad)
    assert_trees_close(output_and_grads(dispatch, tokens, plan, params, output_grad), expected)


@every_backend
@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.permutations(range(5)).map(lambda order: order[:2]), min_size=19, max_size=19))
def test_random_plans_equal_the_loop(dispatch, ids):
    """Any two of {expert 0..3, empty} per token."""
    tokens, plan, params, output_grad = problem(lambda rng: make_plan(ids, rng.random((19, 2)), 4))
    expected = dispatch_loop(tokens, np.asarray(ids), plan.gates, params, output_grad)
    assert_trees_close(output_and_grads(dispatch, tokens, plan, params, output_grad), expected)


@every_backend
def test_bfloat16(dispatch):
    tokens, plan, params, output_grad = problem(case_masked_tokens)
    tokens, output_grad, params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (tokens, output_grad, params))
    output, grads = output_and_grads(dispatch, tokens, plan, params, output_grad)
    assert output.dtype == jnp.bfloat16
    assert [g.dtype for g in jax.tree.leaves(grads)] == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    expected = dispatch_loop(tokens, np.asarray(plan.expert_ids), plan.gates, params, output_grad)
    # bfloat16 keeps 8 bits (2^-8 = 0.004); a handful of roundings of values up to about 10.
    assert_trees_close((output, grads), expected, tolerance=0.1)


@every_backend
def test_population_vmap(dispatch):
    """Members differ in tokens, plan and parameters; each must get its own result and gradients."""
    members = [problem(case_masked_tokens, seed) for seed in range(3)]
    tokens, plans, params, output_grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    run = functools.partial(output_and_grads, dispatch)
    together = jax.vmap(run)(tokens, plans, params, output_grads)
    for i, member in enumerate(members):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), run(*member))


@every_backend
def test_population_of_plans_over_shared_parameters(dispatch):
    """Gradient of a sum over members, with only the plan batched."""
    tokens, _, params, output_grad = problem(case_masked_tokens)
    plans = [problem(case_masked_tokens, seed)[1] for seed in range(3)]

    def loss(params, plans):
        outputs = jax.vmap(lambda plan: dispatch(tokens, plan, SWIGLU, params))(plans)
        return jnp.sum(outputs * output_grad[None])

    grads = jax.jit(jax.grad(loss))(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans))
    alone = [output_and_grads(dispatch, tokens, plan, params, output_grad)[1][2] for plan in plans]
    assert_trees_close(grads, jax.tree.map(lambda *leaves: sum(leaves), *alone))


@every_backend
def test_scanned_layers_with_rematerialisation(dispatch):
    """Two layers under `scan` and `jax.checkpoint` have the gradient of the two written out."""
    tokens, plan, params, output_grad = problem(case_top_2)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), params)

    def scanned(layers):
        step = jax.checkpoint(lambda x, layer: (x + dispatch(x, plan, SWIGLU, layer), None))
        return jnp.sum(jax.lax.scan(step, tokens, layers)[0] * output_grad)

    def written_out(layers):
        x = tokens
        for i in range(2):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            x = x + BACKENDS["dense"](x, plan, SWIGLU, layer)
        return jnp.sum(x * output_grad)

    assert_trees_close(jax.jit(jax.grad(scanned))(layers), jax.jit(jax.grad(written_out))(layers), tolerance=1e-4)


@every_backend
def test_any_expert_network(dispatch):
    """A biased network that is all `inner`: padded rows are not zero after it, and must still not leak."""
    rng = np.random.default_rng(1)
    plan = case_masked_tokens(rng)
    shapes = {"in": (4, WIDTH, HIDDEN), "bias": (4, HIDDEN), "out": (4, HIDDEN, WIDTH)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    tokens, output_grad = (jnp.asarray(rng.normal(size=(19, WIDTH)), jnp.float32) for _ in range(2))

    def by_expert(tokens, gates, params):
        weights = [jnp.sum(jnp.where(plan.expert_ids == e, gates, 0), axis=1) for e in range(4)]
        experts = [jax.tree.map(lambda leaf, e=e: leaf[e], params) for e in range(4)]
        return sum(w[:, None] * biased_network(one, tokens) for w, one in zip(weights, experts, strict=True))

    output, vjp = jax.vjp(by_expert, tokens, plan.gates, params)
    actual = output_and_grads(dispatch, tokens, plan, params, output_grad, expert=WHOLE)
    assert_trees_close(actual, (output, vjp(output_grad)))


@every_backend
def test_masked_tokens_may_hold_anything(dispatch):
    tokens, plan, params, output_grad = problem(case_masked_tokens)
    is_masked = jnp.all(plan.expert_ids == plan.num_experts, axis=1)
    assert bool(is_masked.any())
    poisoned = jnp.where(is_masked[:, None], jnp.nan, tokens)
    clean = output_and_grads(dispatch, tokens, plan, params, output_grad)
    dirty = output_and_grads(dispatch, poisoned, plan, params, output_grad)
    assert_trees_close(dirty, clean, tolerance=1e-6)
    np.testing.assert_array_equal(dirty[0][is_masked], 0)


@every_backend
def test_order_of_tokens_and_choices_is_immaterial(dispatch):
    tokens, plan, params, output_grad = problem(case_top_2)
    output, (tokens_grad, gates_grad, params_grad) = output_and_grads(dispatch, tokens, plan, params, output_grad)
    order = np.random.default_rng(5).permutation(tokens.shape[0])
    shuffled = RoutingPlan(plan.expert_ids[order, ::-1], plan.gates[order, ::-1], 4, None)
    actual = output_and_grads(dispatch, tokens[order], shuffled, params, output_grad[order])
    assert_trees_close(actual, (output[order], (tokens_grad[order], gates_grad[order, ::-1], params_grad)))


def test_unknown_backend():
    assert get_backend("blocked") is dispatch_blocked
    with pytest.raises(ValueError, match="unknown dispatch backend 'block'; known: dense, einsum, gather, blocked"):
        get_backend("block")


def test_grouped_refuses_an_expert_that_does_not_name_its_matmuls():
    tokens, plan, params, _ = problem(case_top_2)
    with pytest.raises(ValueError, match=r"'grouped' needs an expert.*types\.Expert.*'blocked', which runs any expert"):
        dispatch_grouped(tokens, plan, Expert(swiglu_inner, swiglu_outer), params)


def test_blocked_work_follows_the_filled_rows():
    """No matmul over all experts: the compiled program's buffers hold T * K hidden rows, not T * E."""
    num_tokens, num_experts = 256, 32
    rng = np.random.default_rng(0)
    plan = make_plan(random_ids(rng, num_tokens, num_experts, 1), np.ones((num_tokens, 1)), num_experts)
    tokens, params = jnp.zeros((num_tokens, WIDTH)), swiglu_params(rng, num_experts)

    def temporary_bytes(dispatch):
        compiled = jax.jit(lambda x, p: dispatch(x, plan, SWIGLU, p)).lower(tokens, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(BACKENDS["blocked"]) < temporary_bytes(BACKENDS["dense"]) / 4
