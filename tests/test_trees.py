import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.trees import all_finite, count_parameters, cut


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


def test_a_cut_of_one_device_is_a_view_and_of_several_a_copy():
    array = jnp.arange(96.0).reshape(3, 2, 16)
    part, run = cut(array, 1), cut(array, slice(1, 3))
    assert part.unsafe_buffer_pointer() == run.unsafe_buffer_pointer() == array.unsafe_buffer_pointer() + part.nbytes
    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x")))
    for index in (1, slice(1, 3)):
        expected = np.asarray(array)[index]
        for whole in (array, spread, array.astype(jnp.bfloat16)):
            np.testing.assert_array_equal(cut(whole, index), expected)
    kept = cut(jnp.arange(64.0).reshape(2, 32), 1)  # of an array that nothing else holds
    np.testing.assert_array_equal(kept, np.arange(32, 64))
