import jax
import jax.numpy as jnp
import pytest

from moe_jax.trees import all_finite, count_parameters


def test_count_parameters_reads_shapes_only():
    # 2*3 + 4 + 1 = 11
    tree = {"a": jnp.zeros((2, 3)), "b": [jax.ShapeDtypeStruct((4,), jnp.bfloat16), jnp.float32(1)]}
    assert count_parameters(tree) == 11
    assert count_parameters({}) == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_finite_sees_one_bad_number_anywhere(bad, dtype):
    tree = {"a": jnp.zeros((2, 3), dtype), "ids": jnp.arange(3)}
    assert all_finite(tree)
    assert not jax.jit(all_finite)(tree | {"a": tree["a"].at[1, 2].set(bad)})


def test_all_finite_of_trees_without_floats():
    assert all_finite({})
    assert all_finite({"ids": jnp.arange(3), "mask": jnp.array([True])})


def test_all_finite_per_member_of_a_population():
    population = {"w": jnp.array([[1.0, 2.0], [1.0, jnp.nan], [jnp.inf, 0.0]])}
    assert jax.vmap(all_finite)(population).tolist() == [True, False, False]
