"""Directions: the key rule, slices and rows of them, and what each sampler promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.core.counter_noise import normals
from jaxopt_lab.core.keys import leaf_key
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from tests.zeroth_order.problems import AXES, KEY, entries, tree

SAMPLERS = {
    "gaussian": zo.gaussian(),
    "signs": zo.signs(),
    "sphere": zo.sphere(),
    "orthogonal": zo.orthogonal(),
    "blocks": zo.blocks(rows_ratio=0.5, cols_ratio=0.5),
    "signed blocks": zo.blocks(rows_ratio=0.5, cols_ratio=0.5, random_signs=True),
    "single_coordinate": zo.single_coordinate(),
    "sparse": zo.sparse(params_ratio=0.5),
    "low_rank": zo.low_rank(rank=2),
}
NAMES = sorted(AXES)


def direction(sampler, probe=0, params=None, **options):
    params = tree() if params is None else params
    axes = {name: AXES[name] for name in params}
    return Direction(sampler, KEY, probe, leaves_of(params, axes), **options)


def drawn(sampler, probe=0, **options):
    found = direction(sampler, probe, **options)
    return {name: np.asarray(found.of(i)) for i, name in enumerate(NAMES)}


def test_keys_are_those_of_the_rule():
    z = drawn(zo.gaussian(), probe=2)
    probe = jax.random.fold_in(KEY, 2)

    def leaf(name, *numbers):
        key = leaf_key(probe, (DictKey(name),))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    np.testing.assert_array_equal(z["bias"], normals(leaf("bias"), (5,)))
    # Layer, then query, key or value; a row of an embedding.
    np.testing.assert_array_equal(z["attention"][1, :, 2], normals(leaf("attention", 1, 2), (6, 4)))
    np.testing.assert_array_equal(z["embedding"][3], normals(leaf("embedding", 3), (3,)))
    np.testing.assert_array_equal(z["scale"], normals(leaf("scale"), ()))


def test_what_a_leaf_draws_does_not_depend_on_the_others():
    params = tree()
    alone = direction(zo.gaussian(), params={"kernel": params["kernel"]})
    np.testing.assert_array_equal(alone.of(0), drawn(zo.gaussian())["kernel"])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("with_mean", [False, True], ids=["noise", "policy"])
def test_slices_and_rows_are_parts_of_the_whole(name, with_mean):
    mean = list(tree(seed=5).values()) if with_mean else None
    found = direction(SAMPLERS[name], mean=mean, std=0.5)
    whole = [np.asarray(found.of(i)) for i in range(len(NAMES))]
    # Compiled alone, a product and a sum may be one rounding; a batch is orthogonalised otherwise.
    exact = not with_mean and name not in ("sphere", "orthogonal", "low_rank")
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 3e-7, "atol": 3e-7}
    if name in ("orthogonal", "low_rank"):
        close = {"rtol": 1e-5, "atol": 1e-6}
    one = jax.jit(lambda layer: found.slice("attention", layer, 2))(1)
    np.testing.assert_allclose(one, whole[0][1, :, 2], **close)
    np.testing.assert_allclose(found.slice("kernel", 1), whole[3][1], **close)
    np.testing.assert_allclose(found.slice("bias"), whole[1], **close)
    rows = jnp.array([4, 0, 6])
    np.testing.assert_allclose(found.rows("embedding", rows), whole[2][rows], **close)
    # A layer in the shape of its leaf: query, key and value are a batch axis in the middle.
    layer = jax.jit(lambda layer: found.layer("attention", layer))(1)
    np.testing.assert_allclose(layer, whole[0][1], **close)
    np.testing.assert_allclose(found.layer("kernel", 0), whole[3][0], **close)
    np.testing.assert_allclose(found.layer("bias", 3), whole[1][3], **close)


@pytest.mark.parametrize("name", SAMPLERS)
def test_columns_of_a_head_are_parts_of_the_whole(name):
    params = {"head": jnp.zeros((4, 70)), "kernel": jnp.zeros((2, 4, 6))}
    leaves = leaves_of(params, {"head": None, "kernel": AXES["kernel"]})
    mean = [jax.random.normal(KEY, x.shape) for x in params.values()]
    found = Direction(SAMPLERS[name], KEY, 0, leaves, mean=mean, std=0.5)
    whole = np.asarray(found.of(0))
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "orthogonal" else {"rtol": 3e-7, "atol": 3e-7}
    columns = jax.jit(lambda start: found.columns("head", start, 32))(32)
    np.testing.assert_allclose(columns, whole[:, 32:64], **close)
    np.testing.assert_allclose(found.columns("head", 64, 6), whole[:, 64:], **close)


def test_a_part_is_asked_for_by_a_name_that_exists():
    with pytest.raises(ValueError, match="no leaf 'kernels'; there are attention, bias"):
        direction(zo.gaussian()).slice("kernels", 0)
    with pytest.raises(ValueError, match="leaf kernel: its rows have no keys"):
        direction(zo.gaussian()).rows("kernel", jnp.array([0]))
    with pytest.raises(ValueError, match="leaf kernel: its rows have no keys"):
        direction(zo.gaussian()).columns("kernel", 0, 32)


@pytest.mark.parametrize("name", ["gaussian", "signs", "sphere"])
def test_unit_variance(name):
    draw = jax.jit(jax.vmap(lambda i: direction(SAMPLERS[name], i).of(0).reshape(-1)))
    z = np.asarray(draw(jnp.arange(4_000)))
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(z.shape[1]), atol=0.11)


def test_a_sphere_has_the_root_of_the_dimension_as_radius():
    np.testing.assert_allclose(np.linalg.norm(entries(drawn(zo.sphere()))) ** 2, 219, rtol=1e-5)


def test_orthogonal_matrices():
    z = drawn(zo.orthogonal())
    np.testing.assert_allclose(
        z["kernel"] @ z["kernel"].mT, np.tile(np.eye(4), (2, 1, 1)), atol=1e-5
    )
    one = z["attention"][0, :, 1]
    np.testing.assert_allclose(one.T @ one, np.eye(4), atol=1e-5)


def test_blocks_of_every_matrix():
    z = drawn(zo.blocks(rows_ratio=0.5, cols_ratio=0.4))
    for matrix in [*z["kernel"], *np.moveaxis(z["attention"], 2, 1).reshape(-1, 6, 4)]:
        assert set(np.unique(matrix)) == {0, 1}
        rows, columns = matrix.any(1), matrix.any(0)
        assert rows.sum() == len(rows) // 2 and columns.sum() == int(0.4 * len(columns))
        np.testing.assert_array_equal(matrix, np.outer(rows, columns))
    assert z["bias"].sum() == 2 and z["scale"] == 1 and z["embedding"].sum() == 3
    assert not np.array_equal(z["kernel"][0], z["kernel"][1])
    # At least one of each, and all of them.
    assert drawn(zo.blocks())["kernel"].sum() == 2
    assert drawn(zo.blocks(rows_ratio=1.0, cols_ratio=1.0))["kernel"].all()


def test_one_coordinate_of_the_whole_tree():
    params = {"bias": jnp.zeros(5), "kernel": jnp.zeros((2, 4, 6)), "scale": jnp.zeros(())}

    def where(probe):
        found = direction(zo.single_coordinate(), probe, params)
        return jnp.concatenate([found.of(i).reshape(-1) for i in range(3)])

    z = np.asarray(jax.jit(jax.vmap(where))(jnp.arange(2_000)))
    np.testing.assert_array_equal(z.sum(1), 1)
    hits = z.sum(0)
    assert hits.min() > 10 and hits.max() < 80 and len(hits) == 54  # 37 on average


def test_a_sparse_subset_is_shared_by_probes_and_counts_matrices():
    first, second = (drawn(zo.sparse(params_ratio=0.5), probe) for probe in (0, 1))
    # Six matrices of attention, two kernels, three leaves: five of eleven.
    parts = [*np.moveaxis(first["attention"], 2, 1).reshape(6, -1), *first["kernel"]]
    parts += [first["bias"], first["embedding"], first["scale"]]
    assert sum(np.any(part) for part in parts) == 5
    assert sum(np.all(part != 0) for part in parts) == 5
    zeros = entries(first) == 0
    np.testing.assert_array_equal(zeros, entries(second) == 0)
    assert (entries(first) != entries(second))[~zeros].all()


def test_a_given_support_is_that_of_what_was_given():
    given = [np.zeros((1, *x.shape)) for x in tree().values()]
    given[3][0, 1] = 2.0
    assert direction(zo.sparse(), given=given).support_of(3).item()
    assert direction(zo.blocks(), given=given).support_of(3).sum() == 24
    assert not direction(zo.sparse(), given=given).support_of(0).item()


def test_leaves_of_more_axes_without_a_layout_are_matrices_of_their_first_axis():
    (leaf,) = leaves_of({"w": jnp.zeros((4, 5, 6))})
    assert leaf.slice_shape == (4, 30) and leaf.batch_shape == ()
    leaves = leaves_of({"bias": jnp.zeros((4, 5)), "w": jnp.zeros((4, 5))})
    assert [leaf.axes is None for leaf in leaves] == [True, False]


@pytest.mark.parametrize("ratio", [0, 1.5, None])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match="rows_ratio is"):
        zo.blocks(rows_ratio=ratio)
    with pytest.raises(ValueError, match="params_ratio is"):
        zo.sparse(params_ratio=ratio)
