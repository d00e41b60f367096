"""Every implementation of the grouped matmul against a loop over rows, in all three passes; and how one is chosen."""

import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.ops.expansion import ExpansionWarning
from moe_jax.ops.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, load_pass, pallas
from moe_jax.ops.grouped_matmul.blocked import block_ladder
from moe_jax.ops.grouped_matmul.einsum import block_length
from moe_jax.ops.grouped_matmul.measured import TABLE, Problem, UnmeasuredWarning, choose, nearest, read_table
from moe_jax.ops.grouped_matmul.passes import PerPass, cut_into_blocks, expert_of_rows

WIDTH, HIDDEN = 5, 6
SIZES = {
    "an empty expert and nobody's rows": (37, [5, 0, 20, 7]),
    "all rows owned": (37, [1, 17, 2, 17]),
    "the first and last experts empty": (37, [0, 30, 7, 0]),
    "one expert takes all": (37, [0, 0, 37, 0]),
    "nobody's rows only": (37, [0, 0, 0, 0]),
    "one expert": (37, [30]),
}


has_tokamax = importlib.util.find_spec("tokamax") is not None


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "tokamax" or has_tokamax])
def impl(request):
    return request.param


def matmul_loop(rows, weights, group_sizes, output_grad):
    """Output and gradients of `sum(output * output_grad)`, a row at a time in float64."""
    rows, weights, output_grad = (np.asarray(x, np.float64) for x in (rows, weights, output_grad))
    output, rows_grad, weights_grad = np.zeros_like(output_grad), np.zeros_like(rows), np.zeros_like(weights)
    n = 0
    for e, size in enumerate(group_sizes):
        for _ in range(size):
            output[n] = rows[n] @ weights[e]
            rows_grad[n] = weights[e] @ output_grad[n]
            weights_grad[e] += np.outer(rows[n], output_grad[n])
            n += 1
    return output, rows_grad, weights_grad


def problem(num_rows, sizes, dtype=jnp.float32, seed=0):
    """Operands whose unowned rows are NaN, on both sides."""
    rng = np.random.default_rng(seed)
    is_owned = np.arange(num_rows)[:, None] < sum(sizes)
    rows, output_grad = (np.where(is_owned, rng.normal(size=(num_rows, w)), np.nan) for w in (WIDTH, HIDDEN))
    weights = rng.normal(size=(len(sizes), WIDTH, HIDDEN))
    return (
        *(jnp.asarray(x, dtype) for x in (rows, weights)),
        jnp.array(sizes, jnp.int32),
        jnp.asarray(output_grad, dtype),
    )


@functools.partial(jax.jit, static_argnames="impl")
def output_and_grads(rows, weights, group_sizes, output_grad, impl):
    output, vjp = jax.vjp(functools.partial(grouped_matmul, group_sizes=group_sizes, impl=impl), rows, weights)
    return output, *vjp(output_grad)


def assert_all_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def test_four_rows_by_hand(impl):
    # Expert 0 (times 10) owns rows 1 and 2, expert 1 none, expert 2 (times 1000) row 3; the row 4 is nobody's.
    rows, weights = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[[10.0]], [[100.0]], [[1000.0]]])
    output, rows_grad, weights_grad = output_and_grads(rows, weights, jnp.array([2, 0, 1]), jnp.ones((4, 1)), impl)
    np.testing.assert_array_equal(output, [[10], [20], [3000], [0]])
    np.testing.assert_array_equal(rows_grad, [[10], [10], [1000], [0]])
    np.testing.assert_array_equal(weights_grad, [[[1 + 2]], [[0]], [[3]]])


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
def test_output_and_gradients_equal_the_loop(impl, case):
    operands = problem(*case)
    assert_all_close(output_and_grads(*operands, impl), matmul_loop(*operands[:2], case[1], operands[3]))


@pytest.mark.parametrize("impl", ["blocked", "einsum"])
@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.integers(0, 4), min_size=37, max_size=37))
def test_random_sizes_equal_the_loop(impl, ids):
    sizes = np.bincount(ids, minlength=5)[:4]
    operands = problem(37, sizes)
    assert_all_close(output_and_grads(*operands, impl), matmul_loop(*operands[:2], sizes, operands[3]))


def test_bfloat16(impl):
    num_rows, sizes = SIZES["an empty expert and nobody's rows"]
    operands = problem(num_rows, sizes, jnp.bfloat16)
    actual = output_and_grads(*operands, impl)
    assert [x.dtype for x in actual] == [jnp.bfloat16] * 3
    # One rounding to 8 bits (2^-9 relative), of numbers up to about 10; sums are in float32.
    assert_all_close(actual, matmul_loop(*operands[:2], sizes, operands[3]), tolerance=0.02)


def test_many_bfloat16_rows_add_up_in_float32(impl):
    # 300 ones: in bfloat16 a sum stops growing at 256, where one is half a step.
    rows, weights, output_grad = (jnp.ones(shape, jnp.bfloat16) for shape in ((300, 1), (1, 1, 1), (300, 1)))
    _, _, weights_grad = output_and_grads(rows, weights, jnp.array([300]), output_grad, impl)
    assert weights_grad == 300


def test_gradient_equals_finite_differences():
    rows, weights, sizes, _ = problem(37, [1, 17, 2, 17])
    direction = problem(37, [1, 17, 2, 17], seed=1)[:2]

    @jax.jit
    def loss(step):
        moved = (x + step * d for x, d in zip((rows, weights), direction, strict=True))
        return jnp.sum(grouped_matmul(*moved, sizes, impl="einsum") ** 2) / 37

    slope = (loss(jnp.float32(1e-2)) - loss(jnp.float32(-1e-2))) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), slope, rtol=1e-2)


def test_population_vmap(impl):
    """Members differ in everything, sizes too."""
    sizes = [[5, 0, 20, 7], [0, 0, 37, 0], [1, 17, 2, 17]]
    members = [problem(37, s, seed=seed) for seed, s in enumerate(sizes)]
    together = jax.vmap(functools.partial(output_and_grads, impl=impl))(*map(jnp.stack, zip(*members, strict=True)))
    for i, member in enumerate(members):
        assert_all_close([x[i] for x in together], matmul_loop(*member[:2], sizes[i], member[3]))


def test_population_over_shared_weights():
    rows, weights, sizes, output_grad = (jnp.nan_to_num(x) for x in problem(37, [5, 0, 20, 7]))
    scales = jnp.array([1.0, 2.0, 3.0])

    def loss(weights):
        outputs = jax.vmap(lambda scale: grouped_matmul(scale * rows, weights, sizes, impl="blocked"))(scales)
        return jnp.sum(outputs * output_grad[None])

    expected = matmul_loop(rows, weights, sizes, output_grad)[2]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights), 6 * expected, rtol=1e-5, atol=1e-5)


def test_a_missing_tokamax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # as if it were not installed
    rows, weights, sizes, _ = problem(37, [5, 0, 20, 7])
    with pytest.raises(ImportError, match="pip install tokamax"):
        grouped_matmul(rows, weights, sizes, impl="tokamax")


def test_passes_of_different_implementations():
    operands = problem(37, [5, 0, 20, 7])
    mixed = PerPass(forward="einsum", rows_gradient="ragged_dot", weights_gradient="blocked")
    assert_all_close(output_and_grads(*operands, mixed), matmul_loop(*operands[:2], [5, 0, 20, 7], operands[3]))
    for impl, times in ((mixed, 1), (PerPass("ragged_dot", "einsum", "ragged_dot"), 2), ("einsum", 0)):
        program = str(jax.make_jaxpr(output_and_grads, static_argnums=4)(*operands, impl))
        assert program.count("ragged_dot_general[") == times


def test_empty_experts_are_not_read():
    rows, weights, sizes, _ = problem(37, [5, 0, 32, 0])
    poisoned = weights.at[jnp.array([1, 3])].set(jnp.nan)
    for impl in ("blocked", "einsum", "pallas"):
        assert np.isfinite(grouped_matmul(rows, poisoned, sizes, impl=impl)).all()


@pytest.mark.parametrize("shapes", [((0, 5), (4, 5, 6)), ((3, 0), (4, 0, 6)), ((3, 5), (4, 5, 0)), ((3, 5), (0, 5, 6))])
def test_nothing_to_multiply(shapes):
    rows, weights = map(jnp.ones, shapes)
    loss = lambda rows, weights: jnp.sum(grouped_matmul(rows, weights, jnp.zeros(shapes[1][0], jnp.int32)))  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(rows, weights)
    assert value == 0
    assert [g.shape for g in grads] == list(shapes)


def test_owners_of_rows():
    # sizes 2 0 3, then two rows of nobody (expert 3 of 3)
    np.testing.assert_array_equal(expert_of_rows(jnp.array([2, 0, 3]), 7), [0, 0, 2, 2, 2, 3, 3])


def test_blocks_of_two_rows():
    # Sizes 3 0 2 of 6 rows in blocks of 2: expert 0 in rows 0-1 and 2, expert 2 in 3-4; (6 + 3 * 1) // 2 = 4 blocks,
    # one of them surplus. Laid end to end the rows stand at 0 1 | 2 . | 3 4, slots 0 1 2 4 5, and nobody's row 5 at 8.
    blocks = cut_into_blocks(jnp.array([3, 0, 2]), 6, 2)
    np.testing.assert_array_equal(blocks.expert[:3], [0, 0, 2])
    np.testing.assert_array_equal(blocks.begin[:3], [0, 2, 3])
    np.testing.assert_array_equal(blocks.end[:3], [3, 3, 5])
    assert blocks.begin[3] == blocks.end[3]
    np.testing.assert_array_equal(blocks.row_slots, [0, 1, 2, 4, 5, 8])


def test_block_lengths():
    assert block_ladder(32768, 64) == (512, 128)  # mean load 512
    assert block_ladder(2, 64) == (32, 8)
    assert block_length(32768, 64) == 256  # half of 512
    assert block_length(100, 8) == 4  # half of 12.5, down to a power of two
    assert block_length(2, 64) == 1


@pytest.mark.parametrize("sizes", [[0, 130, 3, 0, 150, 0], [300, 0, 0, 0, 0, 0]])
def test_pallas_with_many_tiles(sizes):
    """Several blocks an expert, bands of blocks that are not full, widths that the tiles do not divide."""
    rng = np.random.default_rng(0)
    rows, weights, output_grad = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((300, 40), (6, 40, 72), (300, 72))
    )
    group_sizes = jnp.array(sizes)
    tiles = pallas.Tiles(rows=16, columns=16, contracted_bytes=64)
    run = functools.partial(jax.jit, static_argnames=("dtype", "tiles"))
    common = {"group_sizes": group_sizes, "dtype": jnp.float32, "tiles": tiles}
    actual = (
        run(pallas.forward)(rows, weights, **common),
        run(pallas.rows_gradient)(output_grad, weights, **common),
        run(pallas.weights_gradient)(rows, output_grad, **common),
    )
    assert_all_close(actual, matmul_loop(rows, weights, sizes, output_grad), tolerance=1e-4)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="from JAX 0.11 on, lowering Triton needs the CUDA plugin")
@pytest.mark.parametrize("which", PerPass._fields)
def test_pallas_lowers_to_triton(which):
    rows, weights, output_grad = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 768), (64, 768, 512), (4096, 512))
    )
    operands = {
        "forward": (rows, weights),
        "rows_gradient": (output_grad, weights),
        "weights_gradient": (rows, output_grad),
    }[which]
    function = functools.partial(load_pass("pallas", which), dtype=jnp.bfloat16, interpret=False)
    traced = jax.jit(function).trace(*operands, jax.ShapeDtypeStruct((64,), jnp.int32))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


ROWS = [
    {"device": "cpu", "dtype": "float32", "N": 8192, "E": 8, "D": 256, "F": 1024} | PerPass("a", "b", "c")._asdict(),
    {"device": "cpu", "dtype": "float32", "N": 128, "E": 64, "D": 256, "F": 256} | PerPass("d", "e", "f")._asdict(),
]


def test_the_nearest_measured_row():
    assert nearest(ROWS, Problem("cpu", "float32", 4096, 16, 256, 1024)) == ("a", "b", "c")
    assert nearest(ROWS, Problem("cpu", "float32", 64, 64, 512, 256)) == ("d", "e", "f")
    assert nearest(ROWS, Problem("cpu", "bfloat16", 64, 64, 512, 256)) is None
    assert nearest(ROWS, Problem("NVIDIA H200", "float32", 64, 64, 512, 256)) is None


def test_an_unmeasured_device_takes_the_default_and_says_so_once():
    stranger = Problem("a device of this test", "float32", 64, 4, 16, 16)
    with pytest.warns(UnmeasuredWarning, match="never measured on 'a device of this test'.*'einsum'.*bench_grouped"):
        assert choose(stranger, "gpu", ROWS) == ("einsum", "einsum", "einsum")
    assert choose(stranger._replace(N=128), "gpu", ROWS) == ("einsum", "einsum", "einsum")  # warnings are errors here


def test_a_ragged_dot_that_is_dense_is_not_chosen():
    """Each pass is compiled alone, on this CPU, where it is dense."""
    asked = {"device": "cpu", "dtype": "float32", "N": 64, "E": 4, "D": 16, "F": 8}
    table = [asked | PerPass("ragged_dot", "blocked", "ragged_dot")._asdict()]
    with pytest.warns(ExpansionWarning, match="4.* times the ideal"):
        chosen = choose(Problem(**asked), "cpu", table)
    assert chosen == ("einsum", "blocked", "einsum")


def test_the_table_of_the_package():
    rows = read_table()
    assert {(row["device"], row["dtype"]) for row in rows} >= {("cpu", "float32"), ("cpu", "bfloat16")}
    for row in rows:
        assert {row[which] for which in PerPass._fields} <= IMPLEMENTATIONS.keys()
        assert row["device"] in json.loads(TABLE.read_text())["measured_with"]


def test_without_a_name_the_measured_implementation_runs():
    operands = problem(37, [5, 0, 20, 7])
    assert_all_close(output_and_grads(*operands, None), matmul_loop(*operands[:2], [5, 0, 20, 7], operands[3]))


def test_bad_input():
    rows, weights, sizes = jnp.ones((3, 5)), jnp.ones((4, 5, 6)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"expected rows \[N, D\].*got \(3, 5\), \(4, 6, 5\) and \(4,\)"):
        grouped_matmul(rows, weights.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match=r"group_sizes \[E\], got .* and \(5,\)"):
        grouped_matmul(rows, weights, jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="share a floating dtype, got float32 and bfloat16"):
        grouped_matmul(rows, weights.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="must be integers, got float32"):
        grouped_matmul(rows, weights, jnp.zeros(4))
    with pytest.raises(ValueError, match="unknown grouped matmul 'dense'; known: blocked, einsum"):
        grouped_matmul(rows, weights, sizes, impl="dense")
