"""Properties of learnable direction sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import zeroth_order as zo
from tests.zeroth_order.problems import FEW_AXES, KEY, entries, few, linear, rough, run

STAY = optax.set_to_zero()
# Signs compile sooner than normals, which other tests draw.
PROBES = zo.Probes(zo.signs(), matrix_axes=FEW_AXES)


def policy(loss, params, steps=1, **options):
    """The mean after some steps in which the parameters stay."""
    state = run(zo.ldsd(STAY, key=KEY, **options), params, loss, steps)[1]
    return mean_of(state, options.get("probes", zo.Probes()))


def mean_of(state, probes=PROBES):
    return entries(jax.jit(zo.policy_mean, static_argnums=1)(state, probes))


def test_one_candidate_is_mezo():
    params = few()
    ours = zo.ldsd(optax.sgd(1e-3), candidates=1, key=KEY, probes=PROBES)
    theirs = zo.mezo(1e-3, key=KEY, probes=PROBES)
    (p, state, _), (q, _, _) = (run(tx, params, rough) for tx in (ours, theirs))
    np.testing.assert_allclose(entries(p), entries(q), rtol=1e-6, atol=1e-7)
    assert not mean_of(state).any()


def test_constants_change_nothing_and_scales_scale():
    with jax.enable_x64(True):
        params = {"w": jnp.arange(6.0)}
        found = policy(rough, params)
        np.testing.assert_allclose(policy(lambda p: rough(p) + 4, params), found, rtol=1e-8)
        np.testing.assert_allclose(policy(lambda p: 3 * rough(p), params), 3 * found, rtol=1e-8)


@pytest.mark.parametrize("candidates,std", [(2, 1.0), (5, 0.1)])
def test_the_policy_drifts_along_minus_the_gradient(candidates, std):
    # E of the policy's gradient is eps grad, whatever the number and spread of candidates.
    x = jnp.array([1.0, -2.0, 0.5, 3.0])
    tx = zo.ldsd(STAY, candidates=candidates, eps=0.5, policy_std=std, policy_rate=1.0, key=KEY)

    def moved(count):
        state = tx.init(x)
        state = state._replace(probes=state.probes._replace(count=count))
        return zo.policy_mean(tx.update(None, state, x, value_fn=lambda y: y @ x)[1])

    mean = np.asarray(jax.jit(jax.vmap(moved))(jnp.arange(8_000))).mean(0)
    np.testing.assert_allclose(mean, -0.5 * x, atol=0.08)


def test_the_law_of_alignment():
    # cos(mu, -grad) is about (1 + d / ((K - 1) T))^(-1/2): 0.82 here.
    d, steps = 200, 100
    slope = jax.random.normal(jax.random.key(4), (d,))
    tx = zo.ldsd(STAY, candidates=5, policy_rate=1.0, eps=1e-2, key=KEY)

    def step(state, _):
        return tx.update(None, state, jnp.zeros(d), value_fn=lambda y: y @ slope)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(tx.init(jnp.zeros(d)))
    mean = zo.policy_mean(state)
    cosine = -mean @ slope / jnp.linalg.norm(mean) / jnp.linalg.norm(slope)
    assert 0.77 < cosine < 0.86


def test_without_a_rate_the_policy_stays():
    assert not policy(rough, few(), candidates=2, policy_rate=0.0, probes=PROBES).any()


def test_a_narrow_policy_differentiates_along_its_mean():
    with jax.enable_x64(True):
        params, mean = few(dtype="float64"), few(5, "float64")
        tx = zo.ldsd(optax.sgd(1.0), candidates=3, policy_std=1e-9, key=KEY, probes=PROBES)
        state = tx.init(params)._replace(mean=mean)
        _, state, updates = run(tx, params, linear(params), 1, state=state)
        wanted = -(entries(mean) @ entries(params)) * entries(mean)
        np.testing.assert_allclose(entries(updates), wanted, rtol=1e-6)
        change = mean_of(state) - entries(mean)
        assert np.isfinite(change).all() and 1e-6 < np.abs(change).max() < 1


CANDIDATES = {"x": jnp.array([[3.0, 0.0], [-1.0, 0.0], [0.0, -2.0], [0.0, -2.0]])}


def chosen(loss=None, key=KEY, **options):
    """The update on candidates with losses 3, -1, -2, -2 (times eps)."""
    loss = loss or (lambda p: jnp.sum(p["x"]))
    tx = zo.ldsd(optax.sgd(1.0), candidates=4, eps=0.5, key=key, **options)
    params = {"x": jnp.zeros(2)}
    return tx.update(None, tx.init(params), params, value_fn=loss, draws=CANDIDATES)


def test_selection():
    np.testing.assert_allclose(chosen()[0]["x"], [0, -4])  # the first of equals: D = -2
    np.testing.assert_allclose(chosen(selection="mean", selected=3)[0]["x"], [-1 / 3, -8 / 3])
    one = jax.jit(lambda seed: chosen(selection="random", key=jax.random.key(seed))[0]["x"])
    drawn = {tuple(one(seed).tolist()) for seed in range(12)}
    assert drawn == {(-9, 0), (-1, 0), (0, -4)}


def test_a_loss_that_is_not_finite_is_not_selected_and_does_not_move_the_policy():
    def loss(p):
        return jnp.where(p["x"][1] < 0, jnp.nan, jnp.sum(p["x"]))

    updates, state = chosen(loss, policy_rate=1.0)
    np.testing.assert_allclose(updates["x"], [-1, 0])
    # Losses 1.5 and -0.5 about 0.5, of candidates (3, 0) and (-1, 0), over K - 1 = 3.
    np.testing.assert_allclose(state.mean["x"], [-(3 * 1 + 1 * 1) / 3, 0], rtol=1e-5)
    assert state.probes.notfinite_count == 2
    found, _ = chosen(lambda p: jnp.where(p["x"][1] < 0, -jnp.inf, jnp.sum(p["x"])))
    np.testing.assert_allclose(found["x"], updates["x"])  # the smallest of the finite ones
    updates, state = chosen(lambda p: jnp.nan * p["x"][0])
    assert not entries(updates).any() and not entries(state.mean).any()


def test_the_policy_moves_at_the_start_of_the_next_step_and_waits_where_a_guard_drops_one():
    tx, x = zo.ldsd(optax.sgd(0.1), candidates=3, policy_rate=1.0, key=KEY), jnp.array([1.0, -2.0])

    @jax.jit
    def after(state, factor):
        return tx.update(None, state, x, value_fn=lambda y: factor * jnp.sum(y**2))[1]

    start = tx.init(x)
    first = after(start, 1.0)
    assert not first.mean.any() and zo.policy_mean(first).all()
    np.testing.assert_allclose(after(first, 1.0).mean, zo.policy_mean(first), rtol=1e-5)

    def kept(new, old):
        return old if jnp.issubdtype(new.dtype, jnp.inexact) else new

    # Whoever drops a step lets its counters pass, and may keep the old mean or take the new one.
    bad = after(first, jnp.nan)
    dropped = jax.tree.map(kept, bad, first)
    assert dropped.probes.count == 2
    np.testing.assert_array_equal(zo.policy_mean(dropped), zo.policy_mean(first))
    np.testing.assert_allclose(zo.policy_mean(bad), zo.policy_mean(first), rtol=1e-5)


def test_over_jaguar_the_sign_of_the_estimate():
    params = few()
    base = optax.chain(
        zo.scale_by_coordinate_momentum(b1=0.0),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(0.25),
    )
    all_of_them = zo.Probes(zo.sparse(params_ratio=1.0, noise=zo.signs()), matrix_axes=FEW_AXES)
    options = {"candidates": 2, "key": KEY}
    updates = run(zo.ldsd(base, probes=all_of_them, **options), params, rough, 1)[2]
    plain = run(zo.ldsd(optax.sgd(1.0), probes=PROBES, **options), params, rough, 1)[2]
    np.testing.assert_array_equal(entries(updates), 0.25 * np.sign(entries(plain)))


def test_a_subset_moves_its_own_policy_and_momentum_only():
    base = zo.scale_by_coordinate_momentum(b1=0.5)
    probes = zo.Probes(zo.sparse(params_ratio=0.3), matrix_axes=FEW_AXES)
    tx = zo.ldsd(base, candidates=2, start="random", key=KEY, probes=probes)
    params = few()
    start = jax.jit(tx.init)(params)
    _, state, _ = run(tx, params, rough, 1, state=start)
    same = entries(start.mean) == mean_of(state, probes)
    assert 0 < (~same).sum() < same.sum()
    np.testing.assert_array_equal(entries(state.base.mu) == 0, same)


def test_candidates_with_subsets_of_their_own():
    params = {name: jnp.ones(3) for name in "abcd"}
    one_leaf = zo.Probes(zo.sparse(params_ratio=0.25, per_probe=True, noise=zo.signs()))
    tx = zo.ldsd(optax.sgd(1.0), candidates=6, policy_rate=1.0, key=KEY, probes=one_leaf)
    _, state, updates = run(tx, params, lambda p: sum((x**3).sum() for x in p.values()), 1)
    assert sum(bool(x.any()) for x in updates.values()) == 1
    moved = [bool(x.any()) for x in zo.policy_mean(state, one_leaf).values()]
    assert sum(moved) > 1  # where any candidate was, not the chosen one alone


def test_starts():
    params = few()
    random = jax.jit(zo.ldsd(STAY, start="random", key=KEY, probes=PROBES).init)(params).mean
    norms = [np.linalg.norm(np.asarray(x)) for x in random.values()]
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    options = {"candidates": 1, "policy_rate": 0.0, "probes": PROBES}
    slope = jax.tree.map(lambda x: x + 1, params)
    loss = linear(slope)
    found = policy(loss, params, start="gradient", start_sign=-1.0, steps=2, **options)
    np.testing.assert_allclose(found, -entries(slope), rtol=1e-5)
    tx = zo.ldsd(STAY, start="estimate", key=KEY, **options)
    mean = run(tx, params, loss, 2)[1].mean
    norms = [np.linalg.norm(np.asarray(x)) for x in mean.values()]
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert entries(mean) @ entries(slope) > 0
    again = run(tx, params, loss, 4)[1].mean  # found once
    np.testing.assert_array_equal(entries(mean), entries(again))


def test_candidates_are_evaluated_in_chunks():
    with jax.enable_x64(True):
        found = [
            run(zo.ldsd(optax.sgd(0.1), candidates=4, key=KEY, probes=probes), few(), rough)
            for engine in (zo.sequential(), zo.chunked(2))
            for probes in [zo.Probes(zo.signs(), engine=engine)]
        ]
        losses = [np.asarray(state.probes.losses) for _, state, *_ in found]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-10)


def test_bad_options():
    for options, message in (
        ({"candidates": 0}, "candidates is 0"),
        ({"selection": "worst"}, "selection is 'worst'"),
        ({"start": "one"}, "start is 'one'"),
        ({"candidates": 2, "selection": "mean"}, "selected is 3; there are 2"),
        ({"policy_rate": -1.0}, "policy_rate: got -1.0"),
        ({"probes": zo.Probes(engine=zo.chunked(2))}, r"5 directions do not divide into chunked"),
        ({"probes": zo.Probes(two_sided=False)}, "ldsd takes one two-sided direction"),
    ):
        with pytest.raises(ValueError, match=message):
            zo.ldsd(STAY, key=KEY, **options)
    tx = zo.ldsd(STAY, start="gradient", key=KEY)
    with pytest.raises(ValueError, match="start='gradient' cannot be repeated"):
        tx.update(None, tx.init(jnp.ones(2)), jnp.ones(2), losses=jnp.zeros(6))
