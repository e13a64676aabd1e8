"""Properties of SOAP, and of the factors of Shampoo that it keeps, in double precision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab.core.kronecker import rearrange
from tests.optim.eigenbasis_runs import (
    NEVER,
    delayed_adam,
    draw,
    orthogonal,
    reordered,
    run,
    turned,
)

SHAPES = {"square": (4, 4), "wide": (4, 6)}
STEPS = 9

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def all_close(a, b, atol=1e-10):
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


@functools.cache
def usual(**options):
    return run("soap", draw(0, SHAPES, STEPS), params=draw(1, SHAPES), **options)


def test_factors_are_linear_images_of_the_second_moment():
    """Also their traces: both are the trace of the averaged vec(G) vec(G)^T."""
    state, b = usual().state(STEPS), 0.95
    for name, (m, n) in SHAPES.items():
        grads = draw(0, SHAPES, STEPS)[name].reshape(STEPS, -1)
        weights = (1 - b) * b ** np.arange(STEPS)[::-1]
        fisher = np.einsum("t,ti,tj->ij", weights, grads, grads)
        with jax.enable_x64(True):
            rearranged = np.asarray(rearrange(jnp.asarray(fisher), m, n))
        rows, columns = state.row_factor[name], state.column_factor[name]
        close(rows, (rearranged @ np.eye(n).ravel()).reshape(m, m))
        close(columns, (rearranged.T @ np.eye(m).ravel()).reshape(n, n))
        close([np.trace(rows), np.trace(columns)], np.trace(fisher))


def test_factored_moment_in_the_eigenbases_is_shampoo_with_square_roots():
    """Claim 1 of the paper: over a data set, with L and R its averaged Gram matrices.

    tr(L)^(1/2) L^(-1/2) G R^(-1/2) = Adafactor in the eigenbases, whose row and column sums are the
    eigenvalues of L and R.
    """
    data = np.random.default_rng(0).normal(size=(20, 4, 6)) * np.geomspace(1, 5, 6)
    left, right = np.mean(data @ data.mT, 0), np.mean(data.mT @ data, 0)
    (a, rows), (c, columns) = np.linalg.eigh(left), np.linalg.eigh(right)
    squares = np.mean((rows.T @ data @ columns) ** 2, 0)
    close(squares.sum(1), a)
    close(squares.sum(0), c)

    options = {"second_moment": "factored", "correct_bias": False}
    # So slow an average that one more gradient does not change it.
    numbers = {"b1": 0.0, "b2": 1 - 1e-13, "eps": 0.0, "precondition_frequency": NEVER}
    first = run("soap", {"w": data[:1]}, **options, **numbers).state(1)
    state = first._replace(
        row_nu={"w": squares.sum(1)},
        column_nu={"w": squares.sum(0)},
        row_basis={"w": rows},
        column_basis={"w": columns},
    )
    found = run("soap", {"w": data[3:4]}, state=state, **options, **numbers)
    left_root = rows / np.sqrt(a) @ rows.T
    right_root = columns / np.sqrt(c) @ columns.T
    want = np.sqrt(np.trace(left)) * left_root @ data[3] @ right_root
    close(found.directions["w"][0], want, atol=1e-9)


@pytest.mark.parametrize("bases", ["identity", "first"])
def test_in_fixed_bases_it_is_adam_there(bases):
    """Without refreshes; in the identity, plain AdamW that ignores its first gradient."""
    grads = draw(0, SHAPES, STEPS)
    state = usual().state(1)
    if bases == "identity":
        state = turned(
            state,
            jax.tree.map(lambda q: q.T, state.row_basis),
            jax.tree.map(lambda q: q.T, state.column_basis),
        )
    rest = jax.tree.map(lambda g: g[1:], grads)
    found = run("soap", rest, state=state, precondition_frequency=NEVER)
    for name in SHAPES:
        rows, columns = state.row_basis[name], state.column_basis[name]
        if bases == "identity":
            close(rows, np.eye(4))
        want = rows @ delayed_adam(rows.T @ grads[name] @ columns) @ columns.T
        close(found.directions[name], want[1:])


def test_turned_axes_turn_the_steps_and_not_those_of_adam():
    grads = draw(0, {"square": (4, 4)}, STEPS)
    p, q = orthogonal(1, 4), orthogonal(2, 4)
    turned_grads = {"square": p @ grads["square"] @ q.T}
    found, other = (run("soap", g, eps=0.0) for g in (grads, turned_grads))
    close(other.directions["square"], p @ found.directions["square"] @ q.T, atol=1e-8)
    adam, turned_adam = (delayed_adam(g["square"], eps=0.0) for g in (grads, turned_grads))
    assert np.abs(turned_adam - p @ adam @ q.T).max() > 0.5


def test_first_bases_are_the_singular_vectors_of_the_first_gradient():
    state = usual().state(1)
    for name in SHAPES:
        u, sizes, vh = np.linalg.svd(draw(0, SHAPES, STEPS)[name][0], full_matrices=False)
        k = len(sizes)
        close(np.abs(state.row_basis[name].T @ u), np.eye(4))
        close(np.abs(state.column_basis[name][:, :k].T @ vh.T), np.eye(k))


@pytest.mark.parametrize("rank", [4, 2])
def test_constant_gradients_give_the_polar_factor(rank):
    """Every singular value becomes 1, those that are 0 stay: Muon's direction."""
    first = draw(0, SHAPES)
    for name, g in first.items():
        u, sizes, vh = np.linalg.svd(g, full_matrices=False)
        first[name] = u[:, :rank] * sizes[:rank] @ vh[:rank]
    found = run("soap", jax.tree.map(lambda g: np.stack([g] * STEPS), first))
    for name, g in first.items():
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        polar = u[:, :rank] @ vh[:rank]
        np.testing.assert_array_equal(found.directions[name][0], 0)
        close(found.directions[name][1:], np.stack([polar] * (STEPS - 1)), atol=1e-6)


def test_order_and_signs_of_basis_columns_are_a_choice():
    rest = jax.tree.map(lambda g: g[2:], draw(0, SHAPES, STEPS))
    state = usual(precondition_frequency=2).state(2)
    plain, other = (run("soap", rest, state=s) for s in (state, reordered(state, 5)))
    all_close(other.directions, plain.directions)
    assert not np.allclose(other.states.mu["wide"][0], plain.states.mu["wide"][0])


def test_both_orthogonalizers_give_the_same_weights():
    panels, householder = (usual(orthogonalizer=x) for x in ("cholesky_qr", "householder"))
    all_close(panels.params, householder.params, atol=1e-8)
    differ = [np.abs(panels.states.row_basis[k] - householder.states.row_basis[k]).max()
              for k in SHAPES]  # fmt: skip
    assert max(differ) > 0.1, "in the signs of their columns"


def test_one_sided_is_the_smaller_side():
    shapes = {"tall": (6, 4), "wide": (4, 6)}
    grads = draw(0, shapes, STEPS)
    found = run("soap", grads, one_sided=True)
    state, absent = found.state(1), optax.MaskedNode()
    assert state.row_factor["tall"] == absent and state.column_factor["wide"] == absent
    assert state.row_basis["tall"] == absent and state.column_basis["wide"] == absent
    all_close(found.directions, run("soap", grads, max_precond_dim=5).directions)
    square = jol.scale_by_soap(eigenbasis=jol.Eigenbasis(one_sided=True)).init(
        {"w": jnp.zeros((4, 4))}
    )
    assert square.row_factor["w"].shape == (4, 4) and square.column_factor["w"] == absent


def test_sides_over_the_limit_keep_their_axes():
    """In the first gradient's basis of the other side, and equal to the limit is within it."""
    grads = draw(0, {"wide": (4, 6)}, STEPS)
    found = run("soap", grads, max_precond_dim=4, precondition_frequency=NEVER)
    assert found.states.column_basis["wide"] == optax.MaskedNode()
    rows = found.state(1).row_basis["wide"]
    close(found.directions["wide"], rows @ delayed_adam(rows.T @ grads["wide"]))
    none = run("soap", grads, max_precond_dim=3)
    close(none.directions["wide"], delayed_adam(grads["wide"]))


def test_memory_of_each_second_moment():
    params = {"w": jax.ShapeDtypeStruct((4, 6), "float32")}

    def floats(**options):
        (row,) = jol.describe(jol.soap(1e-3, eigenbasis=jol.Eigenbasis(**options)), params).rows
        assert row.rule == "soap"
        return row.state_bytes // 4

    numbers, mu, nu = 2, 24, 24
    sides = 16 + 36
    # Bases in bfloat16 are half a float each.
    assert floats(rotation_precision="bfloat16") == mu + nu + 1.5 * sides + numbers
    sides, rows = 2 * sides, 2 * 16
    assert floats() == mu + nu + sides + numbers
    assert floats(second_moment="factored") == mu + 4 + 6 + sides + numbers
    assert floats(second_moment="factored", one_sided=True) == mu + 4 + 6 + rows + numbers
    state = jol.scale_by_soap(eigenbasis=jol.Eigenbasis(second_moment="factored")).init(
        {"w": jnp.zeros((4, 6))}
    )
    assert state.nu == optax.MaskedNode()


def test_normalized_directions_have_unit_size():
    found = usual(normalize_grads=True, correct_bias=False).directions
    for name in SHAPES:
        sizes = np.sqrt(np.mean(found[name] ** 2, axis=(1, 2)))
        close(sizes, [0] + [1] * (STEPS - 1))
