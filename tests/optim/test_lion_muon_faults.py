"""What no gradient, dtype or wrapper may do to the LionMuon family, at default options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol
from jaxopt_lab.core.newton_schulz import newton_schulz
from tests.optim.runs import fast_jit, normal

SHAPES = {"w": (6, 9), "b": (4,)}
SPECTRAL = {
    "lion_muon": functools.partial(jol.lion_muon, period=1),
    "sign_muon": functools.partial(jol.sign_muon, period=1),
    "stable rank": functools.partial(jol.lion_muon, stable_rank_threshold=1.0),
    "muon": jol.muon,
    "d_muon": functools.partial(jol.d_muon, weight_decay=0.0),
}
ALL = SPECTRAL | {
    "alternating": jol.lion_muon,
    "Lion": functools.partial(jol.lion_muon, period=math.inf),
    "legacy_sign_muon": jol.legacy_sign_muon,
    "signum": jol.signum,
    "normalized_sgd": jol.normalized_sgd,
}
spectral = pytest.mark.parametrize("name", SPECTRAL)
every = pytest.mark.parametrize("name", ALL)


def updates_of(tx, stream):
    """The updates of a stream of gradients, and the last state."""
    update, state, out = fast_jit(tx.update), tx.init(stream[0]), []
    params = jax.tree.map(jnp.ones_like, stream[0])
    for grads in stream:
        u, state = update(grads, state, params)
        out.append(jax.device_get(u))
    return out, state


def counted(state):
    return np.sum(jax.tree.leaves(optax.tree.get_all_with_path(state, "notfinite_count")[0][1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@spectral
def test_the_scale_of_a_matrix_does_not_matter(name, dtype):
    # Squares stay below the largest float32.
    grads = jnp.clip(normal(0, {"w": (6, 9)})["w"], -1.7, 1.7).astype(dtype)
    tx = SPECTRAL[name](1.0)
    update, state = fast_jit(tx.update), tx.init({"w": grads})
    plain, _ = update({"w": grads}, state, {"w": grads})
    assert np.linalg.norm(plain["w"].astype("float32")) > 0.1
    for scale in (1e-30, 1e-10, 1e18):
        # A power of two: multiplying by it rounds nothing.
        power = 2.0 ** math.floor(math.log2(scale))
        multiple = (power * grads.astype("float32")).astype(dtype)
        scaled, _ = update({"w": multiple}, state, {"w": grads})
        np.testing.assert_array_equal(scaled["w"], plain["w"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_iteration_of_a_scaled_matrix_is_the_same(dtype):
    x = normal(0, {"w": (2, 6, 9)})["w"]
    x = x.at[1].multiply(2.0**80)
    alone = newton_schulz(x[1] * 2.0**-80, compute_dtype=dtype)
    both = newton_schulz(x, compute_dtype=dtype)
    np.testing.assert_array_equal(both[1].astype("float32"), alone.astype("float32"))


@spectral
def test_a_large_leaf_behind_a_global_clip_takes_nothing_from_the_others(name):
    g = normal(1, {"w": (64, 64)})["w"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), SPECTRAL[name](1.0))
    (u,), _ = updates_of(tx, [{"w": g, "big": g * 1e10}])
    np.testing.assert_allclose(np.linalg.norm(u["w"]), np.linalg.norm(u["big"]), rtol=1e-2)


def spoiled(grads, entry):
    """The gradient with one entry of matrix and of vector replaced."""
    return {"w": grads["w"].at[1, 2].set(entry), "b": grads["b"].at[1].set(entry)}


@pytest.mark.parametrize("entry", [np.nan, 1e25], ids=str)
@every
def test_a_refused_gradient_never_enters_the_state(name, entry):
    grads = [normal(seed, SHAPES) for seed in range(6)]
    tx = ALL[name](1.0)
    before, state = updates_of(tx, grads[:3])
    after, new = updates_of(tx, [*grads[:3], spoiled(grads[3], entry), *grads[4:]])
    for u in after:
        assert all(np.isfinite(x).all() for x in u.values())
    # Nothing of the parameters moves there, decay included: the method has none.
    assert after[3]["w"][1, 2] == 0 and after[3]["b"][1] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(new)))
    # The next good gradient moves it again.
    assert after[4]["w"][1, 2] != 0 and after[4]["b"][1] != 0
    if name in SPECTRAL:
        assert not after[3]["w"].any() and counted(new) == 1 and counted(state) == 0


def test_a_refused_entry_of_a_sign_step_leaves_the_others_alone():
    grads = [normal(seed, SHAPES) for seed in range(2)]
    tx = ALL["Lion"](1.0)
    good, kept = updates_of(tx, grads)
    bad, state = updates_of(tx, [grads[0], spoiled(grads[1], np.nan)])
    same = np.ones((6, 9), bool)
    same[1, 2] = False
    np.testing.assert_array_equal(bad[1]["w"][same], good[1]["w"][same])
    mu, wanted = (optax.tree.get(s, "mu", filtering=_of_matrices)["w"] for s in (state, kept))
    np.testing.assert_array_equal(mu[same], wanted[same])
    np.testing.assert_allclose(mu[1, 2], 0.01 * grads[0]["w"][1, 2], rtol=1e-6)
    assert counted(state) == 0


def _of_matrices(path, value):
    del path
    return "w" in value and not isinstance(value["w"], optax.MaskedNode)


def test_an_iteration_in_float16_takes_what_float16_does_not_hold():
    g = {"w": jax.random.normal(jax.random.key(0), (4, 6))}
    tx = jol.lion_muon(1.0, period=1, newton_schulz=jol.NewtonSchulz(steps=2, dtype="float16"))
    update = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0]["w"])
    for scale in (2.0**-40, 2.0**20):
        np.testing.assert_allclose(update({"w": scale * g["w"]}), update(g), rtol=1e-2, atol=1e-3)


def test_the_package_and_the_function_of_one_name_can_both_be_imported():
    import jaxopt_lab.optim.lion_muon.transform
    from jaxopt_lab.optim import lion_muon
    from jaxopt_lab.optim.lion_muon import transform

    assert lion_muon is jol.lion_muon is jaxopt_lab.optim.lion_muon
    assert transform.scale_by_lion_muon is jol.scale_by_lion_muon


def test_refused_matrices_of_a_stack_are_counted_one_by_one():
    axes = {"w": Axes(2, 0)}
    grads = {"w": normal(0, {"w": (4, 3, 5)})["w"].at[1, 2, 3].set(jnp.nan)}
    tx = jol.scale_by_lion_muon(period=1, matrix_axes=axes)
    (u,), state = updates_of(tx, [grads])
    assert state.notfinite_count["w"].tolist() == [0, 0, 1]
    assert not u["w"][:, 2].any() and u["w"][:, :2].all()
    assert not state.mu["w"][:, 2].any() and state.mu["w"][:, :2].all()


def test_a_refused_matrix_does_not_decay():
    grads = spoiled(normal(0, SHAPES), np.nan)
    tx = jol.lion_muon(1.0, period=1, weight_decay=0.5)
    u, _ = fast_jit(tx.update)(grads, tx.init(grads), jax.tree.map(jnp.ones_like, grads))
    assert not u["w"].any() and u["b"][1] == 0 and (u["b"][2:] != 0).all()


@every
def test_half_precision_parameters_take_the_steps_of_float32(name):
    shapes = {"w": (4, 4), "b": (4,)}
    grads = {k: np.full(s, 1e-3, np.float32) for k, s in shapes.items()}
    steps = {}
    for kind in ("float32", "float16"):
        tx = ALL[name](1e-2)
        stream = [jax.tree.map(lambda g, kind=kind: jnp.asarray(g, kind), grads)] * 20
        (*_, u), _ = updates_of(tx, stream)
        assert all(x.dtype == kind for x in u.values())
        steps[kind] = u
    for leaf in shapes:
        half = steps["float16"][leaf].astype("float32")
        np.testing.assert_allclose(half, steps["float32"][leaf], rtol=0.03)


@every
def test_a_rate_of_another_dtype_leaves_the_updates_theirs(name):
    for dtype, rate in (
        ("bfloat16", np.float64(1e-3)),
        ("bfloat16", np.array(1e-3, jnp.float16)),
        ("float32", jnp.bfloat16(1e-3)),
    ):
        grads = jax.tree.map(lambda g, d=dtype: g.astype(d), normal(0, SHAPES))
        tx = ALL[name](rate, weight_decay=np.float64(0.1)) if name != "d_muon" else jol.d_muon(rate)
        u, _ = jax.eval_shape(tx.update, grads, tx.init(grads), grads)
        assert {x.dtype for x in u.values()} == {jnp.dtype(dtype)}


@every
def test_serialisers_can_write_the_state(name):
    params = normal(0, SHAPES)
    tx = ALL[name](1e-3)
    state = tx.init(params)
    serialization.from_bytes(state, serialization.to_bytes(state))
    assert not any(
        jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(state)
    )
    optax.tree.norm(state)


@every
def test_numbers_can_be_injected(name):
    params = normal(0, SHAPES)
    factory = ALL[name]
    bound = factory if not isinstance(factory, functools.partial) else factory.func
    options = {} if bound is factory else factory.keywords
    tx = optax.inject_hyperparams(bound)(1e-2, **options)
    (injected,), _ = updates_of(tx, [params])
    (plain,), _ = updates_of(factory(1e-2), [params])
    for leaf in SHAPES:
        np.testing.assert_allclose(injected[leaf], plain[leaf], rtol=1e-2, atol=1e-5)


def test_an_injected_mask_is_refused_with_the_place_for_it():
    params = normal(0, SHAPES)
    tx = optax.inject_hyperparams(jol.lion_muon)(1e-3, weight_decay=0.1, mask=lambda p: True)
    with pytest.raises(ValueError, match="Routing"):
        tx.init(params)
    routing = jol.Routing(decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    tx = optax.inject_hyperparams(jol.lion_muon)(1.0, weight_decay=0.1, routing=routing)
    zeros = jax.tree.map(jnp.zeros_like, params)
    u, _ = fast_jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_allclose(u["w"], -0.1 * params["w"], rtol=1e-6)
    assert not u["b"].any()


def test_momentum_of_muon_counts_without_nesterov():
    grads = [normal(seed, SHAPES) for seed in range(3)]
    (*_, without), (*_, with_momentum) = (
        updates_of(jol.muon(1e-3, nesterov=False, momentum=m), grads)[0] for m in (0.0, 0.99)
    )
    assert np.abs(with_momentum["w"] - without["w"]).max() > 1e-4


@every
def test_weight_decay_may_be_a_schedule(name):
    params = jax.tree.map(jnp.ones_like, normal(0, SHAPES))
    zeros = jax.tree.map(jnp.zeros_like, params)
    options = {"fallback": jol.AdamW()} if name == "legacy_sign_muon" else {}
    tx = ALL[name](0.5, weight_decay=lambda count: 0.1 * count, **options)
    found, _ = updates_of(tx, [zeros, zeros, zeros])
    rates = {"alternating": [0.5, 0.025, 0.5], "Lion": [0.025] * 3}
    rates |= {"legacy_sign_muon": [0.5, 0.125, 0.125]}
    for t, u in enumerate(found):
        np.testing.assert_allclose(u["w"], -0.1 * t * rates.get(name, [0.5] * 3)[t], rtol=1e-5)
        np.testing.assert_allclose(u["b"], -0.1 * t * 0.5, rtol=1e-5)


@every
def test_the_gradient_of_an_update_exists(name):
    params = normal(0, SHAPES)
    tx = ALL[name](1e-2)
    state = tx.init(params)

    def loss(grads):
        updates, _ = tx.update(grads, state, params)
        return sum(jnp.sum(jnp.square(u)) for u in updates.values())

    for grads in (normal(1, SHAPES), jax.tree.map(jnp.zeros_like, params)):
        slopes = fast_jit(jax.grad(loss))(grads)
        assert jnp.isfinite(slopes["w"]).all()
