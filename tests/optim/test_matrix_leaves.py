"""The layout of a leaf: its view as matrices, what belongs to its sides, and shared stacks."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.matrices import resolve_layout
from jaxopt_lab.core.ordering import refreshed_share
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves

STACK = MuonDimensionNumbers(1, 2)


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
    x, given_layout = case
    axes = resolve_layout(x.shape, given_layout)
    layout = LeafLayout(x, axes)
    # The matrices by the definition: transpose, then merge each of the three groups.
    order = axes.batch + axes.reduction + axes.output
    expected = x.transpose(order).reshape(axes.matrix_shape(x.shape))
    view = layout.view(jnp.asarray(x))
    np.testing.assert_array_equal(view, expected)
    np.testing.assert_array_equal(layout.undo_view(view), x)
    sums = layout.per_matrix(view.sum((1, 2)))
    np.testing.assert_array_equal(sums, x.sum(layout.inner_axes, keepdims=True))


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


def test_slots_follow_the_axes_of_the_leaf():
    mesh = jax.make_mesh((2, 2, 2), ("layers", "fsdp", "tensor"))

    def on_mesh(*spec):
        x = jax.ShapeDtypeStruct((4, 8, 3, 6), "bfloat16")
        axes = resolve_layout(x.shape, MuonDimensionNumbers(1, 3))
        return LeafLayout(x, axes, NamedSharding(mesh, P(*spec)))

    layout = on_mesh(None, "fsdp", None, "tensor")
    assert layout.matrix.spec == P(None, "fsdp", "tensor") and layout.whole_axes == ()
    slots = layout.slots()
    assert slots["factor.0"] == slots["old_basis.0"]
    assert (slots["factor.0"].inner, slots["factor.0"].spec) == ((8, 8), P(None, "fsdp", "tensor"))
    assert slots["order.1"].inner == (6,), "(3, 2) would not divide by both"
    assert slots["order.0"].inner == (4, 2) and slots["nu.1"].spec == P(None, "fsdp")
    assert layout.block(7, 8).spec == P(None, None, "tensor"), "7 rows do not divide by two"
    assert on_mesh("layers").matrix.spec == P("layers", None, None)
    assert on_mesh("layers").number().spec == P("layers")
    with pytest.raises(ValueError, match="first batch axis"):
        on_mesh(None, None, "fsdp")


def test_state_trees_go_to_stacks_and_back():
    params = {"w": jnp.zeros((2, 3, 4), "bfloat16"), "x": jnp.zeros((5, 3, 4), "bfloat16")}
    leaves = MatrixLeaves.of(params, {"w": STACK, "x": MuonDimensionNumbers(2, 0)})
    rng = np.random.default_rng(0)

    def normal(*shapes):
        return dict(zip("wx", (rng.normal(size=s).astype("f") for s in shapes), strict=True))

    trees = {
        "grad": normal((2, 3, 4), (5, 3, 4)),
        "factor.0": normal((2, 3, 3), (3, 4, 4)) | {"x": optax.MaskedNode()},
        "nu.0": optax.MaskedNode(),
    }
    arrays = leaves.stacked(trees)
    assert [x.shape for x in arrays["grad"]] == [(2, 3, 4), (3, 4, 5)]
    assert arrays["factor.0"][1] is None and arrays["nu.0"] == [None, None]
    chex.assert_trees_all_equal(leaves.unstacked(arrays, trees), trees)


def test_equal_shapes_are_worked_on_together():
    stacks = []

    def work(x):
        stacks.append(x.shape)
        return 2 * x

    tree = [jnp.ones((3, 4, 6)), jnp.ones((4, 6)), jnp.ones((6, 4)), jnp.ones((5, 5))]
    leaves = MatrixLeaves.of(tree, [STACK] + [MuonDimensionNumbers()] * 3)
    (out,) = leaves.map_whole(work, [tree], transposable=True)
    assert sorted(stacks) == [(1, 5, 5), (5, 4, 6)]
    chex.assert_trees_all_equal(out, [2 * x for x in tree])
    stacks.clear()
    leaves.map_whole(work, [tree])
    assert sorted(stacks) == [(1, 5, 5), (1, 6, 4), (4, 4, 6)]


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_stacked_work_equals_work_on_each_leaf(seed, copies):
    keys = jax.random.split(jax.random.key(seed), copies)
    tree = [jax.random.normal(k, (2, 3, 4)) for k in keys]
    leaves = MatrixLeaves.of(tree, STACK)

    def work(x, v):
        return x * jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), (x @ v[..., None]).sum((1, 2))

    vectors = [jnp.ones((2, 4))] * copies
    out, sums = leaves.map_whole(work, [tree], vectors=[vectors], numbers=1)
    for x, y, s in zip(tree, out, sums, strict=True):
        expected_y, expected_s = work(x, jnp.ones((2, 4)))
        chex.assert_trees_all_close((y, s), (expected_y, expected_s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 7])
def test_shares_of_a_stack_are_renewed_in_turn(batch):
    """Also where there are more shares than entries, and where the last one is short."""
    renewed = []
    for turn in range(5):
        old = (jnp.zeros((batch, 2)), None)
        new, _ = refreshed_share(lambda x, _: (x + 1, None), old, jnp.int32(turn), 5)
        assert (new[:, 0] == new[:, 1]).all()
        renewed.append(np.flatnonzero(new[:, 0]).tolist())
    assert sum(renewed, []) == list(range(batch))
    assert max(map(len, renewed)) == -(-batch // 5)
