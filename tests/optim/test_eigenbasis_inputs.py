"""SOAP and DyKAF, at their defaults, on kinds of input that are easily forgotten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim import EigenbasisAdamState
from jaxopt_lab.report.hlo import collectives
from tests.golden.trajectory import find_states
from tests.optim.runs import fast_jit

METHODS = {"soap": jol.soap, "dykaf": jol.dykaf}
each_method = pytest.mark.parametrize("factory", METHODS.values(), ids=METHODS)
SHAPES = {"w": (4, 6), "b": (6,)}


def gradients(steps, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=(steps, *s)).astype(np.float32) for k, s in shapes.items()}


def updates_of(tx, grads, params=None):
    """The updates and the last state of a series of gradients."""
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    return jax.lax.scan(step, tx.init(params), grads)


@pytest.mark.parametrize("bad", [1e25, np.nan, -np.inf])
@each_method
def test_one_bad_gradient_is_refused_counted_and_forgotten(factory, bad):
    steps = 30
    grads = gradients(steps)
    for g in grads.values():
        g[5] = bad if not np.isfinite(bad) else bad * g[5]
    run = fast_jit(functools.partial(updates_of, factory(1e-3, weight_decay=0.1)))
    state, updates = jax.device_get(run(grads))
    (matrices,) = find_states(state, EigenbasisAdamState)
    assert matrices.notfinite_count["w"] == 1 and matrices.age["w"] == steps - 1
    for name, u in updates.items():
        moved = np.abs(u.reshape(steps, -1)).max(axis=1)
        assert moved[5] == 0 and (moved[1:5] > 1e-4).all() and (moved[6:] > 1e-4).all(), name
        assert moved.max() < 0.1


@each_method
def test_a_schedule_as_weight_decay(factory):
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    decays = (lambda count: 0.1 * count, 0.0)
    found = [three_updates(factory(1.0, weight_decay=decay), params, zeros) for decay in decays]
    for count, (updates, plain) in enumerate(zip(*found, strict=True)):
        for name in params:
            np.testing.assert_allclose(updates[name] - plain[name], -0.1 * count, rtol=1e-5)


def three_updates(tx, params, zeros):
    step, state, found = jax.jit(tx.update), tx.init(params), []
    for grads in (params, zeros, zeros):
        updates, state = step(grads, state, params)
        found.append(updates)
    return found


@each_method
def test_injected_defaults_are_the_defaults(factory):
    grads = gradients(4)
    plain, injected = (
        jax.jit(functools.partial(updates_of, tx))(grads)[1]
        for tx in (factory(1e-3), optax.inject_hyperparams(factory)(1e-3))
    )
    for name in grads:
        np.testing.assert_allclose(injected[name], plain[name], rtol=1e-3, atol=1e-7)


@each_method
def test_injection_with_options_and_a_mask(factory):
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    make = optax.inject_hyperparams(factory)
    with pytest.raises(ValueError, match="Routing.decay_mask=...."):
        make(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)).init(params)
    routing = jol.Routing(decay_mask=lambda p: {"w": True, "b": False})
    basis = jol.Eigenbasis(max_precond_dim=4)
    tx = make(1e-3, weight_decay=0.1, routing=routing, eigenbasis=basis)
    zeros = jax.tree.map(jnp.zeros_like, params)
    # A matrix of zeros starts SOAP; DyKAF needs a gradient.
    updates = three_updates(tx, params, zeros)[1]
    assert np.all(updates["w"]) and not np.any(updates["b"])


@each_method
def test_rank_promotion_may_be_an_error(factory):
    shapes = SHAPES | {"conv": (3, 3, 4, 6)}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    tx = factory(1e-3, routing=jol.Routing(on_uncovered="modes"))
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


@each_method
def test_reverse_mode_is_refused_and_forward_mode_works(factory):
    """Branches that are not due are loops of no round; the documentation says so."""
    tx = factory(1e-3)
    params = {"w": jnp.ones((4, 6))}
    grad = {"w": jnp.asarray(gradients(1)["w"][0])}
    _, state = jax.jit(tx.update)(grad, tx.init(params), params)

    def size(scale):
        updates, _ = tx.update({"w": scale * grad["w"] + 1}, state, params)
        return jnp.sum(jnp.square(updates["w"]))

    _, slope = jax.jit(lambda scale: jax.jvp(size, (scale,), (1.0,)))(1.0)
    assert np.isfinite(slope)
    with pytest.raises(ValueError, match="[Rr]everse-mode differentiation does not work"):
        jax.eval_shape(jax.grad(size), 1.0)

    # The rate and the decay enter behind the direction.
    def moved(rate):
        updates, _ = factory(rate).update(grad, state, params)
        return jnp.sum(updates["w"])

    assert np.isfinite(jax.jit(jax.grad(moved))(1e-3))


@each_method
def test_modules_of_nnx_with_one_factor_an_axis(factory):
    model = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    tx = factory(1e-2, routing=jol.Routing(on_uncovered="modes"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(x) - 1)))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    assert np.abs(np.asarray(model.kernel[...]) - before).max() > 5e-3


@each_method
def test_boxes_of_linen_on_a_mesh(factory):
    """Numbers a leaf stay in boxes with its names: layouts come from `state_shardings`."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    init = nn.with_partitioning(nn.initializers.normal(), (None, "fsdp"))
    variables = nn.Dense(16, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 8)))
    params = variables["params"]
    shardings = nn.get_sharding(params, mesh)
    tx = factory(1e-3)
    placed = jol.state_shardings(tx, params, shardings)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=placed)(params)
        step = jax.jit(tx.update)
        for _ in range(2):
            updates, state = step(params, state, params)
    kernel = updates["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "fsdp")
    assert np.all(kernel.value)


@each_method
def test_a_stack_sharded_by_its_batch_axis(factory):
    """Each device works on its own matrices, on Explicit axes as well; nothing is exchanged."""
    mesh = jax.make_mesh((4,), ("f",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("f"))
    grads = gradients(4, {"w": (4, 8, 8)})
    tx = factory(
        1e-2,
        matrix_axes=MuonDimensionNumbers(1, 2),
        eigenbasis=jol.Eigenbasis(rotation_precision="highest"),
        precondition_frequency=2,
    )

    @jax.jit
    def step(state, grad):
        return tx.update(grad, state, grad)

    def run(place):
        state, all_updates = jax.jit(tx.init)(place(grads["w"][0])), []
        for g in grads["w"]:
            updates, state = step(state, place(g))
            all_updates.append(jax.device_get(updates))
        return np.stack(all_updates), state

    alone, _ = run(jnp.asarray)
    with jax.set_mesh(mesh):
        found, state = run(lambda g: jax.device_put(g, sharding))
        text = step.lower(state, jax.device_put(grads["w"][0], sharding)).compile().as_text()
    np.testing.assert_allclose(found[:3], alone[:3], rtol=0, atol=2e-5)
    # The first refresh of factors that are nearly of rank one amplifies rounding.
    np.testing.assert_allclose(found[3], alone[3], rtol=0, atol=1e-3)
    assert np.abs(alone[3]).max() > 5e-3
    # Whether any matrix starts is one bit.
    assert set(collectives(text)) <= {"all-reduce"}
    (matrices,) = find_states(state, EigenbasisAdamState)
    for tree in (matrices.mu, matrices.row_factor, matrices.row_basis, matrices.age):
        assert jax.typeof(tree).sharding.spec[0] == "f"
