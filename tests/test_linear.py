"""Products with weights: one row goes in parts, and gives what a matrix product gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.linear import LARGE, linear


@pytest.mark.parametrize("leading", [(1,), (1, 1), (3,), (2, 1)])
@pytest.mark.parametrize("trailing", [(5,), (2, 3)])
@pytest.mark.parametrize("width", [8, 6])  # 6 does not go into four parts
def test_linear_is_a_product_over_the_last_axis(leading, trailing, width, rng):
    x, weights = rng.normal(size=(*leading, width)), rng.normal(size=(width, *trailing))
    y = jax.jit(linear)(jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(y, np.tensordot(x, weights, 1), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_sums_of_bfloat16_in_float32(rows, rng):
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((rows, 64), (64, 3)))
    y = linear(x, weights, dtype=jnp.float32)
    assert (y.dtype, linear(x, weights).dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ weights.astype(jnp.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "num_parts"), [(1, 8, 4), (2, 8, 1), (1, LARGE // 64, 1)])
def test_one_row_with_small_weights_goes_in_parts(rows, columns, num_parts):
    x, weights = jax.ShapeDtypeStruct((rows, 16), jnp.float32), jax.ShapeDtypeStruct((16, columns), jnp.float32)
    product = str(jax.make_jaxpr(linear)(x, weights))
    assert (f"f32[{num_parts},1,{columns}]" in product) == (num_parts > 1)
