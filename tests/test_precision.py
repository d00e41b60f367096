"""bfloat16 with float32 master weights and router, and products in int8 and float8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.experts import get_expert_kind
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.ops.linear import linear
from moe_jax.ops.low_precision import TYPES, check_precision
from tests.test_mesh_training import batch, setup

WIDTH, EXPERTS = 16, 5
CONFIG = DecoderConfig(
    vocab_size=40, width=WIDTH, layers=("moe",), num_heads=2, num_kv_heads=1, num_experts=EXPERTS, expert_hidden=8
)


def dots(jaxpr):
    """Operands' and result's shape and dtype of every matrix product, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [(variable.aval.shape, variable.aval.dtype) for variable in (*equation.invars, *equation.outvars)]
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)


def test_bfloat16_has_float32_masters_and_a_float32_router():
    _, state, step = setup(config=dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    rows = batch(0)
    products = list(dots(jax.make_jaxpr(step)(state, rows.tokens, rows.mask, None).jaxpr))
    # The router's have its kernel, or the kernel's gradient: the logits, and the gradients of kernel and input.
    of_router = [p for p in products if any(shape in ((WIDTH, EXPERTS), (EXPERTS, WIDTH)) for shape, _ in p)]
    assert len(of_router) == 3
    assert {dtype for product in of_router for _, dtype in product} == {jnp.dtype("float32")}
    assert any(dtype == jnp.bfloat16 for product in products for _, dtype in product)
    after, metrics = jax.jit(step)(state, rows.tokens, rows.mask, None)
    floating = [leaf for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype("float32")}
    assert {value.dtype for value in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("precision", TYPES)
def test_factors_are_rounded_and_no_more(precision, rng):
    """Each factor moves by at most half a step, of its row's or column's grid or of its own 3 mantissa bits."""
    x, weights = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32)

    def half_step(values, axis):
        largest = np.abs(values).max(axis, keepdims=True)
        if precision == "int8":
            return np.broadcast_to(0.5 * largest / 127.5, values.shape)
        return np.maximum(np.abs(values) * 2**-4, 2**-10 * largest / 448)  # below 2^-6 the grid is even, 2^-9 wide

    moved_x, moved_weights = half_step(x, 1), half_step(weights, 0)
    bound = moved_x @ np.abs(weights) + np.abs(x) @ moved_weights + moved_x @ moved_weights
    y = jax.jit(lambda x, w: linear(x, w, precision=precision))(x, weights)
    error = np.abs(y - x @ weights)
    assert np.all(error < bound + 1e-5) and np.median(error / bound) > 0.01


@pytest.mark.parametrize("precision", TYPES)
def test_products_are_of_that_type_and_gradients_are_not(precision, rng):
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 8), (8, 5)))

    def loss(x, weights):
        return jnp.sum(jnp.square(linear(x, weights, precision=precision)))

    types = [
        [dtype for _, dtype in product] for product in dots(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights).jaxpr)
    ]
    low = jnp.dtype(TYPES[precision])
    assert [low, low] in [product[:2] for product in types] and types.count([jnp.dtype("float32")] * 3) == 2
    y = linear(x, weights, precision=precision)
    expected = (2 * y @ weights.T, x.T @ (2 * y))  # as if rounding were not there
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.grad(loss, (0, 1))(x, weights), expected)


@pytest.mark.parametrize("precision", TYPES)
def test_a_model_in_low_precision_learns_and_its_router_is_float32(precision):
    low = {"expert_settings": {"precision": precision}, "attention_settings": {"precision": precision}}
    config = dataclasses.replace(CONFIG, **low)
    _, state, step = setup(config=config)
    rows = batch(0)
    products = list(dots(jax.make_jaxpr(step)(state, rows.tokens, rows.mask, None).jaxpr))
    low_products = [p for p in products if p[0][1] == p[1][1] == TYPES[precision]]
    # Two projections of attention and two matrices of the experts. Neither router nor read-out: D by E and D by V.
    assert len(low_products) >= 4
    assert not any(shape in ((WIDTH, EXPERTS), (WIDTH, 40)) for p in low_products for shape, _ in p)
    step, losses = jax.jit(step), []
    for _ in range(40):
        state, metrics = step(state, rows.tokens, rows.mask, None)
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.9 * losses[0]


def test_what_low_precision_cannot_do_is_refused():
    with pytest.raises(ValueError, match="unknown precision 'int4'; known: full, int8, float8"):
        check_precision("int4")
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        get_expert_kind("swiglu", precision="fp8")
    key = jax.random.key(0)
    stack = ExpertStack(2, 4, 4, settings={"precision": "int8"}, key=key)
    with pytest.raises(ValueError, match="does not name its matmuls"):
        MoELayer(LinearRouter(4, 2, key=key), stack, num_choices=1, backend="grouped")
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        Decoder(dataclasses.replace(CONFIG, attention_settings={"precision": "fp8"}), key=key)
