"""The dense-expansion guard: what it catches, what it passes, and what it does not claim to know."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.ops.expansion import ExpansionWarning, check_expansion, compiled_flops
from moe_jax.ops.grouped_matmul import load_pass

N, E, D, F = 512, 8, 64, 32
IDEAL = 2 * N * D * F
ROWS, OUTPUT_GRAD = (jax.ShapeDtypeStruct((N, width), jnp.float32) for width in (D, F))
WEIGHTS, SIZES = jax.ShapeDtypeStruct((E, D, F), jnp.float32), jax.ShapeDtypeStruct((E,), jnp.int32)
OPERANDS = {
    "forward": (ROWS, WEIGHTS, SIZES),
    "rows_gradient": (OUTPUT_GRAD, WEIGHTS, SIZES),
    "weights_gradient": (ROWS, OUTPUT_GRAD, SIZES),
}


def test_flops_of_a_matmul():
    assert compiled_flops(jnp.matmul, jnp.ones((16, 32)), jnp.ones((32, 8))) == pytest.approx(2 * 16 * 32 * 8, rel=0.01)


def test_a_dense_ragged_dot_is_caught():
    with pytest.warns(ExpansionWarning, match=r"8\.\d times the ideal.*impl="):
        report = check_expansion(jax.lax.ragged_dot, *OPERANDS["forward"], ideal_flops=IDEAL)
    assert report.verdict == "expanded"
    assert report.ratio == pytest.approx(E, rel=0.1)
    assert report.compiled_flops == report.ratio * IDEAL


@pytest.mark.parametrize("which", OPERANDS)
def test_every_pass_of_ragged_dot_is_caught(which):
    function = functools.partial(load_pass("ragged_dot", which), dtype=jnp.float32)
    with pytest.warns(ExpansionWarning):
        assert check_expansion(function, *OPERANDS[which], ideal_flops=IDEAL).verdict == "expanded"


@pytest.mark.parametrize("which", OPERANDS)
def test_the_einsum_passes(which):
    function = functools.partial(load_pass("einsum", which), dtype=jnp.float32)
    report = check_expansion(function, *OPERANDS[which], ideal_flops=IDEAL)
    assert report.verdict == "within"
    assert 1 < report.ratio < 1.6  # half a block of padding an expert, and some elementwise work


def test_a_loop_is_not_passed_silently():
    """XLA counts the body once; nothing is proven, and nothing is warned of."""
    function = functools.partial(load_pass("blocked", "forward"), dtype=jnp.float32)
    assert check_expansion(function, *OPERANDS["forward"], ideal_flops=IDEAL).verdict == "unknown"
    # Even where the count looks right: ten matmuls in a loop count as one.
    matmuls = lambda x: jax.lax.fori_loop(0, 10, lambda i, x: x @ x, x)  # noqa: E731
    report = check_expansion(matmuls, jnp.ones((32, 32)), ideal_flops=2 * 32**3)
    assert report.ratio == pytest.approx(1, rel=0.1)
    assert report.verdict == "unknown"


def test_a_loop_may_still_be_caught():
    ragged = lambda x, w, sizes: jax.lax.fori_loop(0, 10, lambda i, x: jax.lax.ragged_dot(x, w, sizes), x)  # noqa: E731
    operands = jnp.ones((64, 16)), jnp.ones((8, 16, 16)), jnp.full(8, 8)
    with pytest.warns(ExpansionWarning):
        assert check_expansion(ragged, *operands, ideal_flops=2 * 64 * 16 * 16).verdict == "expanded"


def test_less_than_the_ideal_is_unknown():
    report = check_expansion(jnp.matmul, jnp.ones((16, 32)), jnp.ones((32, 8)), ideal_flops=1e9)
    assert report.verdict == "unknown"


def test_the_tolerance_decides():
    arguments = (jnp.ones((16, 32)), jnp.ones((32, 8)))
    ideal = 2 * 16 * 32 * 8 / 3
    assert check_expansion(jnp.matmul, *arguments, ideal_flops=ideal, tolerance=3.1).verdict == "within"
    with pytest.warns(ExpansionWarning, match=r"3\.0 times"):
        check_expansion(jnp.matmul, *arguments, ideal_flops=ideal, tolerance=2.9)


@pytest.mark.parametrize(
    "bad", [{"ideal_flops": 0}, {"ideal_flops": float("nan")}, {"ideal_flops": 1, "tolerance": 0.5}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="ideal_flops must be positive and tolerance at least 1"):
        check_expansion(jnp.sin, jnp.ones(3), **bad)
