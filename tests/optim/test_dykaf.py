"""Properties of DyKAF as an optimizer, in double precision.

Those of its factors alone are in tests/core/test_kronecker.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.kronecker import ksl_step
from tests.optim.eigenbasis_runs import (
    NEVER,
    NUMBERS,
    RATE,
    delayed_adam,
    draw,
    orthogonal,
    reordered,
    run,
    turned,
)

SHAPES = {"square": (4, 4), "wide": (4, 6)}
STEPS = 9
# Four leaves of seven matrices, all of them (4, 6) or the transpose.
LAYOUTS = {
    "heads": MuonDimensionNumbers(0, (1, 2)),
    "stack": MuonDimensionNumbers(1, 2),
    "tall": MuonDimensionNumbers(0, 1),
    "wide": MuonDimensionNumbers(0, 1),
}
MIXED = {"heads": (4, 2, 3), "stack": (4, 4, 6), "tall": (6, 4), "wide": (4, 6)}

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def all_close(a, b, atol=1e-10):
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


@functools.cache
def usual(**options):
    """One run of the defaults that many tests look at."""
    return run("dykaf", draw(0, SHAPES, STEPS), params=draw(1, SHAPES), **options)


def test_first_bases_are_the_singular_vectors():
    """From multiples of the identity, for distinct singular values; by decreasing value."""
    grads = draw(0, SHAPES, 1)
    state = run("dykaf", grads, init="eps").state(1)
    for name in SHAPES:
        u, sizes, vh = np.linalg.svd(grads[name][0], full_matrices=False)
        k = len(sizes)
        close(np.abs(state.row_basis[name].T @ u), np.eye(4))
        close(np.abs(state.column_basis[name][:, :k].T @ vh.T), np.eye(k))


def test_kronecker_start_and_the_step_after_it():
    grads = draw(0, SHAPES, STEPS)
    state = usual().state(1)
    b = NUMBERS["b2"]
    for name in SHAPES:
        u, sizes, vh = np.linalg.svd(grads[name][0])
        start = [sizes[0] * np.outer(x, x) for x in (u[:, 0], vh[0])]
        with jax.enable_x64(True):
            want = ksl_step(*map(jnp.asarray, (*start, grads[name][0])), decay=b, weight=1 - b)
        close(state.row_factor[name], want[0])
        close(state.column_factor[name], want[1])
        close(np.abs(state.row_basis[name][:, 0] @ u[:, 0]), 1)
        close(np.abs(state.column_basis[name][:, 0] @ vh[0]), 1)


@pytest.mark.parametrize("options", [{}, {"integrator": "parallel"}, {"init": "eps"}], ids=str)
def test_turned_axes_turn_the_steps(options):
    """The whole optimizer commutes with W -> P W Q^T; first bases are a choice, and turned too."""
    grads = draw(0, SHAPES, STEPS)
    rows = {k: orthogonal(1, s[0]) for k, s in SHAPES.items()}
    columns = {k: orthogonal(2, s[1]) for k, s in SHAPES.items()}

    def turn(tree):
        return jax.tree.map(lambda x, p, q: p @ x @ q.T, tree, rows, columns)

    plain = run("dykaf", grads, eps=0.0, **options)
    later = jax.tree.map(lambda g: g[1:], turn(grads))
    state = turned(plain.state(1), rows, columns)
    other = run("dykaf", later, eps=0.0, state=state, **options)
    want = jax.tree.map(lambda x: x[1:], turn(plain.directions))
    all_close(other.directions, want, atol=1e-7)
    assert np.abs(want["wide"]).max() > 1


def test_order_and_signs_of_basis_columns_are_a_choice():
    """And the refresh, at the third step and after, puts shuffled columns into order."""
    rest = jax.tree.map(lambda g: g[2:], draw(0, SHAPES, STEPS))
    state = run("dykaf", draw(0, SHAPES, STEPS), precondition_frequency=2).state(2)
    plain = run("dykaf", rest, state=state, precondition_frequency=3)
    other = run("dykaf", rest, state=reordered(state, 5), precondition_frequency=3)
    all_close(other.directions, plain.directions)
    assert not np.allclose(other.states.mu["wide"][0], plain.states.mu["wide"][0])


def test_without_sides_it_is_adam_that_ignores_the_first_gradient():
    grads = draw(0, {"wide": (4, 6)}, STEPS)
    found = run("dykaf", grads, max_precond_dim=0)
    close(found.directions["wide"], delayed_adam(grads["wide"]))


@pytest.mark.parametrize("max_precond_dim", [0, None])
def test_zero_gradients_after_the_first_leave_pure_decay(max_precond_dim):
    shapes = SHAPES if max_precond_dim is None else {"wide": (4, 6)}
    params, grads = draw(1, shapes), draw(0, shapes, 4)
    for grad in grads.values():
        grad[1:] = 0
    options = {} if max_precond_dim is None else {"max_precond_dim": max_precond_dim}
    found = run("dykaf", grads, params=params, weight_decay=0.5, **options)
    shrinking = (1 - RATE * 0.5) ** np.arange(4)
    close(found.params["wide"], shrinking[:, None, None] * params["wide"])


def test_zero_gradients_shrink_the_factors_alone():
    started = usual().state(STEPS)
    b = NUMBERS["b2"]
    zeros = {k: np.zeros((1, *s)) for k, s in SHAPES.items()}
    state = run("dykaf", zeros, state=started, precondition_frequency=NEVER).state(1)
    for name in ("row_factor", "column_factor"):
        shrunk = jax.tree.map(lambda x: np.sqrt(b) * x, getattr(started, name))
        all_close(getattr(state, name), shrunk, atol=1e-13)
    chex.assert_trees_all_equal(state.row_basis, started.row_basis)
    chex.assert_trees_all_equal(state.column_basis, started.column_basis)


def test_bases_change_every_so_many_steps_and_at_no_other():
    for frequency in (1, 3, NEVER):
        states = usual(precondition_frequency=frequency).states
        for name in ("row_basis", "column_basis"):
            for basis in getattr(states, name).values():
                changed = [not np.array_equal(basis[t], basis[t - 1]) for t in range(1, STEPS)]
                assert changed == [t % frequency == 0 for t in range(1, STEPS)]
                gram = basis.mT @ basis
                close(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=1e-12)


def test_refresh_follows_the_factors():
    """One power iteration in decreasing order, and what is stored in the bases goes with them."""
    never = usual(precondition_frequency=NEVER).state(4)
    state = usual().state(4)
    for name in SHAPES:
        orders = []
        for side in ("row", "column"):
            factor = getattr(never, f"{side}_factor")[name]
            old = getattr(never, f"{side}_basis")[name]
            orders.append(np.argsort(-np.diag(old.T @ factor @ old)))
            want = np.linalg.qr(factor @ old[:, orders[-1]])[0]
            close(np.abs(want.T @ getattr(state, f"{side}_basis")[name]), np.eye(len(want)))
        close(state.nu[name], never.nu[name][orders[0]][:, orders[1]], atol=1e-15)
        momenta = [s.row_basis[name] @ s.mu[name] @ s.column_basis[name].T for s in (never, state)]
        close(*momenta)


DECAY = 0.5


def test_decay_beside_the_step_or_after_it():
    free = usual(precondition_frequency=NEVER).directions
    options = {"precondition_frequency": NEVER, "weight_decay": DECAY}
    beside, after = usual(**options), usual(**options, decay_rate=RATE)
    for name, w in draw(1, SHAPES).items():
        v = w
        for t in range(STEPS):
            if t > 0:  # nothing happens at the first gradient
                w = w - RATE * free[name][t] - RATE * DECAY * w
                v = (1 - RATE * DECAY) * (v - RATE * free[name][t])
            close(beside.params[name][t], w)
            close(after.params[name][t], v)
    assert not np.allclose(beside.params["wide"], after.params["wide"], atol=1e-3)


def test_first_gradient_without_skipping():
    """It enters its own basis: every singular value becomes 1, and weights decay at once."""
    grads, params = draw(0, SHAPES, STEPS), draw(1, SHAPES)
    options = {"init": "eps", "weight_decay": DECAY, "skip_first_step": False}
    found = run("dykaf", grads, params=params, **options)
    for name in SHAPES:
        u, _, vh = np.linalg.svd(grads[name][0], full_matrices=False)
        close(found.directions[name][0], u @ vh + DECAY * params[name], atol=1e-6)
        changed = [not np.array_equal(*found.states.row_basis[name][t - 1 : t + 1])
                   for t in range(1, STEPS)]  # fmt: skip
        assert changed == [(t + 1) % 3 == 0 for t in range(1, STEPS)], (
            "the third, sixth, ... update"
        )
    assert found.states.age["wide"].tolist() == list(range(2, STEPS + 2))


def mixed_gradients():
    """One matrix waits for its first gradient, one starts with rank one, all others are usual."""
    grads = draw(0, MIXED, STEPS)
    grads["stack"][:2, 1] = 0
    grads["stack"][0, 2] = np.outer(grads["stack"][0, 2][:, 0], grads["stack"][0, 2][0])
    return grads


@functools.cache
def mixed_run(**options):
    options = {"weight_decay": 0.1, **options}
    return run("dykaf", mixed_gradients(), params=draw(1, MIXED), layouts=LAYOUTS, **options)


def matrices(tree):
    """The seven matrices of a mixed tree, each after the axes that come first."""
    out = {f"stack{i}": tree["stack"][..., i, :, :] for i in range(4)}
    heads = tree["heads"]
    return out | {
        **{"wide": tree["wide"], "tall": tree["tall"]},
        "heads": heads.reshape((*heads.shape[:-3], 4, 6)),
    }


def test_leaves_and_stacks_equal_matrices_alone():
    """Also one that starts late, and attention heads as the matrix that they form."""
    # The first refresh finds factors of full rank: elsewhere rounding decides about their bases.
    options = {"weight_decay": 0.1, "precondition_frequency": 6}
    together = mixed_run(**options)
    grads = matrices(mixed_gradients())
    params = matrices(draw(1, MIXED))
    found = matrices(together.params)
    for name in grads:
        alone = run("dykaf", {"w": grads[name]}, params={"w": params[name]}, **options)
        close(found[name], alone.params["w"], atol=1e-9)
    assert together.states.age["stack"].T.tolist() == [
        list(range(1, STEPS + 1)),
        [0, 0, *range(1, STEPS - 1)],
        *[list(range(1, STEPS + 1))] * 2,
    ]
    np.testing.assert_array_equal(found["stack1"][:3], np.broadcast_to(params["stack1"], (3, 4, 6)))
    assert np.abs(found["stack1"][3] - params["stack1"]).max() > 1e-3


def test_staggered_refreshes_take_turns():
    """Of seven matrices three, three and one; each is what a refresh at that step gives."""
    period = 3
    # Factors of full rank from the start, so that all basis vectors are determined.
    options = {"init": "eps", "layouts": LAYOUTS}
    staggered = mixed_run(stagger=True, precondition_frequency=period, init="eps")
    grads = mixed_gradients()
    refreshed = np.zeros((7, STEPS), bool)
    for t in range(1, STEPS):
        state = staggered.state(t)
        one = jax.tree.map(lambda g, t=t: g[t : t + 1], grads)
        with_refresh, without = (
            sides(run("dykaf", one, state=state, precondition_frequency=f, **options).state(1))
            for f in (1, NEVER)
        )
        after = sides(staggered.state(t + 1))
        for i, name in enumerate(after):
            refreshed[i, t] = not np.array_equal(after[name][0], without[name][0])
            for x, y in zip(after[name], (with_refresh if refreshed[i, t] else without)[name],
                            strict=True):  # fmt: skip
                close(x, y)
    # Nothing is refreshed at the start, and one matrix has only zeros until its third gradient.
    np.testing.assert_array_equal(refreshed[:, 0], False)
    started = np.array([name != "stack1" for name in after])
    for first in (1, 4, 6):
        counts = refreshed[:, first : first + period].sum(axis=1)
        np.testing.assert_array_equal(counts[started], 1)
    np.testing.assert_array_equal(refreshed[~started, 3:].sum(), 2)
    np.testing.assert_array_equal(refreshed[started, 1:].sum(axis=0) <= 3, True)


def sides(state):
    """Bases and moments of each of the seven matrices."""
    fields = (state.row_basis, state.column_basis, state.mu, state.nu)
    out = {f"stack{i}": [x["stack"][i] for x in fields] for i in range(4)}
    return out | {name: [x[name] for x in fields] for name in ("heads", "tall", "wide")}
