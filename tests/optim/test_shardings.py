"""A sharding for every leaf of the state of any transformation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol

SHAPES = {"kernel": (16, 8), "bias": (8,)}
SPECS = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
PARAMS = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in SHAPES.items()}

TRANSFORMS = {
    "adamw": optax.adamw(1e-3),
    "optax muon": optax.contrib.muon(1e-3),
    "partition": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"kernel": "a", "bias": "b"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "prodigy": optax.contrib.prodigy(),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
    "key": jol.lion_muon(1e-3, stable_rank_threshold=0.1),
    "cached": jol.legacy_sign_muon(cheap_mode="cached", mu_dtype="bfloat16"),
    "average": optax.chain(jol.d_muon(1e-3), jol.track_params_ema(0.9)),
}


def shardings(kind=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    return {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_lies_where_its_parameter_does(name, kind):
    tx, given = TRANSFORMS[name], shardings(kind)
    placed = jol.state_shardings(tx, PARAMS, given)
    state = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    by_shape = {shape: SPECS[k] for k, shape in SHAPES.items()}
    found = set()
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert sharding.mesh == given["kernel"].mesh
        # Adafactor's factors have the length of an axis, and a (8,) of them is not the bias.
        if name != "adafactor" or leaf.shape == SHAPES["kernel"]:
            assert sharding.spec == by_shape.get(leaf.shape, P()), leaf.shape
        found.add(leaf.shape)
    assert () in found and (SHAPES["kernel"] in found or name == "adafactor")


def test_key_data_can_be_placed():
    tx, given = TRANSFORMS["key"], shardings()
    placed = jol.state_shardings(tx, PARAMS, given)
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    state = jax.jit(tx.init, out_shardings=placed)(params)
    key = optax.tree.get(state, "key_data")
    assert key.dtype == jnp.uint32 and len(key.devices()) == 8


@pytest.mark.parametrize("factory", [jol.lion_muon, jol.soap, jol.shampoo])
def test_boxed_linen_parameters(factory):
    mesh = shardings()["kernel"].mesh
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    model = nn.Dense(8, kernel_init=kernel)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 16)))["params"]
    given = nn.get_sharding(abstract, mesh)
    tx = factory(1e-3)
    placed = jol.state_shardings(tx, abstract, given)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
    # Some states hold one number or one factor a leaf, in boxes with the axis names of its
    # parameter: nn.get_sharding(state, mesh) asks for more axes than they have.
    state = jax.jit(tx.init, out_shardings=placed)(params)
    specs = {x.sharding.spec for x in jax.tree.leaves(state) if x.shape == (16, 8)}
    assert specs == {P("fsdp", "tensor")}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, nn.get_sharding(params, mesh))
        _, new = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf, jol.shampoo])
def test_moments_lie_along_a_side_that_can_be_divided(factory):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    given = {"down": NamedSharding(mesh, P(None, None, "fsdp"))}
    # As (11008, 4096) on 512 chips: rows, which come first, do not divide.
    params = {"down": jax.ShapeDtypeStruct((2, 22, 16), "float32")}
    axes = {"down": optax.contrib.MuonDimensionNumbers(1, 2)}
    placed = jol.state_shardings(factory(1e-3, matrix_axes=axes), params, given)
    state = jax.eval_shape(factory(1e-3, matrix_axes=axes).init, params)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    found = [sharding.spec for leaf, sharding in leaves if leaf.shape == (2, 22, 16)]
    assert found and set(found) == {P(None, None, "fsdp")}


def test_one_sharding_may_stand_for_a_subtree():
    mesh = shardings()["kernel"].mesh
    placed = jol.state_shardings(optax.sgd(0.1, momentum=0.9), PARAMS, NamedSharding(mesh, P()))
    assert {s.spec for s in jax.tree.leaves(placed)} == {P()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda s: {}, "must hold a NamedSharding a leaf; it holds nothing"),
        (lambda s: SPECS, "it holds .*tensor"),
        (lambda s: {"kernel": s["kernel"]}, r"no entry for leaf \['bias'\]"),
        (lambda s: s | {"head": s["bias"]}, r"no leaf for its entry \['head'\]"),
    ],
    ids=["empty", "specs", "missing", "extra"],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=f"param_shardings .*{message}"):
        jol.state_shardings(optax.adam(1e-3), PARAMS, given(shardings()))
