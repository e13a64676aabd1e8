"""Directions of low rank: moments, engines, losses that form no matrix, memory, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from tests.zeroth_order.problems import AXES, FEW_AXES, KEY, entries, few, linear, mlp, run, tree

SMALL = {"vocab_size": 40, "width": 16, "depth": 2, "heads": 4, "hidden": 24, "context": 8}
OLD = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "tied": False}
CONFIGS = {
    "llama": DecoderConfig(**SMALL, kv_heads=2, loop="scanned", compute_dtype="float64"),
    "gpt": DecoderConfig(**SMALL, **OLD, compute_dtype="float64"),
}


def perturbed(params, direction, scale):
    """Whole perturbed matrices: what `beside` never forms."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([x + scale * direction.of(i) for i, x in enumerate(leaves)])


def test_factors_are_those_of_the_whole_and_of_its_parts():
    leaves = leaves_of(tree(), AXES)

    def drawn():
        found = Direction(zo.low_rank(rank=2), KEY, 0, leaves)
        dense = Direction(zo.gaussian(), KEY, 0, leaves)
        return [(found.of(i), found.factors_of(i), dense.of(i)) for i in range(len(leaves))]

    for name, (whole, factors, dense) in zip(sorted(AXES), jax.jit(drawn)(), strict=True):
        if factors is None:
            assert name in ("bias", "scale")
            np.testing.assert_array_equal(whole, dense)
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


def test_the_estimate_is_the_average_of_its_directions():
    with jax.enable_x64(True):
        params, axes = few(dtype="float64"), {"matrix_axes": FEW_AXES}
        tx = zo.estimate(zo.low_rank(rank=2), num_directions=3, eps=0.5, key=KEY, **axes)
        _, state, g = run(tx, params, linear(params), 1)
        key, leaves = jax.random.fold_in(KEY, 0), leaves_of(params, FEW_AXES)

        def drawn(probe):
            direction = Direction(zo.low_rank(rank=2), key, probe, leaves)
            return jnp.concatenate([direction.of(i).reshape(-1) for i in range(len(leaves))])

        z = np.asarray(jax.jit(jax.vmap(drawn))(jnp.arange(3)))
        wanted = np.mean((z @ entries(params))[:, None] * z, 0)
        np.testing.assert_allclose(entries(g), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def test_decoders_beside_their_matrices_as_in_them(name):
    with jax.enable_x64(True):
        config, axes = CONFIGS[name], models.matrix_axes(CONFIGS[name])
        batch = {"tokens": jnp.arange(27).reshape(3, 9) % config.vocab_size}
        chunks = {"head_chunks": 2} if config.tied else {}
        # No vector is all zeros or ones.
        shapes, treedef = jax.tree.flatten(models.abstract_params(config))
        rng = np.random.default_rng(0)
        params = treedef.unflatten([jnp.asarray(rng.normal(1, 0.5, x.shape)) for x in shapes])

        def loss(params, side=None):
            return models.loss(config, params, batch, side=side, **chunks)[0]

        def both(params):
            direction = Direction(zo.low_rank(rank=2), KEY, 0, leaves_of(params, axes))
            scale = jnp.asarray(0.3)
            return zo.beside(loss)(params, direction, scale), loss(
                perturbed(params, direction, scale)
            )

        found, wanted = jax.jit(both)(params)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        assert abs(found - jax.jit(loss)(params)) > 1e-3


def test_estimates_beside_the_matrices_are_those_of_dense_engines():
    with jax.enable_x64(True):
        params, loss = mlp("float64")

        def estimate(engine, **given):
            tx = zo.estimate(zo.low_rank(rank=2), num_directions=4, eps=0.3, key=KEY, engine=engine)
            return jax.jit(lambda p: tx.update(None, tx.init(p), p, **given))(params)

        wanted, theirs = estimate(zo.sequential(), value_fn=loss)
        for engine in (zo.vmapped(), zo.chunked(2)):
            g, state = estimate(engine, probe_fn=zo.beside(loss))
            np.testing.assert_allclose(state.losses, theirs.losses, rtol=1e-13)
            np.testing.assert_allclose(entries(g), entries(wanted), rtol=1e-12, atol=1e-12)


def test_probes_share_the_matrices():
    # 32 losses: dense engines hold 32 copies of the matrices.
    params, loss = mlp(width=256)
    size = sum(x.nbytes for x in jax.tree.leaves(params))

    def memory(**given):
        tx = zo.estimate(zo.low_rank(), num_directions=16, key=KEY, engine=zo.vmapped())
        update = jax.jit(lambda p: tx.update(None, tx.init(p), p, **given))
        return update.lower(params).compile().memory_analysis().temp_size_in_bytes / size

    # Factors are 32 x 3 x 256 x 2 numbers an evaluation, a third of the matrices' 2 x 512 x 256 ...
    assert memory(probe_fn=zo.beside(loss)) < 1.5
    # ... where dense ones are 32 times them.
    assert memory(value_fn=loss) > 16


def test_bad_input():
    params, loss = mlp()
    scale = jnp.asarray(0.1)

    def evaluated(sampler, params, axes=None, **options):
        def loss(params):
            direction = Direction(sampler, KEY, 0, leaves_of(params, axes), **options)
            return zo.beside(lambda p, sides: jnp.zeros(()))(params, direction, scale)

        return jax.eval_shape(loss, params)

    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank is"):
            zo.low_rank(rank)
    with pytest.raises(ValueError, match="no leaf has factors; it goes with zeroth_order.low_rank"):
        evaluated(zo.gaussian(), params)
    with pytest.raises(ValueError, match="directions that have no mean"):
        evaluated(zo.low_rank(), params, mean=jax.tree.leaves(params))
    heads = {"out": {"kernel": jnp.zeros((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"leaf out/kernel: got inputs on axes \(0, 1\), wanted"):
        evaluated(zo.low_rank(), heads, MuonDimensionNumbers((0, 1), 2))
