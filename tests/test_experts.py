"""Every kind of expert against a float64 loop and its finite differences, on every backend; sizes, draws, own kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import BACKENDS
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.experts import EXPERTS, SWIGLU, ExpertKind, deepen, gated, get_expert_kind, lift
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers.linear import LinearRouter
from tests.expert_oracle import NETWORKS, finite_differences
from tests.test_dispatch import (
    CASES,
    DISPATCHERS,
    assert_trees_close,
    case_masked_tokens,
    every_backend,
    every_case,
    output_and_grads,
)

E, D, F = 4, 5, 3
every_network = pytest.mark.parametrize(("kind", "settings"), NETWORKS, ids=lambda part: str(part))


def make_stack(kind, settings=(), hidden_sizes=(), seed=0):
    """A stack whose biases are not zero; its weights are large enough to reach clamps, unless many layers multiply."""
    stack = ExpertStack(
        E, D, F, kind=kind, settings=dict(settings), hidden_sizes=hidden_sizes, key=jax.random.key(seed)
    )
    rng = np.random.default_rng(seed)
    for name in stack.parameters(jnp.float32):
        param = getattr(stack, name)
        scale = 0.2 if kind == "deep" else 0.7
        param[...] = jnp.asarray(rng.normal(size=param.shape) * scale, jnp.float32)
    return stack


def run_one(expert, params, rows):
    return expert.outer(params, expert.inner(params, rows))


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_the_oracle_knows_every_kind():
    assert {kind for kind, _ in NETWORKS} == set(EXPERTS)


@every_network
def test_values_and_gradients_equal_the_loop(kind, settings, rng):
    stack = make_stack(kind, settings)
    params = jax.tree.map(lambda leaf: leaf[2], stack.parameters(jnp.float32))
    rows, out_grad = (jnp.asarray(rng.normal(size=(4, D)) * 3, jnp.float32) for _ in range(2))

    def loss(params, rows):
        return sum(NETWORKS[kind, settings](params, x) @ g for x, g in zip(rows, float64(out_grad), strict=True))

    @jax.jit
    def value_and_grads(params, rows):
        y, vjp = jax.vjp(lambda p, x: run_one(stack.expert, p, x), params, rows)
        return y, vjp(out_grad)

    y, (params_grad, rows_grad) = value_and_grads(params, rows)
    exact_params, exact_rows = float64((params, rows))
    assert_trees_close(y, np.stack([NETWORKS[kind, settings](exact_params, x) for x in exact_rows]), 1e-4)
    assert_trees_close(rows_grad, finite_differences(lambda x: loss(exact_params, x), exact_rows), 1e-3)
    for name, value in exact_params.items():
        expected = finite_differences(lambda v, name=name: loss(exact_params | {name: v}, exact_rows), value)
        np.testing.assert_allclose(params_grad[name], expected, rtol=1e-3, atol=1e-3, err_msg=name)


def test_gpt_oss_by_hand():
    # Gate 10 is cut to 7, up -9 to -7: (-7 + 1) * 7 * sigmoid(1.702 * 7 = 11.914) = -42 * 0.9999933 = -41.99972;
    # times 2 and plus 0.5. A row of zeros gives gate 0, so the bias alone.
    params = {
        "w_in": jnp.array([[10.0, -9.0]]),
        "b_in": jnp.zeros(2),
        "w_out": jnp.array([[2.0]]),
        "b_out": jnp.array([0.5]),
    }
    y = run_one(get_expert_kind("gpt_oss").expert, params, jnp.array([[1.0], [0.0]]))
    np.testing.assert_allclose(y, [[-83.49944], [0.5]], rtol=1e-6)


def test_relu_squared_by_hand():
    # x = (1, 2): hidden (3, -1) after W = [[1, 1], [1, -1]]; squared where positive (9, 0); times V = [[1, 2], [5, 5]].
    params = {"w_in": jnp.array([[1.0, 1.0], [1.0, -1.0]]), "w_out": jnp.array([[1.0, 2.0], [5.0, 5.0]])}
    y = run_one(get_expert_kind("relu2").expert, params, jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(y, [[9.0, 18.0]])


@every_backend
@every_case
def test_biased_experts_on_every_backend(dispatch, case):
    """gpt-oss: what an expert gives for a row of padding is not zero, and must reach neither outputs nor gradients."""
    stack = make_stack("gpt_oss")
    assert_equals_dense(dispatch, case, stack.expert, stack.parameters(jnp.float32))


@every_backend
def test_deep_experts_on_every_backend(dispatch):
    """What `inner` keeps is a pair, and most of the work is in `outer`."""
    stack = make_stack("deep")
    assert_equals_dense(dispatch, case_masked_tokens, stack.expert, stack.parameters(jnp.float32))


def assert_equals_dense(dispatch, case, expert, params):
    rng = np.random.default_rng(3)
    plan = case(rng)
    params = jax.tree.map(lambda leaf: jnp.resize(leaf, (plan.num_experts, *leaf.shape[1:])), params)
    tokens, output_grad = (jnp.asarray(rng.normal(size=(len(plan.gates), D)), jnp.float32) for _ in range(2))
    actual = output_and_grads(dispatch, tokens, plan, params, output_grad, expert=expert)
    expected = output_and_grads(BACKENDS["dense"], tokens, plan, params, output_grad, expert=expert)
    assert_trees_close(actual, expected, 1e-4)


def soft_clusters(params, rows):
    """A user's function with nested parameters and no matrix in front: softly picks one of a few prototypes."""
    distance = jnp.square(rows[:, None, :] - params["centres"][None]).sum(-1)
    weights = jax.nn.softmax(-params["sharpness"]["value"] * distance, axis=-1)
    return weights @ params["values"] + jnp.cos(rows)


SOFT_CLUSTERS = lift(soft_clusters)


def cluster_params(rng):
    return {
        "centres": jnp.asarray(rng.normal(size=(E, 6, D)), jnp.float32),
        "values": jnp.asarray(rng.normal(size=(E, 6, D)), jnp.float32),
        "sharpness": {"value": jnp.asarray(rng.random(E), jnp.float32)},
    }


@pytest.mark.parametrize("dispatch", [d for name, d in DISPATCHERS.items() if "grouped" not in name])
@pytest.mark.parametrize("case", ["masked_tokens", "forbidden_experts"])
def test_a_users_function_on_every_backend(dispatch, case, rng):
    assert_equals_dense(dispatch, CASES[case], SOFT_CLUSTERS, cluster_params(rng))


def test_a_lifted_function_by_loop(rng):
    params, plan = cluster_params(rng), case_masked_tokens(rng)
    tokens = jnp.asarray(rng.normal(size=(len(plan.gates), D)), jnp.float32)
    on_one_token = jax.jit(soft_clusters)
    expected = np.zeros(tokens.shape)
    for t, k in np.argwhere(np.asarray(plan.expert_ids) < E):
        one = jax.tree.map(lambda leaf, e=int(plan.expert_ids[t, k]): np.asarray(leaf)[e], params)
        expected[t] += float(plan.gates[t, k]) * np.asarray(on_one_token(one, tokens[t : t + 1])[0])
    output, _ = output_and_grads(BACKENDS["blocked"], tokens, plan, params, tokens, expert=SOFT_CLUSTERS)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), [("swiglu", ()), ("gpt_oss", ()), ("deep", (("num_layers", 2),))])
def test_masked_units_make_a_smaller_expert(kind, settings, rng):
    """Values and gradients are those of the smaller matrices; what was cut off gets gradient zero, exactly."""
    sizes = (1, 3, 2, 1)
    stack = make_stack(kind, settings, sizes)
    rows, out_grad = (jnp.asarray(rng.normal(size=(6, D)), jnp.float32) for _ in range(2))

    @jax.jit
    def loss(stack):
        outputs = jax.vmap(lambda one: run_one(stack.expert, one, rows))(stack.parameters(jnp.float32))
        return jnp.sum(outputs * out_grad[None])

    @jax.jit
    def smaller_loss(params):
        return jnp.sum(run_one(stack.expert, params, rows) * out_grad)

    value, by_stack = jax.value_and_grad(loss)(stack)
    params, grads = (
        {name: np.asarray(getattr(of, name)[...]) for name in stack.parameters(jnp.float32)} for of in (stack, by_stack)
    )
    total = 0.0
    for e, size in enumerate(sizes):
        units = np.r_[:size, F : F + size]
        small = {"w_in": params["w_in"][e][..., units], "w_out": params["w_out"][e][..., :size, :]}
        if kind == "gpt_oss":
            small |= {"b_in": params["b_in"][e][units], "b_out": params["b_out"][e]}
        part, small_grads = jax.value_and_grad(smaller_loss)(small)
        total += part
        np.testing.assert_allclose(grads["w_in"][e][..., units], small_grads["w_in"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads["w_out"][e][..., :size, :], small_grads["w_out"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.delete(grads["w_in"][e], units, axis=-1), 0)
        np.testing.assert_array_equal(grads["w_out"][e][..., size:, :], 0)
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_swiglu_is_drawn_as_it_always_was():
    """Published runs depend on these bits."""
    stack = ExpertStack(E, D, F, output_scale=0.3, key=jax.random.key(7))
    in_key, out_key = jax.random.split(jax.random.key(7))
    np.testing.assert_array_equal(stack.w_in[...], jax.random.normal(in_key, (E, D, 2 * F)) * D**-0.5)
    np.testing.assert_array_equal(stack.w_out[...], jax.random.normal(out_key, (E, F, D)) * 0.3 * F**-0.5)
    assert stack.expert is SWIGLU


def test_smaller_experts_start_with_larger_weights():
    # Fan-in 1 instead of 3: sqrt(3) times the weights of the whole expert.
    whole, cut = (ExpertStack(E, D, F, hidden_sizes=sizes, key=jax.random.key(0)) for sizes in ((), (3, 1, 3, 2)))
    np.testing.assert_allclose(cut.w_out[...][1], whole.w_out[...][1] * 3**0.5, rtol=1e-6)
    np.testing.assert_array_equal(cut.w_out[...][2], whole.w_out[...][2])


def test_one_deep_layer_is_the_layer(rng):
    base, one = gated(use_bias=True), deepen(gated(use_bias=True), 1)
    drawn = one.draw(jax.random.key(0), E, D, F, 0.5)
    assert {name: value.shape for name, value in drawn.items()} == {
        "w_in": (E, 1, D, 2 * F),
        "w_out": (E, 1, F, D),
        "b_in": (E, 1, 2 * F),
        "b_out": (E, 1, D),
    }
    rows = jnp.asarray(rng.normal(size=(3, D)), jnp.float32)
    params = {name: value[1] for name, value in drawn.items()}
    plain = {name: value[0] for name, value in params.items()}
    np.testing.assert_array_equal(run_one(one.expert, params, rows), run_one(base.expert, plain, rows))


def test_a_population_of_stacks_is_a_vmap_over_keys():
    def first(key):
        stack = ExpertStack(E, D, F, kind="gpt_oss", key=key)
        params = stack.parameters(jnp.bfloat16)
        assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("bfloat16")}
        return run_one(stack.expert, {name: leaf[0] for name, leaf in params.items()}, jnp.ones((2, D), jnp.bfloat16))

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(first))(keys)
    assert together.shape == (3, 2, D) and together.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (together[1], jax.jit(first)(keys[1]))), rtol=0.02)


def halve(params, rows):
    return rows @ params["w"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "relu"}, "unknown expert kind 'relu'; known: swiglu, geglu, mlp, relu2, gpt_oss, deep"),
        ({"settings": {"beta": 1}}, "'swiglu' has no setting 'beta'; it has: activation, precision, use_bias"),
        ({"kind": "mlp", "settings": {"activation": "tanh"}}, "unknown activation 'tanh'; known: relu, relu2, gelu"),
        ({"kind": "deep", "settings": {"num_layers": 0}}, "num_layers must be at least 1, got 0"),
        ({"hidden_sizes": (1, 2)}, r"hidden_sizes=\(1, 2\) must be one width in \[1, 3\] for each of 4 experts"),
        ({"hidden_sizes": (1, 2, 3, 4)}, r"one width in \[1, 3\]"),
        ({"kind": "narrow"}, r"'narrow' must map rows \(2, 5\) to the same shape, got \(2, 2\)"),
        ({"kind": "unstacked"}, r"'unstacked' must draw arrays with leading \[E=4\], got {'w': \(5, 2\)}"),
        ({"kind": "square", "hidden_sizes": (1, 2, 3, 1)}, r"needs an expert kind with w_out .* 'square' has none"),
    ],
)
def test_refuses(arguments, message, monkeypatch):
    for name, shape in {"narrow": (E, D, 2), "unstacked": (D, 2), "square": (E, D, D)}.items():
        kind = ExpertKind(lift(halve), lambda *_, shape=shape: {"w": jnp.zeros(shape)})
        monkeypatch.setitem(EXPERTS, name, lambda kind=kind: kind)
    with pytest.raises(ValueError, match=message):
        ExpertStack(E, D, F, key=jax.random.key(0), **arguments)


def test_a_kind_that_does_not_name_its_matmuls_is_refused_by_the_grouped_backend(monkeypatch):
    def draw(key, num_experts, width, hidden, output_scale):
        return {"shift": output_scale * jax.random.normal(key, (num_experts, width))}

    kind = ExpertKind(lift(lambda params, rows: rows + params["shift"][None]), draw)
    monkeypatch.setitem(EXPERTS, "shift", lambda: kind)
    router_key, expert_key = jax.random.split(jax.random.key(0))
    router, stack = LinearRouter(D, E, key=router_key), ExpertStack(E, D, F, kind="shift", key=expert_key)
    assert MoELayer(router, stack, num_choices=2)(jnp.ones((1, 3, D)))[0].shape == (1, 3, D)
    with pytest.raises(ValueError, match="expert kind 'shift' does not name its matmuls"):
        MoELayer(router, stack, num_choices=2, backend="grouped")
