"""Linear minimisation oracles and projections: optimal, feasible, at edges and at any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.core import lmo, projections

LOW, HIGH = (-1.0, 0.0, -0.5, 2.0, -3.0, 0.1), (1.0, 0.0, 2.0, 2.5, -1.0, 4.0)
# name -> (oracle of g and x, projection, points are matrices)
SETS = {
    "simplex": (lambda g, x: lmo.simplex(g, 1.3), lambda x: projections.simplex(x, 1.3), False),
    "l1": (lambda g, x: lmo.l1_ball(g, 1.3), lambda x: projections.l1_ball(x, 1.3), False),
    "l2": (lambda g, x: lmo.l2_ball(g, 1.3), lambda x: projections.l2_ball(x, 1.3), False),
    "linf": (lambda g, x: lmo.linf_ball(g, x, 1.3), lambda x: projections.linf_ball(x, 1.3), False),
    "lp1.2": (lambda g, x: lmo.lp_ball(g, 1.2, 1.3), lambda x: projections.lp_ball(x, 1.2, 1.3), 0),
    "lp5": (lambda g, x: lmo.lp_ball(g, 5.0, 1.3), lambda x: projections.lp_ball(x, 5.0, 1.3), 0),
    "box": (
        lambda g, x: lmo.box(g, x, *map(jnp.array, (LOW, HIGH))),
        lambda x: projections.box(x, *map(jnp.array, (LOW, HIGH))),
        False,
    ),
    "nuclear": (
        lambda g, x: lmo.nuclear_ball(g, 1.3),
        lambda x: projections.nuclear_ball(x, 1.3),
        True,
    ),
    "spectral": (
        lambda g, x: lmo.spectral_ball(g, 1.3),
        lambda x: projections.spectral_ball(x, 1.3),
        True,
    ),
}
seeds = st.integers(0, 2**32 - 1)
# Small integers draw ties and zeros.
sizes = st.sampled_from(["normal", "large", "tiny", "integers", "one", "zero"])


def draw(seed, size, matrix):
    rng = np.random.default_rng(seed)
    shape = (2, 3) if matrix else (6,)
    if size == "integers":
        return rng.integers(-1, 2, shape).astype(float)
    if size == "one":
        return np.eye(1, 6, rng.integers(6)).reshape(shape) * rng.normal()
    return rng.normal(size=shape) * {"normal": 1.0, "large": 1e3, "tiny": 1e-3, "zero": 0.0}[size]


@pytest.fixture(scope="module", params=SETS)
def convex_set(request):
    oracle, project, matrix = SETS[request.param]
    return request.param, jax.jit(oracle), jax.jit(project), matrix


@given(seed=seeds, size=sizes)
def test_an_oracle_finds_a_minimiser_in_the_set(convex_set, seed, size):
    name, oracle, project, matrix = convex_set
    with jax.enable_x64(True):
        g = draw(seed, size, matrix)
        inside = np.asarray(project(draw(seed + 1, "normal", matrix)))
        s = np.asarray(oracle(g, inside))
        np.testing.assert_allclose(project(s), s, atol=1e-10)
        # Two singular values may be told apart up to a ratio of 0.999 only.
        slack = 1e-3 * np.linalg.norm(g) if name == "nuclear" else 1e-9 * np.abs(g).sum()
        for other in (inside, *(project(draw(seed + k, "large", matrix)) for k in (2, 3))):
            assert np.vdot(s, g) <= np.vdot(other, g) + slack


@given(seed=seeds, size=sizes)
def test_a_projection_is_the_nearest_point(convex_set, seed, size):
    name, oracle, project, matrix = convex_set
    with jax.enable_x64(True):
        x = draw(seed, size, matrix)
        p = np.asarray(project(x))
        gap = x - p
        # p is nearest if and only if no point of the set lies further along x - p; the oracle knows
        # the furthest. That of the nuclear ball is optimal up to 0.1 %: ask the norm instead.
        furthest = np.vdot(gap, oracle(-gap, p))
        if name == "nuclear":
            furthest = 1.3 * np.linalg.norm(gap, 2)
        assert furthest - np.vdot(gap, p) <= 1e-9 * max(1.0, np.abs(x).max())
        np.testing.assert_allclose(project(p), p, atol=1e-12)


def test_points_inside_are_returned_bit_by_bit(convex_set):
    name, _, project, matrix = convex_set
    if name == "simplex":
        pytest.skip("has no inside")
    x = np.asarray(project(draw(0, "tiny", matrix).astype(np.float32)))
    np.testing.assert_array_equal(project(x), x)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_objective_does_not_matter(convex_set, scale):
    name, oracle, project, matrix = convex_set
    g = draw(3, "normal", matrix).astype(np.float32)
    x = jnp.zeros_like(g)
    np.testing.assert_allclose(oracle(g * np.float32(scale), x), oracle(g, x), atol=1e-5)


def test_far_points_are_projected_in_range(convex_set):
    name, _, project, matrix = convex_set
    x = draw(3, "normal", matrix).astype(np.float32) * np.float32(1e30)
    p = np.asarray(project(x))
    assert np.isfinite(p).all()
    np.testing.assert_allclose(project(p), p, atol=1e-5)


def test_ties_take_the_first_index():
    g = jnp.array([1.0, -2.0, 2.0, -2.0])
    assert lmo.simplex(g).tolist() == [0, 1, 0, 0]
    assert lmo.l1_ball(g).tolist() == [0, 1, 0, 0]
    assert lmo.simplex(jnp.zeros(3), 2.0).tolist() == [2, 0, 0]


def test_a_zero_objective_moves_nothing_that_it_need_not():
    g, x = jnp.zeros(3), jnp.array([0.1, -0.2, 0.3])
    for ball in (lmo.l1_ball, lmo.l2_ball, lambda g: lmo.lp_ball(g, 3.0)):
        np.testing.assert_array_equal(ball(g), g)
    np.testing.assert_array_equal(lmo.linf_ball(g, x), x)
    np.testing.assert_array_equal(lmo.box(g, x, -1.0, 1.0), x)
    for ball in (lmo.nuclear_ball, lmo.spectral_ball):
        np.testing.assert_array_equal(ball(jnp.zeros((2, 3))), jnp.zeros((2, 3)))


def test_one_coordinate():
    g, x = jnp.array([-2.0]), jnp.array([5.0])
    for s in (lmo.simplex(g), lmo.l1_ball(g), lmo.l2_ball(g), lmo.lp_ball(g, 1.5)):
        np.testing.assert_allclose(s, [1.0])
    for p in (projections.simplex(x), projections.l1_ball(x), projections.l2_ball(x)):
        np.testing.assert_allclose(p, [1.0])
    np.testing.assert_allclose(projections.lp_ball(x, 1.5), [1.0], rtol=1e-6)


def test_the_nuclear_oracle_is_the_leading_pair_and_the_spectral_one_the_polar_factor():
    with jax.enable_x64(True):
        g = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        u, values, v = np.linalg.svd(g, full_matrices=False)
        np.testing.assert_allclose(lmo.nuclear_ball(g), -np.outer(u[:, 0], v[0]), atol=1e-9)
        np.testing.assert_allclose(lmo.spectral_ball(g), -u @ v, atol=1e-9)
        # Rank one, as gradients of one example are: nothing is added to the null space.
        rank_one = jnp.outer(g[:, 0], g[0])
        s = np.asarray(lmo.spectral_ball(rank_one))
        expected = -rank_one / np.linalg.norm(rank_one)
        np.testing.assert_allclose(s, expected, atol=1e-6)


@pytest.mark.parametrize("p", [1.3, 4.0])
def test_the_lp_projection_agrees_with_a_general_solver(p):
    x = np.random.default_rng(1).normal(size=4) * 2
    ball = {"type": "ineq", "fun": lambda z: 1 - np.sum(np.abs(z) ** p)}
    found = scipy.optimize.minimize(
        lambda z: np.sum((z - x) ** 2), x / 9, constraints=[ball], tol=1e-14
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(projections.lp_ball(jnp.asarray(x), p), found.x, atol=1e-6)
