"""Noise by position: the bits of `jax.random`, in parts and on meshes as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxopt_lab.core.counter_noise import bits, normals, signs

KEYS = jax.random.split(jax.random.key(3), 3)
SHAPES = ((), (5,), (7, 33), (2, 3, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_jax_random(shape):
    wanted = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(KEYS)
    np.testing.assert_array_equal(bits(KEYS, shape), wanted)
    np.testing.assert_array_equal(bits(KEYS[1], shape), wanted[1])


def test_normals_are_those_of_jax_random_within_two_ulp():
    ours = np.asarray(normals(KEYS[0], (100_000,)))
    theirs = np.asarray(jax.random.normal(KEYS[0], (100_000,)))
    assert (np.abs(ours - theirs) <= 2 * np.spacing(np.abs(theirs))).all()
    assert ours.dtype == np.float32
    with jax.enable_x64(True):
        wide = np.asarray(normals(KEYS[0], (100_000,), "float64"))
    np.testing.assert_allclose(wide, theirs, rtol=1e-5, atol=1e-6)
    assert wide.dtype == np.float64


def test_signs_are_the_bits_of_words_in_order():
    drawn = np.asarray(signs(KEYS, (2, 70)))
    words = np.asarray(bits(KEYS, (2, 3)))
    for column in (0, 1, 31, 32, 69):
        bit = words[..., column // 32] >> (column % 32) & 1
        np.testing.assert_array_equal(drawn[..., column], 1 - 2 * bit.astype(int))
    assert signs(KEYS, ()).shape == (3,) and abs(signs(KEYS[0], (10_000,)).mean()) < 0.04


def test_a_part_is_cut_from_the_whole():
    whole = bits(KEYS, (6, 10))
    part = jax.jit(lambda i: bits(KEYS, (2, 5), offset=(i, 5), within=(6, 10)))(3)
    np.testing.assert_array_equal(part, whole[:, 3:5, 5:])


def test_signs_of_some_columns_are_cut_from_the_whole():
    whole = signs(KEYS, (2, 100))
    part = jax.jit(lambda i: signs(KEYS, (2, 40), offset=(0, i), within=(2, 100)))(32)
    np.testing.assert_array_equal(part, whole[..., 32:72])
    last = signs(KEYS, (1, 4), offset=(1, 96), within=(2, 100))
    np.testing.assert_array_equal(last, whole[:, 1:, 96:])


def test_devices_of_a_mesh_draw_their_own_parts():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def local(data):
        key = jax.random.wrap_key_data(data)
        start = jax.lax.axis_index("rows") * 2
        return normals(key, (2, 4), offset=(start, 0), within=(16, 4))

    spread = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("rows"), check_vma=False)
    drawn = jax.jit(spread)(jax.random.key_data(KEYS[0]))
    np.testing.assert_array_equal(drawn, normals(KEYS[0], (16, 4)))


def test_more_entries_than_one_key_has_are_refused():
    with pytest.raises(ValueError, match="more than 2\\^32 entries"):
        jax.eval_shape(lambda: bits(KEYS[0], (2**17, 2**16)))
