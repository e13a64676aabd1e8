"""SOAP and DyKAF in working precision on gradients that nobody wants to see."""

import functools
import math
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim.kronecker.dykaf import dykaf_method
from jaxopt_lab.optim.kronecker.step import LARGEST_RATIO
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.parity.dykaf import with_quirks
from tests.examples import examples
from tests.optim.eigenbasis_runs import scale_by_tensor_soap
from tests.quick_compile import OPTIONS

# Factory, its options, and those of `Eigenbasis`.
VARIANTS: dict[str, Any] = {
    "soap": (jol.scale_by_soap, {}, {}),
    "soap factored": (jol.scale_by_soap, {}, {"second_moment": "factored"}),
    "ksl": (jol.scale_by_dykaf, {}, {}),
    "parallel": (jol.scale_by_dykaf, {"integrator": "parallel"}, {}),
    "eps": (jol.scale_by_dykaf, {}, {"init": "eps"}),
    "rank one": (jol.scale_by_dykaf, {}, {"second_moment": "rank_one"}),
}
# Two matrices in each dtype; shapes are few so that runs are compiled once a variant.
SHAPES = {"float32": (2, 4, 6), "bfloat16": (2, 4, 6)}
STEPS, FREQUENCY = 8, 3
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def compiled(variant, rotation_precision="bfloat16"):
    factory, options, basis = VARIANTS[variant]
    tx = factory(
        precondition_frequency=FREQUENCY,
        matrix_axes=MuonDimensionNumbers(1, 2),
        eigenbasis=jol.Eigenbasis(rotation_precision=rotation_precision, **basis),
        **options,
    )

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def go(grads):
        grads = {k: g.astype(k) for k, g in grads.items()}
        params = {k: jnp.ones(s, k) for k, s in SHAPES.items()}

        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            params = jax.tree.map(lambda w, u: w - 0.01 * u, params, updates)
            return (params, state), (updates, state)

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return lambda grads: jax.device_get(go(jax.tree.map(np.float32, grads)))


def normal(seed):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(STEPS, *s)) for k, s in SHAPES.items()}


def assert_finite(tree):
    for x in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(x, np.float32)).all()


@every_variant
@examples(100)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    size=st.floats(-18, 18),
    wander=st.floats(0, 2),
    condition=st.floats(0, 12),
    rank=st.integers(1, 4),
    idle_row=st.booleans(),
    idle_column=st.booleans(),
    zero_steps=st.integers(0, 3),
)
def test_finite_and_bounded(
    variant, seed, size, wander, condition, rank, idle_row, idle_column, zero_steps
):
    """Whatever the size and condition of gradients, of low rank at first, absent or idle."""
    rng = np.random.default_rng(seed)
    grads = normal(seed)
    for g in grads.values():
        left, values, right = np.linalg.svd(g, full_matrices=False)
        values = values * np.geomspace(1, 10**-condition, 4)
        values[:2, ..., rank:] = 0  # of the first two gradients
        g[:] = left * values[..., None, :] @ right
        g *= 10 ** (size + wander * rng.normal(size=(STEPS, 2, 1, 1)))
        np.clip(g, -1e30, 1e30, out=g)
        g[:zero_steps, 1] = 0
        if idle_row:
            g[..., 2, :] = 0
        if idle_column:
            g[..., 3] = 0
    updates, state = compiled(variant)(grads)
    assert_finite(updates)
    assert_finite(state)
    for name, x in updates.items():
        largest = np.abs(np.asarray(x, np.float32)).max()
        # In the eigenbases every coordinate is bounded, and rotations keep the norm.
        assert largest < 1.02 * LARGEST_RATIO * math.sqrt(4 * 6), name


def fields(state, index):
    """What a state holds of one matrix of each stack; counters apart."""
    trees = state._replace(count=None, notfinite_count=None)
    return jax.tree.map(lambda x: x[:, index], trees)


def at(step, tree):
    return jax.tree.map(lambda x: x[step], tree)


@functools.cache
def undisturbed(variant):
    return compiled(variant)(normal(0))


@every_variant
@examples(20)
@hypothesis.given(
    step=st.integers(0, STEPS - 1),
    row=st.integers(0, 3),
    column=st.integers(0, 5),
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -3e38]),
)
def test_refused_gradients(variant, step, row, column, bad):
    """The matrix and its state stay as they are, others do not notice, and all goes on."""
    grads = normal(0)
    for g in grads.values():
        g[step, 1, row, column] = bad
    updates, states = compiled(variant)(grads)
    assert_finite(updates)
    assert_finite(states)
    for name in SHAPES:
        counts = np.zeros((STEPS, 2), int)
        counts[step:, 1] = 1
        np.testing.assert_array_equal(states.notfinite_count[name], counts)
        np.testing.assert_array_equal(updates[name][step, 1], 0)
        moved = [np.abs(np.asarray(u[1], np.float32)).max() > 0.01 for u in updates[name]]
        # The first gradient that is taken only starts.
        assert moved == [t != step and t > (step == 0) for t in range(STEPS)]

    # The neighbour: bit for bit until it is refreshed in one stack with this matrix; how often
    # columns are made orthogonal is then decided for both.
    refreshed = max(-(-step // FREQUENCY), 1) * FREQUENCY
    found, clean = (
        (fields(s, 0), jax.tree.map(lambda x: x[:, 0], u))
        for u, s in ((updates, states), undisturbed(variant))
    )
    chex.assert_trees_all_equal(*(at(slice(refreshed), x) for x in (found, clean)))
    chex.assert_trees_all_close(found[1], clean[1], rtol=0, atol=5e-2)

    # The matrix itself: bit for bit, but for a refresh, which needs no gradient.
    mine = fields(states, 1)
    before, after = (at(t, mine) for t in (step - 1, step))
    if step == 0:
        assert not any(x.any() for x in jax.tree.leaves((after.age, after.mu)))
    elif step % FREQUENCY:
        chex.assert_trees_all_equal(before, after)
    else:
        chex.assert_trees_all_equal(before.age, after.age)
        for name in ("row_factor", "column_factor"):  # made symmetric
            pair = (getattr(before, name), getattr(after, name))
            chex.assert_trees_all_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["soap", "ksl"])
def test_after_a_refusal_all_is_as_if_that_gradient_had_never_come(variant):
    """Away from the refreshes, whose turn follows the shared count."""
    grads, without = normal(0), normal(0)
    for name, g in grads.items():
        g[1, 1] = np.nan
        without[name] = np.delete(g, 1, axis=0)
        without[name] = np.concatenate([without[name], g[-1:]])
    _, disturbed = compiled(variant)(grads)
    _, states = compiled(variant)(without)
    late, early = fields(disturbed, 1), fields(states, 1)
    chex.assert_trees_all_equal(at(2, late), at(1, early))
    assert late.age["float32"].tolist() == [1, 1, 2, 3, 4, 5, 6, 7]


ONE_SIDE = jol.Eigenbasis(max_precond_dim=5)
SUMS = {
    "soap": jol.scale_by_soap(factor_decay=1.0, precondition_frequency=FREQUENCY),
    "soap, traced": optax.inject_hyperparams(jol.scale_by_soap)(factor_decay=1.0),
    "ksl": jol.scale_by_dykaf(factor_decay=1.0, precondition_frequency=FREQUENCY),
    "parallel": jol.scale_by_dykaf(factor_decay=1.0, integrator="parallel"),
    "one side": guarded(
        eigenbasis_direction(
            with_quirks(
                dykaf_method(0.95, 0.95, None, 1e-8, 10, "ksl", ONE_SIDE, jol.MeshWork()),
                one_sided="code",
            ),
            None,
            ONE_SIDE,
            jol.MeshWork(),
        )
    ),
    "modes": scale_by_tensor_soap(factor_decay=1.0, precondition_frequency=FREQUENCY),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_gradient_that_would_make_a_sum_overflow_is_refused(name):
    """Each could be squared, all of them together not; small ones still can."""
    shape, steps = (4, 6), 100
    # Squared and summed over the matrix, with the room that the refusal leaves: half the range.
    size = np.sqrt(np.finfo(np.float32).max / 2 / 4 / math.prod(shape))
    grads = size * np.sign(np.random.default_rng(0).normal(size=(steps, *shape)))
    grads[-1] /= 1e10
    tx = SUMS[name]

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def go(grads):
        def step(state, grad):
            updates, state = tx.update(grad, state, jnp.zeros(shape))
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    updates, states = jax.device_get(go(np.float32(grads)))
    assert_finite(updates)
    assert_finite(states)
    if name == "soap, traced":
        states = states.inner_state
    notfinite_count, age = states.notfinite_count, states.age
    assert notfinite_count[0] == 0 and notfinite_count[-1] > 5
    refused = np.diff(notfinite_count) == 1
    np.testing.assert_array_equal(np.any(updates[1:], axis=(1, 2)), ~refused)
    np.testing.assert_array_equal(np.diff(age), ~refused)
    assert not refused[-1]


@pytest.mark.parametrize("variant", ["soap", "ksl"])
@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_bases_follow_gradients_of_any_size(variant, size):
    """Also where squares of the factors, fourth powers of gradients, leave the range of float32."""
    run = compiled(variant, "highest")  # bases in float32
    (_, states), (_, usual) = (run({k: x * g for k, g in normal(0).items()}) for x in (size, 1.0))
    # The rows' first factor has full rank, so that only signs are a choice.
    found, wanted = (s.row_basis["float32"] for s in (states, usual))
    overlaps = np.abs(found.mT @ wanted)
    np.testing.assert_allclose(overlaps, np.broadcast_to(np.eye(4), overlaps.shape), atol=1e-3)
    assert np.abs(wanted[-1] - wanted[0]).max() > 0.1
