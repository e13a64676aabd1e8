"""Which leaf is a matrix, by rule and by layout, and what a wrong layout is told."""

import inspect
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, keystr
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab.optim.roles import module_names, role_by_name
from jaxopt_lab.optim.routing import route, route_with_embeddings
from tests.contract.trees import TREES
from tests.optim.runs import normal, run


def shaped(tree):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, "float32"), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def roles(params, *args, **options):
    return {keystr(r.path): r.role for r in route(params, *args, **options)}


SHAPES = {"kernel": (3, 4), "bias": (4,), "gain": (), "head": (3, 10_000), "stack": (2, 3, 4)}


def test_default_rule_goes_by_shape():
    assert roles(shaped(SHAPES)) == {
        "['kernel']": "matrix",
        "['bias']": "vector",
        "['gain']": "vector",
        "['head']": "head",
        "['stack']": "unspecified",
    }
    assert roles(shaped({"w": (9_999, 3)})) == {"['w']": "matrix"}
    assert roles(shaped({"w": (10_000, 3)})) == {"['w']": "embedding"}
    assert roles(shaped({"class_token": (1, 1, 8)})) == {"['class_token']": "vector"}


@pytest.mark.parametrize(("size", "role"), [(12, "embedding"), (13, "matrix")])
def test_vocabulary_size_moves_the_border(size, role):
    for shape in ((12, 5), (5, 12)):
        assert roles(shaped({"w": shape}), routing=jol.Routing(vocabulary_size=size)) == {
            "['w']": role
        }


@pytest.mark.parametrize("library", TREES)
def test_embeddings_are_recognised_by_the_name_flax_gives_them(library):
    params = jax.eval_shape(TREES[library])
    by_shape = {"embedding": [], "matrix": [], "vector": []}
    for r, leaf in zip(route(params), jax.tree.leaves(params), strict=True):
        by_shape[r.role].append(leaf.shape)
    assert by_shape["embedding"] == [(12, 6)]
    assert sorted(by_shape["matrix"]) == [(6, 8), (8, 6)]
    assert all(len(shape) < 2 for shape in by_shape["vector"])


def test_only_the_last_name_of_a_path_counts():
    tree = {"embedding": {"kernel": (3, 4), "layers": [(3, 4)]}, "deep": {"embedding": [(3, 4)]}}
    found = roles(shaped(tree))
    assert found["['embedding']['kernel']"] == found["['embedding']['layers'][0]"] == "matrix"
    assert found["['deep']['embedding'][0]"] == "embedding"


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("head lm_head logits_dense head/kernel decoder/lm_head/weight net/~/head/w", "head"),
        ("embedding embeddings embedder/input_embedding wte wpe wte/weight embed/w", "embedding"),
        ("bias scale offset query/bias in_proj_bias", "vector"),
        ("b heads/kernel header head/mlp/kernel embedding/kernel wte_proj lora_b", "matrix"),
    ],
)
def test_roles_by_name(names, role):
    for name in names.split():
        plain, haiku = name.split("/"), name.rsplit("/", 1)
        for modules in (plain, haiku):
            tree = shaped({modules[-1]: (3, 4)})
            for module in reversed(modules[:-1]):
                tree = {module: tree}
            assert set(roles(tree).values()) == {role}, name


def test_the_value_that_variables_end_in_is_no_name_and_a_module_called_value_is():
    state = nnx.state(nnx.Dict(value=nnx.Linear(3, 4, rngs=nnx.Rngs(0))), nnx.Param)
    assert set(roles(state).values()) == {"vector", "matrix"}
    assert role_by_name((GetAttrKey("head"), GetAttrKey("value"))) == "head"
    assert module_names((GetAttrKey("value"), GetAttrKey("kernel"))) == ("value", "kernel")


def test_an_uncovered_leaf_falls_back_or_is_refused_by_name():
    params = shaped(SHAPES)
    with pytest.warns(UserWarning, match=r"\['stack'\] \(2, 3, 4\)"):
        jol.lion_muon(1e-3).init(params)
    rules = {r.path: r.rule for r in jol.describe(jol.lion_muon(1e-3), params).rows}
    assert rules["['stack']"] == "adamw" and rules["['kernel']"] == "lion_muon"
    strict = jol.lion_muon(1e-3, routing=jol.Routing(on_uncovered="error"))
    with pytest.raises(ValueError, match=r"\['stack'\] of shape \(2, 3, 4\).*matrix_axes"):
        strict.init(params)
    covered = {**dict.fromkeys(SHAPES), "stack": Axes(1, 2)}
    jol.lion_muon(1e-3, routing=jol.Routing(on_uncovered="error"), matrix_axes=covered).init(params)
    with pytest.raises(ValueError, match="on_uncovered: got 'ignore'"):
        jol.Routing(on_uncovered="ignore")


MODEL = {
    "embed": (12, 4),
    "block": {"qkv": (2, 4, 3, 4), "up": (2, 4, 8)},
    "norms": {"a": (4,), "b": (4,)},
}
AXES = {
    "embed": None,
    "block": {"qkv": Axes(1, 3), "up": Axes(-2, -1)},
    "norms": {"a": None, "b": None},
}
PREFIX = AXES | {"norms": None}


@pytest.mark.parametrize("given", [AXES, PREFIX, lambda params: AXES], ids=["tree", "prefix", "fn"])
def test_layouts_as_tree_prefix_or_function(given):
    found = {keystr(r.path): r.axes for r in route(shaped(MODEL), given)}
    assert found["['block']['qkv']"] == ((0, 2), (1,), (3,))
    assert found["['block']['up']"] == ((0,), (1,), (2,))
    assert [path for path, axes in found.items() if axes is None] == [
        "['embed']",
        "['norms']['a']",
        "['norms']['b']",
    ]


def test_one_layout_covers_a_subtree():
    params = shaped({"a": {"x": (3, 4), "y": (5, 6)}, "b": (3, 4)})
    assert roles(params, {"a": Axes(0, 1), "b": None}) == {
        "['a']['x']": "matrix",
        "['a']['y']": "matrix",
        "['b']": "excluded",
    }
    assert set(roles(params, Axes(1, 0)).values()) == {"matrix"}


@pytest.mark.parametrize("given", [AXES, PREFIX, lambda params: AXES], ids=["tree", "prefix", "fn"])
def test_trees_written_for_optax_muon_route_alike(given):
    params = shaped(MODEL)
    ours = jol.describe(jol.lion_muon(1e-3, matrix_axes=given), params)
    theirs = jol.describe(
        optax.contrib.muon(1e-3, muon_weight_dimension_numbers=given, beta=0.9), params
    )
    names = {"lion_muon": "muon", "adamw": "adam"}
    assert [(r.path, names[r.rule]) for r in ours.rows] == [(r.path, r.rule) for r in theirs.rows]


class Callable(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        raise AssertionError("a tree of options is not a function of the parameters")


def test_a_callable_module_is_a_tree():
    params = Callable(jnp.ones((3, 4)), jnp.ones(4))
    axes = Callable(Axes(1, 0), None)
    assert roles(params, axes) == {".weight": "matrix", ".bias": "vector"}
    mask = Callable(True, False)
    tx = jol.lion_muon(1.0, period=math.inf, weight_decay=0.5, matrix_axes=axes, mask=mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates.weight, -0.05 * 0.5)
    np.testing.assert_array_equal(updates.bias, 0.0)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"up": Axes(0, 3), "b": None},
            r"leaf \['up'\]: axis 3 .*outside a leaf of shape \(3, 4\)",
        ),
        ({"up": Axes(0, 0), "b": None}, r"leaf \['up'\]: .*each axis once.*reduction \(0,\)"),
        ({"up": Axes(0, 1), "b": Axes(0, 1)}, r"leaf \['b'\]: axis 1 .*shape \(4,\)"),
        ({"up": Axes(0, 1)}, r"matrix_axes does not match.*no entry for leaf \['b'\]"),
        ({"up": Axes(), "b": None, "c": None}, r"no leaf for its entry \['c'\]"),
        ({"up": {"x": Axes()}, "b": None}, r"no entry for leaf \['up'\]"),
        ([Axes(), None], r"no entry for leaf \['b'\]"),
    ],
)
def test_a_wrong_layout_names_its_leaf(axes, message):
    params = shaped({"up": (3, 4), "b": (4,)})
    with pytest.raises(ValueError, match=message):
        jol.lion_muon(1e-3, matrix_axes=axes).init(params)


GROUPS = {name: {"kernel": (3, 4), "bias": (4,)} for name in "abc"}
GROUP_AXES = {name: {"kernel": Axes(0, 1), "bias": None} for name in GROUPS}
DECAYING = {name: {"kernel": True, "bias": False} for name in GROUPS}
MATRIX_METHODS = (jol.lion_muon, jol.soap, jol.shampoo, jol.dykaf, jol.muon)


def moved(tx, params):
    grads = jax.tree.map(jnp.ones_like, params)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(2):  # SOAP takes no first step
        updates, state = step(grads, state, params)
    return jax.tree.map(lambda u: bool((u != 0).any()), updates)


@pytest.mark.parametrize("factory", MATRIX_METHODS)
def test_full_trees_inside_partitions_and_masks(factory):
    params = jax.tree.map(jnp.ones, GROUPS, is_leaf=lambda x: isinstance(x, tuple))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), params)
    work = {"param_shardings": placed}
    if "mesh" in inspect.signature(factory).parameters:
        work = {"mesh": jol.MeshWork(param_shardings=placed)}
    tx = factory(1e-2, weight_decay=0.1, matrix_axes=GROUP_AXES, mask=DECAYING, **work)
    yes, no = ({"kernel": flag, "bias": flag} for flag in (True, False))
    groups = {"slow": tx, "fast": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    labels = {"a": "slow", "b": "fast", "c": "frozen"}
    assert moved(optax.partition(groups, labels), params) == {"a": yes, "b": yes, "c": no}
    trained = {"a": True, "b": False, "c": False}
    frozen = optax.masked(optax.set_to_zero(), {"a": False, "b": True, "c": True})
    assert moved(optax.chain(optax.masked(tx, trained), frozen), params) == {
        "a": yes,
        "b": no,
        "c": no,
    }
    alone = {"a": params["a"]}
    state = optax.masked(tx, trained).init(params)
    bare = factory(1e-2, matrix_axes={"a": GROUP_AXES["a"]}).init(alone)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(bare))


@pytest.mark.parametrize("factory", MATRIX_METHODS)
def test_full_trees_under_map_params(factory):
    params = jax.tree.map(jnp.ones, GROUPS, is_leaf=lambda x: isinstance(x, tuple))
    tx = factory(1e-2, matrix_axes=GROUP_AXES)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda x: jnp.full_like(x, 7), state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert any((x == 7).all() for x in jax.tree.leaves(marked) if x.shape == (3, 4))


def test_what_is_not_hidden_must_still_match():
    params = shaped(GROUPS)
    with pytest.raises(ValueError, match=r"there is no leaf for its entry \['d'\]\['bias'\]"):
        extra = GROUP_AXES | {"d": GROUP_AXES["a"]}
        jol.lion_muon(1e-3, matrix_axes=extra).init(params)
    tx = optax.masked(
        jol.lion_muon(1e-3, matrix_axes={"a": Axes()}), {"a": True, "b": True, "c": False}
    )
    with pytest.raises(ValueError, match=r"no entry for leaf \['b'\]"):
        tx.init(params)


@pytest.mark.parametrize("factory", [jol.lion_muon, jol.scale_by_lion_muon, jol.scale_by_soap])
def test_a_function_under_inject_hyperparams_is_told_what_to_write(factory):
    rate = {} if factory in (jol.scale_by_lion_muon, jol.scale_by_soap) else {"learning_rate": 1e-3}
    params = {"w": jnp.ones((3, 4))}
    wanted = r'static_args=\("matrix_axes",\)'
    # Numbers that decide shapes, where they are arguments.
    numbers = ("ns_steps", "cheap_ns_steps", "precondition_frequency", "max_precond_dim")
    static = tuple(n for n in numbers if n in inspect.signature(factory).parameters)
    injected = optax.inject_hyperparams(factory, static_args=static)
    with pytest.raises(ValueError, match=f"matrix_axes: got .*{wanted}"):
        injected(**rate, matrix_axes=lambda p: p).init(params)
    with pytest.raises(ValueError, match=f"matrix_axes: got True.*{wanted}"):
        factory(**rate, matrix_axes=True).init(params)
    with pytest.raises(TypeError, match=f"flax_matrix_axes got an integer.*{wanted}"):
        injected(**rate, matrix_axes=jol.flax_matrix_axes).init(params)
    told = optax.inject_hyperparams(factory, static_args=(*static, "matrix_axes"))
    told(**rate, matrix_axes=jol.flax_matrix_axes).init(params)


def test_an_entry_that_is_no_layout_names_its_leaf():
    with pytest.raises(ValueError, match=r"leaf \['w'\]: got 3, wanted MuonDimensionNumbers"):
        jol.lion_muon(1e-3, matrix_axes={"w": 3}).init(shaped({"w": (3, 4)}))


def cells(function, seen):
    """Everything that a function closes over, functions within functions."""
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        values = [value, *value.values()] if isinstance(value, dict) else [value]
        values += value if isinstance(value, tuple | list) else []
        for x in values:
            if id(x) not in seen:
                seen[id(x)] = x
                if hasattr(x, "__closure__"):
                    cells(x, seen)
    return seen.values()


@pytest.mark.parametrize("factory", (*MATRIX_METHODS, jol.d_muon, jol.signum))
def test_closures_hold_no_sets(factory):
    # Equinox and Optimistix hash what a transformation closes over.
    tx = factory(1e-3)
    held = [x for fn in tx for x in cells(fn, {})]
    assert held and not any(isinstance(x, set) for x in held)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_the_bare_transform_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match=r"leaf \['b'\] of shape .* is not a matrix"):
        jol.scale_by_lion_muon().init(shaped({"w": (3, 4), "b": shape}))


def spectral(axes):
    return jol.scale_by_lion_muon(
        period=1, newton_schulz=jol.NewtonSchulz(steps=1, dtype="float32"), matrix_axes=axes
    )


def test_every_head_is_its_own_matrix():
    kernel = normal(0, {"w": (4, 2, 3)}, 2)  # (d, heads, head_dim)
    heads = {f"{h}": kernel["w"][:, :, h] for h in range(2)}
    split, _, _ = run(spectral(Axes(0, 2)), {"w": kernel["w"][0]}, kernel)
    alone, _, _ = run(spectral(None), {k: x[0] for k, x in heads.items()}, heads)
    for h in range(2):
        np.testing.assert_allclose(split["w"][:, :, h], alone[f"{h}"], atol=1e-5)


def test_fused_and_split_projections_are_different_matrices():
    grads = normal(1, {"w": (4, 3, 5)}, 2)  # (d, q/k/v, d')
    merged = {"w": grads["w"].reshape(2, 4, 15)}
    params, flat = ({"w": tree["w"][0]} for tree in (grads, merged))
    fused, _, _ = run(spectral(Axes(0, (1, 2))), params, grads)
    one, _, _ = run(spectral(None), flat, merged)
    np.testing.assert_allclose(fused["w"].reshape(2, 4, 15), one["w"], atol=1e-5)
    split, _, _ = run(spectral(Axes(0, 2)), params, grads)
    single, _, _ = run(spectral(None), {"w": flat["w"][:, :5]}, {"w": grads["w"][:, :, 0]})
    np.testing.assert_allclose(split["w"][:, :, 0], single["w"], atol=1e-5)
    assert np.abs(split["w"] - fused["w"]).max() > 0.1


def test_norms_of_a_model_count_tables_but_not_stacked_vectors():
    shapes = {"embedding": (60, 8), "head": (8, 60), "wide": (8, 20_000)}
    params = shaped({**shapes, "scale": (3, 8), "stack": (3, 8, 16)})
    layouts = {**dict.fromkeys(shapes), "scale": None, "stack": Axes(1, 2)}
    found = {
        r.path[0].key: r.axes.matrix_shape(params[r.path[0].key].shape)
        for r in route_with_embeddings(params, layouts)
    }
    assert found == {k: (1, *v) for k, v in shapes.items()} | {"stack": (3, 8, 16)}
    decoder = models.PRESETS["tiny"]
    routes = route_with_embeddings(models.abstract_params(decoder), models.matrix_axes(decoder))
    paths = [keystr(r.path, simple=True, separator="/") for r in routes]
    assert "embedding/tokens" in paths and not any("norm" in path for path in paths)
