"""Expert parallelism on four fake devices against one device, and its drops against a loop over devices and tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch import BACKENDS
from moe_jax.dispatch.expert_parallel import ExchangeCounts, ExpertParallel
from moe_jax.nn.attention_experts import PROJECTION
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.routing import drop_over_capacity
from moe_jax.types import Expert
from tests.dispatch_oracle import dispatch_loop
from tests.test_dispatch import (
    SWIGLU,
    WIDTH,
    assert_trees_close,
    make_plan,
    output_and_grads,
    random_ids,
    swiglu_params,
)

NUM_TOKENS, NUM_EXPERTS, NUM_CHOICES = 16, 8, 3


def make_mesh(*shape, names=("data", "expert")):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names)


MESHES = {f"{d}x{e}": make_mesh(d, e) for d, e in ((1, 4), (2, 2), (4, 1))}
every_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())


def ids_at_random(rng):
    return random_ids(rng, NUM_TOKENS, NUM_EXPERTS, NUM_CHOICES)


def ids_with_empty_slots(rng):
    return np.where(rng.random((NUM_TOKENS, NUM_CHOICES)) < 0.4, NUM_EXPERTS, ids_at_random(rng))


def ids_of_masked_tokens(rng):
    """Half of the tokens, and all of the first device's on every mesh."""
    is_masked = (rng.random(NUM_TOKENS) < 0.5) | (np.arange(NUM_TOKENS) < 4)
    return np.where(is_masked[:, None], NUM_EXPERTS, ids_at_random(rng))


def ids_all_to_one_expert(rng):
    return np.tile([NUM_EXPERTS, 5, NUM_EXPERTS], (NUM_TOKENS, 1))


def ids_all_to_one_shard(rng):
    return 4 + random_ids(rng, NUM_TOKENS, 4, NUM_CHOICES)  # the second shard of two


def ids_of_nobody(rng):
    return np.full((NUM_TOKENS, NUM_CHOICES), NUM_EXPERTS)


CASES = {name[4:]: case for name, case in dict(globals()).items() if name.startswith("ids_")}


def problem(case, seed=0):
    """Tokens, plan, parameters and the output's cotangent."""
    rng = np.random.default_rng(seed)
    ids = case(rng)
    plan = make_plan(ids, rng.random(ids.shape), NUM_EXPERTS)
    tokens, output_grad = (jnp.asarray(rng.normal(size=(NUM_TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    return tokens, plan, swiglu_params(rng, NUM_EXPERTS), output_grad


@functools.partial(jax.jit, static_argnums=0)
def count(dispatch, tokens, plan, params):
    return dispatch.dispatch_and_count(tokens, plan, SWIGLU, params)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def expert_output_and_grads(expert, dispatch, tokens, plan, params, output_grad):
    output, vjp = jax.vjp(lambda *arguments: dispatch(arguments[0], plan, expert, arguments[1]), tokens, params)
    return output, vjp(output_grad)


def exchange_loop(ids, num_data, num_shards, rows_per_shard, rows_per_expert):
    """Ids after all drops, and the counts, with one device, choice and token after the other."""
    num_choices, num_local, num_own = ids.shape[1], NUM_EXPERTS // num_shards, len(ids) // (num_data * num_shards)
    kept = ids.copy()
    counts = ExchangeCounts(*np.zeros((5, num_data, num_shards), np.int64))
    for d in range(num_data):
        for s in range(num_shards):
            tokens = (d * num_shards + s) * num_own + np.arange(num_own)
            travelling = [[] for _ in range(num_shards)]
            for k in range(num_choices):
                for t in tokens:
                    if ids[t, k] == NUM_EXPERTS:
                        continue
                    counts.assigned[d, s] += 1
                    row = travelling[ids[t, k] // num_local]
                    if t not in row and len(row) == rows_per_shard:
                        counts.dropped_send[d, s] += 1
                        kept[t, k] = NUM_EXPERTS
                    elif t not in row:
                        row.append(t)
            counts.rows[d, s] = sum(map(len, travelling))
            counts.padding[d, s] = num_shards * rows_per_shard - counts.rows[d, s]
        load = np.zeros(NUM_EXPERTS, int)
        for k in range(num_choices):
            for t in range(d * num_shards * num_own, (d + 1) * num_shards * num_own):
                e = kept[t, k]
                if e == NUM_EXPERTS:
                    continue
                if load[e] == rows_per_expert:
                    counts.dropped_capacity[d, e // num_local] += 1
                    kept[t, k] = NUM_EXPERTS
                else:
                    load[e] += 1
    return kept, counts


def assert_equal_to_the_loop(dispatch, rows_per_shard, rows_per_expert, arguments):
    """Counts, output and gradients; a dropped assignment gives nothing and gets no gradient."""
    tokens, plan, params, output_grad = arguments
    ids = np.asarray(plan.expert_ids)
    kept, expected = exchange_loop(ids, *dispatch.mesh.devices.shape, rows_per_shard, rows_per_expert)
    jax.tree.map(np.testing.assert_array_equal, count(dispatch, tokens, plan, params), expected)
    results = output_and_grads(dispatch, tokens, plan, params, output_grad)
    assert_trees_close(results, dispatch_loop(tokens, kept, plan.gates, params, output_grad))


def test_seven_assignments_by_hand():
    # Two devices: tokens 0, 1 and experts 0, 1 on the first, tokens 2, 3 and experts 2, 3 on the second; K = 2.
    # R = ceil(0.5 * 2 * 2 / 2) = 1 row from each device to each, and ceil(0.5 * 4 * 2 / 4) = 1 row per expert.
    # Device 0: token 0 has the row to shard 0, token 1 the row to shard 1; their second choices find no row (2 drops).
    # Device 1: both choices of token 2 travel in one row to shard 0; token 3 finds none (1 drop); shard 1 gets padding.
    # Shard 0: expert 0 takes token 0 and then has no room for token 2 (1 drop); expert 1 takes token 2.
    plan = make_plan([[0, 2], [2, 1], [0, 1], [0, 4]], np.full((4, 2), 0.5), 4)
    dispatch = ExpertParallel(make_mesh(1, 2), send_factor=0.5, capacity_factor=0.5)
    scaling = Expert(lambda scale, rows: rows, lambda scale, rows: rows * scale)  # expert e multiplies by 10^e
    run = jax.jit(lambda tokens, params: dispatch.dispatch_and_count(tokens, plan, scaling, params))
    output, counts = run(jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([1.0, 10.0, 100.0, 1000.0]))
    np.testing.assert_allclose(output, [[0.5 * 1], [0.5 * 200], [0.5 * 30], [0]], rtol=1e-6)
    expected = ExchangeCounts(
        assigned=[[4, 3]], dropped_send=[[2, 1]], dropped_capacity=[[1, 0]], rows=[[2, 1]], padding=[[0, 1]]
    )
    for name in ExchangeCounts._fields:
        np.testing.assert_array_equal(getattr(counts, name), getattr(expected, name), err_msg=name)


@every_mesh
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_one_device(mesh, case):
    arguments = problem(case)
    expected = output_and_grads(BACKENDS["dense"], *arguments)
    assert_trees_close(output_and_grads(ExpertParallel(mesh), *arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_every_backend_runs_the_local_experts(backend):
    """With drops by both causes: 2 of 4 tokens travel to a shard; an expert has ceil(0.6 * 8 * 3 / 8) = 2 rows."""
    dispatch = ExpertParallel(MESHES["2x2"], backend=backend, send_factor=0.3, capacity_factor=0.6)
    assert_equal_to_the_loop(dispatch, 2, 2, problem(ids_at_random))


def test_a_local_plan_is_a_plan():
    """Gates are 0 in empty slots, of other shards and of drops; the capacity is the smallest that is promised."""
    capacities = []

    def sum_of_gates(tokens, plan, expert, params):
        capacities.append(plan.capacity)
        return jnp.broadcast_to(jnp.sum(plan.gates, axis=1, keepdims=True), tokens.shape)

    tokens, plan, params, _ = problem(ids_at_random)
    kept, _ = exchange_loop(np.asarray(plan.expert_ids), 2, 2, 4, 2)
    dispatch = ExpertParallel(MESHES["2x2"], backend=sum_of_gates, capacity_factor=0.6)  # 2 rows per expert
    output = jax.jit(lambda tokens: dispatch(tokens, plan, SWIGLU, params))(tokens)
    expected = np.sum(plan.gates, axis=1, where=kept < NUM_EXPERTS, keepdims=True)
    np.testing.assert_allclose(output, np.repeat(expected, WIDTH, axis=1), rtol=1e-6)

    one_each = ids_of_nobody(None)
    one_each[:NUM_EXPERTS, 0] = np.arange(NUM_EXPERTS)
    promising = make_plan(one_each, np.ones((NUM_TOKENS, NUM_CHOICES)), NUM_EXPERTS, capacity=1)
    jax.eval_shape(lambda tokens: dispatch(tokens, promising, SWIGLU, params), tokens)
    assert capacities == [2, 1]


@every_mesh
@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.permutations(range(NUM_EXPERTS + 1)).map(lambda o: o[:3]), min_size=16, max_size=16))
def test_random_drops_equal_the_loop(mesh, ids):
    """Any three of {expert 0..7, empty} per token, with half of the rows that balance needs."""
    num_shards = mesh.shape["expert"]
    rows_per_shard = min(4, math.ceil(0.5 * 4 * NUM_CHOICES / num_shards))
    rows_per_expert = math.ceil(0.5 * 4 * num_shards * NUM_CHOICES / NUM_EXPERTS)
    dispatch = ExpertParallel(mesh, send_factor=0.5, capacity_factor=0.5)
    assert_equal_to_the_loop(dispatch, rows_per_shard, rows_per_expert, problem(lambda rng: np.array(ids)))


def test_one_hot_load_is_dropped_by_the_sender_or_by_the_expert():
    # All 16 tokens choose expert 5 alone. R = ceil(0.75 * 4 * 3 / 4) = 3 of each device's 4 tokens travel.
    # An expert has ceil(0.75 * 16 * 3 / 8) = 5 rows.
    mesh, (tokens, plan, params, _) = MESHES["1x4"], problem(ids_all_to_one_expert)
    counts = count(ExpertParallel(mesh, send_factor=0.75), tokens, plan, params)
    np.testing.assert_array_equal(counts.dropped_send, [[1, 1, 1, 1]])
    np.testing.assert_array_equal(counts.dropped_capacity, [[0, 0, 0, 0]])
    counts = count(ExpertParallel(mesh, capacity_factor=0.75), tokens, plan, params)
    np.testing.assert_array_equal(counts.dropped_send, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(counts.dropped_capacity, [[0, 0, 11, 0]])


def test_full_experts_drop_whom_the_router_would_drop():
    """On one place of the data axis the receiver serves in the order of `ops.capacity`."""
    tokens, plan, params, output_grad = problem(ids_at_random)
    capacity = 3  # ceil(0.5 * 16 * 3 / 8)
    ids = drop_over_capacity(plan.expert_ids, NUM_EXPERTS, capacity)
    dropped = make_plan(ids, plan.gates, NUM_EXPERTS, capacity)
    dispatch = ExpertParallel(MESHES["1x4"], capacity_factor=0.5)
    expected = output_and_grads(BACKENDS["dense"], tokens, dropped, params, output_grad)
    assert_trees_close(output_and_grads(dispatch, tokens, plan, params, output_grad), expected)
    counts = count(dispatch, tokens, plan, params)
    assert counts.dropped_capacity.sum() == np.sum(np.asarray(plan.expert_ids) != np.asarray(ids)) > 0


def test_a_token_travels_once_to_each_shard():
    tokens, plan, params, _ = problem(ids_with_empty_slots)
    counts = count(ExpertParallel(MESHES["2x2"]), tokens, plan, params)
    visits = [set(ids[ids < NUM_EXPERTS] // 4) for ids in np.asarray(plan.expert_ids)]
    assert counts.rows.sum() == sum(map(len, visits)) < counts.assigned.sum()
    assert (counts.rows + counts.padding).sum() == 4 * 2 * 4  # devices, shards, R = T


@every_mesh
def test_masked_tokens_may_hold_anything(mesh):
    tokens, plan, params, output_grad = problem(ids_of_masked_tokens)
    is_masked = np.all(np.asarray(plan.expert_ids) == NUM_EXPERTS, axis=1)
    poisoned = jnp.where(is_masked[:, None], jnp.nan, tokens)
    clean = output_and_grads(ExpertParallel(mesh), tokens, plan, params, output_grad)
    dirty = output_and_grads(ExpertParallel(mesh), poisoned, plan, params, output_grad)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    np.testing.assert_array_equal(dirty[0][is_masked], 0)


def test_order_of_tokens_and_choices_is_immaterial():
    tokens, plan, params, output_grad = problem(ids_with_empty_slots)
    dispatch = ExpertParallel(MESHES["2x2"])
    output, (tokens_grad, gates_grad, params_grad) = output_and_grads(dispatch, tokens, plan, params, output_grad)
    order = np.random.default_rng(5).permutation(NUM_TOKENS)
    shuffled = make_plan(plan.expert_ids[order, ::-1], plan.gates[order, ::-1], NUM_EXPERTS)
    actual = output_and_grads(dispatch, tokens[order], shuffled, params, output_grad[order])
    assert_trees_close(actual, (output[order], (tokens_grad[order], gates_grad[order, ::-1], params_grad)))


def test_placed_arrays_move_by_all_to_all_alone():
    """Arrays on their devices give the same results and stay there; only parameter gradients need an all-reduce."""
    mesh, (tokens, plan, params, output_grad) = MESHES["2x2"], problem(ids_with_empty_slots)
    by_token, by_expert = NamedSharding(mesh, P(("data", "expert"))), NamedSharding(mesh, P("expert"))
    dispatch = ExpertParallel(mesh)
    expected = output_and_grads(dispatch, tokens, plan, params, output_grad)
    placed = jax.device_put((tokens, plan, params, output_grad), (by_token, by_token, by_expert, by_token))
    actual = output_and_grads(dispatch, *placed)
    assert_trees_close(actual, expected, tolerance=1e-6)
    output, (tokens_grad, gates_grad, params_grad) = actual
    for leaf in (output, tokens_grad, gates_grad):
        assert leaf.sharding.is_equivalent_to(by_token, leaf.ndim)
    for leaf in jax.tree.leaves(params_grad):
        assert leaf.sharding.is_equivalent_to(by_expert, leaf.ndim)
    program = output_and_grads.lower(dispatch, *placed).compile().as_text()
    assert "all-to-all" in program and "all-reduce" in program
    assert "all-gather" not in program


def test_any_other_axis_repeats_the_work():
    arguments = problem(ids_with_empty_slots)
    mesh = make_mesh(1, 2, 2, names=("batch", "model", "owner"))
    dispatch = ExpertParallel(mesh, data_axis="batch", expert_axis="owner")
    assert_trees_close(output_and_grads(dispatch, *arguments), output_and_grads(BACKENDS["dense"], *arguments))


@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_hidden_units_over_a_tensor_axis(kind):
    """Two devices give the halves of each expert's output; the bias of the output is added once."""
    tokens, plan, _, output_grad = problem(ids_with_empty_slots)
    stack = ExpertStack(NUM_EXPERTS, WIDTH, 6, kind=kind, settings={"use_bias": True}, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, stack.parameters(jnp.float32))  # biases that would show
    mesh = make_mesh(1, 2, 2, names=("data", "expert", "tensor"))
    run = functools.partial(expert_output_and_grads, stack.expert)
    expected = run(BACKENDS["dense"], tokens, plan, params, output_grad)
    assert_trees_close(run(ExpertParallel(mesh, tensor_axis="tensor"), tokens, plan, params, output_grad), expected)


def test_bfloat16():
    tokens, plan, params, output_grad = problem(ids_with_empty_slots)
    tokens, output_grad, params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (tokens, output_grad, params))
    output, grads = output_and_grads(ExpertParallel(MESHES["2x2"]), tokens, plan, params, output_grad)
    assert output.dtype == jnp.bfloat16
    assert [g.dtype for g in jax.tree.leaves(grads)] == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    expected = dispatch_loop(tokens, np.asarray(plan.expert_ids), plan.gates, params, output_grad)
    # bfloat16 keeps 8 bits (2^-8 = 0.004); a handful of roundings of values up to about 10.
    assert_trees_close((output, grads), expected, tolerance=0.1)


def test_population_vmap():
    members = [problem(ids_with_empty_slots, seed) for seed in range(2)]
    together = jax.vmap(functools.partial(output_and_grads, ExpertParallel(MESHES["2x2"])))(
        *jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    )
    for i, member in enumerate(members):
        alone = output_and_grads(BACKENDS["dense"], *member)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)


def test_scanned_layers_with_rematerialisation():
    """Two layers under `scan` and `jax.checkpoint` have the gradient of the same on one device."""
    tokens, plan, params, output_grad = problem(ids_with_empty_slots)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), params)

    def loss(layers, dispatch):
        step = jax.checkpoint(lambda x, layer: (x + dispatch(x, plan, SWIGLU, layer), None))
        return jnp.sum(jax.lax.scan(step, tokens, layers)[0] * output_grad)

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    expected = grads(layers, BACKENDS["dense"])
    assert_trees_close(grads(layers, ExpertParallel(MESHES["2x2"])), expected, tolerance=1e-4)


def test_what_cannot_work_is_refused():
    mesh, (tokens, plan, params, _) = MESHES["2x2"], problem(ids_at_random)
    with pytest.raises(ValueError, match="no axis 'experts'; its axes: data, expert"):
        ExpertParallel(mesh, expert_axis="experts")
    with pytest.raises(ValueError, match="must differ, both are 'expert'"):
        ExpertParallel(mesh, data_axis="expert")
    with pytest.raises(ValueError, match="send_factor must be positive, got 0"):
        ExpertParallel(mesh, send_factor=0)
    with pytest.raises(ValueError, match="capacity_factor must be positive, got -1"):
        ExpertParallel(mesh, capacity_factor=-1)
    with pytest.raises(ValueError, match="tensor_axis='expert' is another axis already"):
        ExpertParallel(mesh, tensor_axis="expert")
    with pytest.raises(ValueError, match="no axis 'tensor'"):
        ExpertParallel(mesh, tensor_axis="tensor")
    three = make_mesh(2, 1, 2, names=("data", "expert", "tensor"))
    with pytest.raises(ValueError, match=r"not a sum over hidden units .* cannot be split over axis 'tensor'"):
        ExpertParallel(three, tensor_axis="tensor")(tokens, plan, PROJECTION, params)
    with pytest.raises(ValueError, match="must be of type Auto"):
        ExpertParallel(jax.make_mesh((2, 2), ("data", "expert")))
    with pytest.raises(ValueError, match=r"14 tokens do not divide over 2 x 2 devices; append .* \(expert id 8\)"):
        ExpertParallel(mesh)(tokens[:14], plan, SWIGLU, params)
    seven = make_plan(np.zeros((16, 1)), np.ones((16, 1)), 7)
    with pytest.raises(ValueError, match="7 experts do not divide over 2 devices of axis 'expert'"):
        ExpertParallel(mesh)(tokens, seven, SWIGLU, params)


def test_a_layer_runs_over_a_mesh_as_on_one_device():
    def layer(backend):
        router_key, expert_key = jax.random.split(jax.random.key(0))
        router, experts = LinearRouter(8, 4, key=router_key), ExpertStack(4, 8, 6, key=expert_key)
        return MoELayer(router, experts, num_choices=2, backend=backend)

    x = jax.random.normal(jax.random.key(1), (2, 8, 8))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "expert"))
    outputs = [jax.jit(lambda one, x: one(x)[0])(layer(backend), x) for backend in ("blocked", ExpertParallel(mesh))]
    np.testing.assert_allclose(*outputs, atol=1e-5)
