import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.matrices import (
    batch_first,
    batch_first_spec,
    resolve_layout,
    undo_batch_first,
)
from jaxopt_lab.core.stacks import map_matrices


@st.composite
def leaves_with_layout(draw):
    ndim = draw(st.integers(2, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    order = draw(st.permutations(range(ndim)))
    rows = draw(st.integers(1, ndim - 1))
    columns = draw(st.integers(1, ndim - rows))
    signs = draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim))
    named = [a - ndim if negative else a for a, negative in zip(order, signs, strict=True)]
    layout = MuonDimensionNumbers(tuple(named[:rows]), tuple(named[rows : rows + columns]))
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), layout


@given(leaves_with_layout())
def test_view_has_the_matrices_and_goes_back(case):
    x, layout = case
    axes = resolve_layout(x.shape, layout)
    view = batch_first(jnp.asarray(x), axes)
    b, m, n = axes.matrix_shape(x.shape)
    assert view.size == b * m * n and view.shape[0] == b
    np.testing.assert_array_equal(undo_batch_first(view, x.shape, axes), x)
    # The same matrices by the definition: transpose, then merge each of the three groups.
    order = axes.batch + axes.reduction + axes.output
    expected = x.transpose(order).reshape(b, m, n)
    np.testing.assert_array_equal(np.asarray(view).reshape(b, m, n), expected)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (MuonDimensionNumbers(0, 3), "outside"),
        (MuonDimensionNumbers(0, 0), "each axis once"),
        (MuonDimensionNumbers((), 1), "at least one"),
        (MuonDimensionNumbers(-1, (0, 2)), "each axis once"),
    ],
)
def test_layouts_that_do_not_fit_are_named(layout, message):
    with pytest.raises(ValueError, match=message):
        resolve_layout((2, 3, 4), layout)


def test_spec_of_the_view_follows_the_axes():
    axes = resolve_layout((4, 8, 3, 6), MuonDimensionNumbers(1, 3))
    assert batch_first_spec(P(None, "fsdp", None, "tensor"), axes) == P(None, "fsdp", "tensor")
    assert batch_first_spec(P("layers"), axes) == P("layers", None, None)
    with pytest.raises(ValueError, match="first batch axis"):
        batch_first_spec(P(None, None, "fsdp"), axes)


def test_equal_shapes_are_worked_on_together():
    stacks = []

    def work(x):
        stacks.append(x.shape)
        return (2 * x,)

    leaves = [jnp.ones((3, 4, 6)), jnp.ones((4, 6)), jnp.ones((6, 4)), jnp.ones((5, 5))]
    layouts = [MuonDimensionNumbers(1, 2)] + [MuonDimensionNumbers(0, 1)] * 3
    axes = [resolve_layout(x.shape, a) for x, a in zip(leaves, layouts, strict=True)]
    (out,) = map_matrices(work, [leaves], axes, [None] * 4, transposable=True)
    assert sorted(stacks) == [(1, 5, 5), (5, 4, 6)]
    chex.assert_trees_all_equal(out, [2 * x for x in leaves])
    stacks.clear()
    map_matrices(work, [leaves], axes, [None] * 4)
    assert sorted(stacks) == [(1, 5, 5), (1, 6, 4), (4, 4, 6)]


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_stacked_work_equals_work_on_each_leaf(seed, copies):
    keys = jax.random.split(jax.random.key(seed), copies)
    leaves = [jax.random.normal(k, (2, 3, 4)) for k in keys]
    axes = [resolve_layout((2, 3, 4), MuonDimensionNumbers(1, 2))] * copies

    def work(x, v):
        return x * jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), (x @ v[..., None]).sum((1, 2))

    vectors = [jnp.ones((2, 4))] * copies
    out, sums = map_matrices(work, [leaves], axes, [None] * copies, vectors=[vectors], numbers=1)
    for x, y, s in zip(leaves, out, sums, strict=True):
        expected_y, expected_s = work(x, jnp.ones((2, 4)))
        chex.assert_trees_all_close((y, s), (expected_y, expected_s), rtol=1e-5, atol=1e-5)
