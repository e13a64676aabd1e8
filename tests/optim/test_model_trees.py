"""Routing of public models by name, and the layouts of Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol
from jaxopt_lab.optim.routing import route
from tests.optim.model_trees import ATTENTION, FLAX, MAXTEXT, OTHERS, abstract, layout, nested

METHODS = {"lion_muon": jol.lion_muon, "soap": jol.soap, "shampoo": jol.shampoo}
TABLES = [
    *((name, table, "/") for name, table in FLAX.items()),
    *((name, table, "|") for name, table in OTHERS.items()),
]
by_table = pytest.mark.parametrize(
    ("table", "separator"), [t[1:] for t in TABLES], ids=lambda t: ""
)


def by_path(tree, is_leaf=None):
    return {keystr(path): x for path, x in tree_leaves_with_path(tree, is_leaf=is_leaf)}


def layouts(tree):
    return by_path(tree, lambda x: x is None or isinstance(x, Axes))


@by_table
def test_default_roles(table, separator):
    found = route(nested(table, abstract, separator))
    wanted = by_path(nested(table, lambda leaf: leaf.role, separator))
    assert {keystr(r.path): r.role for r in found} == wanted


@pytest.mark.parametrize("name", FLAX)
def test_layouts_of_flax_models(name):
    found = jol.flax_matrix_axes(nested(FLAX[name], abstract))
    assert layouts(found) == layouts(nested(FLAX[name], layout))


@by_table
@pytest.mark.parametrize("method", METHODS)
def test_describe_agrees_with_the_layouts(method, table, separator):
    params, axes = (nested(table, leaf, separator) for leaf in (abstract, layout))
    rows = jol.describe(METHODS[method](1e-3, matrix_axes=axes), params).rows
    given = layouts(axes)
    for row in rows:
        is_matrix = given[row.path] is not None
        assert (row.role == "matrix") == is_matrix, row
        assert (row.rule == "adamw") != is_matrix, row


def test_attention_of_linen_and_nnx():
    x = jnp.ones((1, 3, 6))
    options = {"num_heads": 2, "qkv_features": 8}
    linen = jax.eval_shape(nn.MultiHeadDotProductAttention(**options).init, jax.random.key(0), x)
    module = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(in_features=6, decode=False, rngs=nnx.Rngs(0), **options)
    )
    state = nnx.state(module, nnx.Param)
    wanted = layouts(nested(ATTENTION, layout))
    for prefix, suffix, tree in (("['params']", "", linen), ("", ".value", state)):
        found = layouts(jol.flax_matrix_axes(tree))
        assert found == {f"{prefix}{path}{suffix}": axes for path, axes in wanted.items()}
        tx = jol.lion_muon(1e-3, matrix_axes=jol.flax_matrix_axes)
        rules = {r.path: r.rule for r in jol.describe(tx, tree).rows}
        assert all((rules[path] == "adamw") == (axes is None) for path, axes in found.items())


def test_dense_general_maps_to_as_many_axes_as_its_bias_has():
    tree = {
        "in": {"kernel": (6, 7, 2, 3, 4), "bias": (2, 3, 4)},
        "batched": {"kernel": (5, 6, 7, 3), "bias": (5, 3)},
        "last": {"kernel": (6, 7, 3), "bias": (3,)},
    }
    params = jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))
    found = jol.flax_matrix_axes(params)
    assert found["in"]["kernel"] == Axes((0, 1), (2, 3, 4))
    assert found["batched"]["kernel"] == Axes((1, 2), (3,))
    assert found["last"]["kernel"] == Axes((0, 1), (2,))


def test_what_has_no_layout_is_named_once():
    params = {"experts": {"wi": jnp.ones((3, 4, 5))}, "deep": {"kernel": jnp.ones((2, 3, 4))}}
    named = r"\['deep'\]\['kernel'\] \(2, 3, 4\), \['experts'\]\['wi'\] \(3, 4, 5\)"
    with pytest.warns(UserWarning, match=named) as seen:
        axes = jol.flax_matrix_axes(params)
    assert len(seen) == 1 and set(layouts(axes).values()) == {None}
    for factory in METHODS.values():
        tx = factory(1e-3)
        with pytest.warns(UserWarning, match=f"AdamW updates .*{named}.*flax_matrix_axes") as seen:
            state = tx.init(params)
        assert len(seen) == 1
        jax.eval_shape(tx.update, params, state, params)  # warnings are errors here
        jol.describe(tx, params)
        factory(1e-3, matrix_axes={"experts": Axes(1, 2), "deep": None}).init(params)


def test_leaves_without_names_are_nobodys_mistake():
    # Optax's own tests of every optimizer use such a tree.
    jol.lion_muon(1e-3).init([jnp.ones((2, 3)), jnp.ones((2, 5, 2))])


@pytest.mark.parametrize("method", METHODS)
def test_the_dimension_numbers_of_maxtext_do_as_they_are(method):
    params = nested(MAXTEXT, lambda leaf: jnp.ones(leaf.shape), "|")
    tx = METHODS[method](1e-3, matrix_axes=nested(MAXTEXT, layout, "|"))
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (updates, params)]
    assert shapes[0] == shapes[1]
    rows = jol.describe(tx, params).rows
    theirs = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=nested(MAXTEXT, layout, "|"))
    adam = {r.path for r in jol.describe(theirs, params).rows if r.rule == "adam"}
    assert {r.path for r in rows if r.rule == "adamw"} == adam
