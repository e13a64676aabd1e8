"""Directions of low rank: moments, engines, losses that form no matrix, memory, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from tests.zeroth_order.problems import AXES, KEY, entries, linear, rough, run, tree

SMALL = {"vocab_size": 40, "width": 16, "depth": 2, "heads": 4, "hidden": 24, "context": 8}
OLD = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "tied": False}
CONFIGS = {
    "llama": DecoderConfig(**SMALL, kv_heads=2, loop="scanned", compute_dtype="float64"),
    "gpt": DecoderConfig(**SMALL, **OLD, compute_dtype="float64"),
}


def decoder(config, dtype="float64"):
    """Parameters whose vectors are not all zeros and ones, a batch, and both losses."""
    params = models.init_params(config, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    shaken = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.map(lambda x: x.astype(dtype), treedef.unflatten(shaken))
    batch = {"tokens": jax.random.randint(jax.random.key(2), (3, 9), 0, config.vocab_size)}
    chunks = {"head_chunks": 2} if config.tied else {}

    def value_fn(params):
        return models.loss(config, params, batch, **chunks)[0]

    probe_fn = zo.beside(lambda p, side: models.loss(config, p, batch, side=side, **chunks)[0])
    return params, value_fn, probe_fn


def test_factors_are_those_of_the_whole_and_of_its_parts():
    found = Direction(zo.low_rank(rank=2), KEY, 0, leaves_of(tree(), AXES))
    for i, name in enumerate(sorted(AXES)):
        whole, factors = np.asarray(found.of(i)), found.factors_of(i)
        if factors is None:
            assert name in ("bias", "scale")
            np.testing.assert_array_equal(
                whole, Direction(zo.gaussian(), KEY, 0, leaves_of(tree(), AXES)).of(i)
            )
            continue
        a, b = map(np.asarray, factors)
        product = np.einsum("...nr,...mr->...nm", a, b)
        whole = np.moveaxis(whole, 2, 1) if name == "attention" else whole
        np.testing.assert_allclose(whole, product, atol=1e-6)
        assert (np.linalg.matrix_rank(whole) == 2).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_unbiased_with_the_second_moment_of_its_rank(rank):
    n, m, draws = 3, 4, 40_000
    slope = jax.random.normal(jax.random.key(2), (n, m))
    leaves = leaves_of({"w": slope})

    def one(probe):  # of a linear loss, the difference is <slope, z>
        z = Direction(zo.low_rank(rank=rank), KEY, probe, leaves).of(0)
        return (jnp.vdot(slope, z) * z).reshape(-1)

    g = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(draws)), np.float64)
    error = g.std(0) / np.sqrt(draws)
    assert error.max() < 0.1
    # Twelve means within four standard errors: a chance of 1e-3 to fail, were the key another one.
    assert (abs(g.mean(0) - np.asarray(slope).reshape(-1)) < 4 * error).all()
    squares = (g**2).sum(1) / float(jnp.sum(slope**2))
    wanted = ((n + 2) * (m + 2) + (rank - 1) * (n * m + 2)) / rank
    error = squares.std() / np.sqrt(draws)
    assert error < 0.04 * wanted and abs(squares.mean() - wanted) < 4 * error
    # The number of a dense Gaussian, n m + 2, is far outside.
    assert abs(squares.mean() - (n * m + 2)) > 4 * error


@pytest.mark.parametrize("engine", [zo.vmapped(), zo.chunked(2)], ids=["vmapped", "chunked"])
def test_engines_give_equal_numbers(engine):
    with jax.enable_x64(True):
        params = tree(dtype="float64")

        def estimate(engine):
            options = {"num_directions": 4, "eps": 0.3, "matrix_axes": AXES, "key": KEY}
            return run(zo.estimate(zo.low_rank(rank=2), engine=engine, **options), params, rough, 2)

        (_, state, g), (_, theirs, wanted) = estimate(engine), estimate(zo.sequential())
        np.testing.assert_allclose(entries(g), entries(wanted), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state.losses, theirs.losses, rtol=1e-14)


def test_the_estimate_is_the_average_of_its_directions():
    with jax.enable_x64(True):
        params = tree(dtype="float64")
        tx = zo.estimate(zo.low_rank(rank=2), num_directions=3, eps=0.5, matrix_axes=AXES, key=KEY)
        _, state, g = run(tx, params, linear(params), 1)
        key, leaves = jax.random.fold_in(KEY, 0), leaves_of(params, AXES)
        z = [Direction(zo.low_rank(rank=2), key, j, leaves) for j in range(3)]
        z = np.array([entries({i: d.of(i) for i in range(len(leaves))}) for d in z])
        wanted = np.mean((z @ entries(params))[:, None] * z, 0)
        np.testing.assert_allclose(entries(g), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_the_matrices_as_in_them(name):
    with jax.enable_x64(True):
        config = CONFIGS[name]
        params, value_fn, probe_fn = decoder(config)
        options = {"num_directions": 2, "eps": 0.3, "key": KEY}
        axes = models.matrix_axes(config)

        def estimate(engine, **loss):
            tx = zo.estimate(zo.low_rank(rank=2), engine=engine, matrix_axes=axes, **options)
            return jax.jit(lambda p: tx.update(None, tx.init(p), p, **loss))(params)

        g, state = estimate(zo.vmapped(), probe_fn=probe_fn)
        wanted, theirs = estimate(zo.sequential(), value_fn=value_fn)
        assert theirs.losses[0] != theirs.losses[1]
        np.testing.assert_allclose(state.losses, theirs.losses, rtol=1e-12)
        np.testing.assert_allclose(entries(g), entries(wanted), rtol=1e-12, atol=1e-12)
