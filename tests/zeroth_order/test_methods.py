"""Properties of MeZO and the baselines: what the papers say, and exact special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab import zeroth_order as zo
from tests.zeroth_order.problems import (
    AXES,
    FEW_AXES,
    KEY,
    entries,
    few,
    linear,
    quadratic,
    rough,
    run,
    tree,
)

PROBES = zo.Probes(matrix_axes=AXES)
FEW = zo.Probes(matrix_axes=FEW_AXES)
SCALE_FREE = {
    "elementwise": zo.zo_signsgd(0.1, key=KEY),
    "elementwise, averaged": zo.zo_signsgd(0.1, b1=0.9, key=KEY),
    "scalar": zo.zo_signsgd(0.1, rule="scalar", key=KEY),
    "AdaMM": zo.zo_adamm(0.1, key=KEY),
    "Muon": zo.zo_muon(0.1, key=KEY, probes=FEW),
    "sampling Muon": zo.sampling_muon(0.1, key=KEY, probes=FEW),
    "JAGUAR SignSGD": zo.jaguar_signsgd(0.1, key=KEY, probes=FEW),
    "JAGUAR Muon": zo.jaguar_muon(0.1, key=KEY, probes=FEW),
}


@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_scale_of_the_loss_does_not_matter(name):
    # In float32 the last digits of a difference of losses differ between two programs.
    with jax.enable_x64(True):
        tx, params = SCALE_FREE[name], few(dtype="float64")
        plain, _, _ = run(tx, params, rough)
        scaled, _, _ = run(tx, params, lambda p: 1000 * rough(p))
        np.testing.assert_allclose(entries(scaled), entries(plain), rtol=1e-5, atol=1e-6)
        assert (entries(plain) != entries(params)).any()


@pytest.mark.parametrize("times", [0.5, 1.0, 1.5])
def test_mezo_contracts_below_two_over_the_dimension(times):
    # E |x - gamma D z|^2 = (1 - 2 gamma + gamma^2 (d + 2)) |x|^2 on |x|^2 / 2.
    d = 10
    rate = times * 2 / (d + 2)
    tx, x = zo.mezo(rate, eps=1e-2, key=KEY), jnp.ones(d)

    def after(count):
        probes, *rest = tx.init(x)
        updates, _ = tx.update(None, (probes._replace(count=count), *rest), x, value_fn=quadratic)
        return jnp.sum((x + updates) ** 2) / d

    mean = float(jax.jit(jax.vmap(after))(jnp.arange(40_000)).mean())
    np.testing.assert_allclose(mean, 1 - 2 * rate + rate**2 * (d + 2), rtol=0.06)
    assert times == 1.0 or (mean < 1) == (times < 1)


def test_momentum_is_a_heavy_ball_over_the_decayed_estimate():
    params, options = few(), {"eps": 1e-2, "key": KEY}
    whole = zo.mezo(1e-3, momentum=0.9, weight_decay=0.1, **options)
    decay = optax.add_decayed_weights(0.1, {name: name != "bias" for name in params})
    parts = optax.chain(zo.estimate(**options), decay, optax.sgd(1e-3, momentum=0.9))
    ours, theirs = (run(tx, params, rough)[0] for tx in (whole, parts))
    np.testing.assert_array_equal(entries(ours), entries(theirs))


def test_decay_takes_a_mask_and_leaves_out_names_without_one():
    params = {"w": jnp.ones(2), "bias": jnp.ones(2), "layer_norm": {"scale": jnp.ones(2)}}
    flat = {"value_fn": lambda p: 0.0 * quadratic(p)}
    for make in (
        lambda **options: zo.mezo(0.5, weight_decay=0.5, key=KEY, **options),
        lambda **options: zo.forward_gradient(0.5, weight_decay=0.5, key=KEY, **options),
    ):
        tx = make()
        found = entries(tx.update(None, tx.init(params), params, **flat)[0])
        np.testing.assert_allclose(found, [0, 0, 0, 0, -0.25, -0.25])
        tx = make(mask={"w": False, "bias": True, "layer_norm": False})
        found = entries(tx.update(None, tx.init(params), params, **flat)[0])
        np.testing.assert_allclose(found, [-0.25, -0.25, 0, 0, 0, 0])


def test_sign_rules():
    params = few()
    g = run(zo.estimate(key=KEY), params, rough, 1)[2]
    elementwise = run(zo.zo_signsgd(0.5, key=KEY), params, rough, 1)[2]
    np.testing.assert_allclose(entries(elementwise), -0.5 * np.sign(entries(g)))
    scalar = entries(run(zo.zo_signsgd(0.5, rule="scalar", key=KEY), params, rough, 1)[2])
    ratio = entries(g) / scalar
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)  # along z
    assert 0.3 < np.square(scalar / 0.5).mean() < 2 and ratio[0] < 0
    with pytest.raises(ValueError, match="rule is 'noop'"):
        zo.zo_signsgd(0.1, rule="noop", key=KEY)
    with pytest.raises(ValueError, match="must be None"):
        zo.zo_signsgd(0.1, rule="scalar", b1=0.9, key=KEY)


def test_forward_gradients_are_central_differences_of_a_linear_loss():
    with jax.enable_x64(True):
        params = tree(dtype="float64")
        forward = run(zo.forward_gradient(1.0, key=KEY), params, linear(params), 1)[2]
        central = run(zo.mezo(1.0, key=KEY), params, linear(params), 1)[2]
        np.testing.assert_allclose(entries(forward), entries(central), rtol=1e-10)


def test_averaged_forward_gradients():
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    draws = {"w": jnp.array([[1.0, 0, 0], [0, 1.0, 0]])}
    tx = zo.forward_gradient(1.0, key=KEY, probes=zo.Probes(num_directions=2))
    _, state, updates = run(tx, params, linear(params), 1, draws=draws)
    np.testing.assert_allclose(entries(updates), [-0.5, -1.0, 0])
    np.testing.assert_allclose(state[0].losses, [1, 2])


def test_adamm_never_lowers_its_denominators_and_starts_from_zero():
    tx = zo.scale_by_adamm(b1=0.5, b2=0.5, eps=0.0)
    state = tx.init(jnp.zeros(2))
    largest = []
    for g in ([4.0, jnp.nan], [0.0, 1e30], [0.0, 2.0]):
        u, state = tx.update(jnp.array(g), state)
        largest.append(np.asarray(state.nu_max))
    np.testing.assert_allclose(largest, [[8, 0], [8, 0], [8, 2]])
    np.testing.assert_allclose(state.mu, [0.5, 1.0])  # what is not finite never entered
    np.testing.assert_allclose(u, [0.5 / np.sqrt(8), 1 / np.sqrt(2)], rtol=1e-6)


def test_a_box():
    params = {"w": jnp.array([0.95, -0.95])}
    tx = zo.zo_adamm(0.5, box=(-1.0, 1.0), key=KEY)
    loss = linear({"w": jnp.array([-1.0, 1.0])})
    found, _, _ = run(tx, params, loss, 20)
    assert np.abs(entries(found)).max() <= 1
    with pytest.raises(ValueError, match=r"box: got \(1.0, -1.0\)"):
        zo.zo_adamm(0.5, box=(1.0, -1.0), key=KEY)


def test_muon_is_the_matrix_sign_of_each_matrix_and_the_sign_elsewhere():
    params = tree()
    g = run(zo.estimate(key=KEY, matrix_axes=AXES), params, rough, 1)[2]
    updates = run(zo.zo_muon(1.0, key=KEY, probes=PROBES), params, rough, 1)[2]
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(updates[name], -np.sign(g[name]))
    polar = jol.core.newton_schulz.newton_schulz
    np.testing.assert_allclose(updates["kernel"][1], -polar(g["kernel"][1]), atol=1e-5)
    one = -polar(g["attention"][1, :, 2])
    np.testing.assert_allclose(updates["attention"][1, :, 2], one, atol=1e-5)
    np.testing.assert_allclose(updates["embedding"], -polar(g["embedding"]), atol=1e-5)


def test_sampled_orthogonal_directions():
    updates = run(zo.sampling_muon(1.0, key=KEY, probes=PROBES), tree(), rough, 1)[2]
    z = np.asarray(updates["kernel"])
    np.testing.assert_allclose(z @ z.mT, np.tile(np.eye(4), (2, 1, 1)), atol=1e-5)


CASES = {
    # loss, rate, start, end; z = 1, so that the trials are x -+ rate f'(x).
    "ahead": (lambda x: x**2 / 2, 0.5, 1.0, 0.5),
    "keep": (lambda x: x**2 / 2, 3.0, 1.0, 1.0),
    "behind": (jnp.sin, 4.0, 0.0, 4.0),
    "behind, both better": (lambda x: jnp.sin(x) - 0.2 * x**2, 4.0, 0.0, 4.0),
    "behind, not a number ahead": (lambda x: jnp.where(x < -1, jnp.nan, x - x**2), 2.0, 0.0, 2.0),
    "keep, not a number around": (lambda x: jnp.where(abs(x) > 1, jnp.nan, x), 2.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_conservative_takes_the_best_of_three(name):
    loss, rate, start, end = CASES[name]
    tx = zo.conservative(rate, key=KEY)
    value_fn = {"value_fn": lambda p: loss(p["x"]), "draws": {"x": jnp.ones(1)}}
    params = {"x": jnp.asarray(start)}
    updates, state = tx.update(None, tx.init(params), params, **value_fn)
    np.testing.assert_allclose(start + updates["x"], end, rtol=1e-3, atol=1e-3)
    assert state.losses.shape == (5,)


def test_conservative_never_accepts_a_larger_loss():
    tx, params, state = zo.conservative(2.0, key=KEY), few(), None
    losses = [float(rough(params))]
    step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=rough))
    state = tx.init(params)
    for _ in range(12):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(rough(params)))
    assert (np.diff(losses) <= 1e-4).all() and len(set(losses)) > 2
    with pytest.raises(ValueError, match="one two-sided direction"):
        zo.conservative(1.0, key=KEY, probes=zo.Probes(num_directions=2))


# Matrices with a batch axis between theirs, and a vector.
HEADS = zo.Probes(matrix_axes={name: AXES[name] for name in ("attention", "bias")})


def heads():
    return {name: x for name, x in tree().items() if name in HEADS.matrix_axes}


def subspaces(**options):
    chosen = {"rank": 2, "interval": 2, **options}
    return zo.scale_by_subspace_muon(key=KEY, subspace=zo.Subspace(**chosen), probes=HEADS)


def column_space(update):
    u, s, _ = np.linalg.svd(np.asarray(update, np.float64))
    assert s[1] > 1e-3 > 1e4 * s[2], s  # rank 2
    return u[:, :2] @ u[:, :2].T


def test_subspaces_are_redrawn_when_their_time_has_come():
    params, tx = heads(), subspaces()
    found = [run(tx, params, rough, n)[2]["attention"] for n in (1, 2, 3)]
    spaces = [column_space(update[1, :, 2]) for update in found]
    np.testing.assert_allclose(spaces[0], spaces[1], atol=1e-5)
    assert np.abs(spaces[0] - spaces[2]).max() > 0.1
    # One step draws other directions inside than the next.
    first, second = (run(tx, params, quadratic, n)[2]["attention"] for n in (1, 2))
    assert np.abs(first - second).max() > 0.1


def test_what_happens_inside_of_subspaces():
    params = heads()
    found = {
        inner: run(subspaces(inner=inner), params, rough, 1)[2] for inner in ("muon", "svd", "sgd")
    }
    for name in ("muon", "svd"):
        s = np.linalg.svd(found[name]["attention"][0, :, 1], compute_uv=False)
        low, high = (0.999, 1.001) if name == "svd" else (0.3, 1.21)
        assert low < s[1] and s[0] < high and s[2] < 1e-4
        np.testing.assert_array_equal(found[name]["bias"], found["sgd"]["bias"])
    whole = zo.subspace_muon(0.5, weight_decay=0.1, key=KEY, probes=HEADS)
    updates = run(whole, params, rough, 1)[2]
    expected = run(subspaces(interval=100), params, rough, 1)[2]
    matrices = -0.5 * (expected["attention"] + 0.1 * params["attention"])
    np.testing.assert_allclose(updates["attention"], matrices, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], -1e-7 * expected["bias"], rtol=1e-5)


def test_bad_subspaces():
    with pytest.raises(ValueError, match=r"rank is 9 and leaf \['attention'\] has matrices of 6"):
        run(subspaces(rank=9), heads(), rough, 1)
    with pytest.raises(ValueError, match="Subspace.inner is 'lion'"):
        zo.Subspace(inner="lion")
    with pytest.raises(ValueError, match="Subspace.interval is 0"):
        zo.Subspace(interval=0)
