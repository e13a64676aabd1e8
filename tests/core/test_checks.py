"""What arguments are turned into, and what is refused of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core import checks


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.array(0.5, jnp.bfloat16), 0.5),
        (np.array(0.5, jnp.bfloat16)[()], 0.5),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
    ],
)
def test_numbers_of_numpy_become_those_of_python(given, plain):
    found = checks.plain_number(given)
    assert found == plain and type(found) is type(plain)


def test_everything_else_stays():
    for value in (0.5, 3, True, None, "kron", np.ones(2), jnp.ones(()), np.str_("kron")):
        assert checks.plain_number(value) is value


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        (checks.DECAY, (0, 0.999, np.float32(0.5)), (1, -0.1, np.float32(1.5), np.int64(-1))),
        (checks.NOT_NEGATIVE, (0, 3), (-1, np.inf, np.nan, np.float32(-1), "3", None, True)),
        (checks.POSITIVE, (1e-30,), (0, -1, np.float64(0), jnp.ones(3), np.ones(1), [1])),
        (checks.COUNT, (1, 2.0, np.int64(3)), (0, 1.5, np.inf, np.int64(0), False)),
    ],
)
def test_numbers_have_bounds(wanted, good, bad):
    for value in good:
        checks.check_number("x", value, wanted)
    for value in bad:
        with pytest.raises(ValueError, match=r"^x: got .*, wanted ") as error:
            checks.check_number("x", value, wanted)
        assert str(error.value).endswith(wanted.text)


def test_of_arrays_of_jax_only_the_shape_is_known():
    checks.check_number("x", jnp.float32(-1), checks.DECAY)
    jax.jit(lambda x: checks.check_number("x", x, checks.DECAY))(0.5)
    with pytest.raises(ValueError, match="x: got"):
        jax.jit(lambda x: checks.check_number("x", x, checks.DECAY))(jnp.ones(2))


def test_a_decay_of_few_bits_is_no_secret():
    checks.check_decays(b2=jnp.float32(0.999))
    with pytest.warns(UserWarning, match="b2 is rounded to bfloat16.*hyperparam_dtype=jnp.float32"):
        checks.check_decays(b2=jnp.bfloat16(0.99))
    with pytest.raises(ValueError, match="b2 is rounded to bfloat16.*hyperparam_dtype=jnp.float32"):
        checks.check_decays(b2=jnp.bfloat16(0.999))


@pytest.mark.parametrize("name", ["float8_e4m3fn", jnp.float8_e5m2, "int32", "half-ish", 3.0])
def test_dtypes_are_floats_of_16_bits_or_more(name):
    for dtype in (None, "bfloat16", jnp.float16, np.float32, np.dtype("float64")):
        checks.check_dtype("mu_dtype", dtype)
    with pytest.raises(ValueError, match="^mu_dtype: got .*, wanted None or one of bfloat16, "):
        checks.check_dtype("mu_dtype", name)
