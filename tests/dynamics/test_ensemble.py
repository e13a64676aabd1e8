"""Replicas of SGD against exact moments, on other meshes, with other samplings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.dynamics.landscape.carried_batches import carried_batches
from tests.dynamics.landscapes import critical_sum, least_squares, tiny_network

SMALL = {"learning_rate": 0.1, "batch_size": 4, "steps": 6, "replicas": 10, "record_every": 3}


@pytest.fixture(scope="module")
def network():
    system = tiny_network()
    return system, system.init(jax.random.key(0))


def run(system, params, key=1, **changes):
    arguments = {"directions": np.eye(system.parameters), **SMALL, **changes}
    return sgd.run_ensemble(jax.random.key(key), system.loss, params, system.data, **arguments)


@pytest.mark.parametrize(
    "batch_size, sampling", [(1, "with_replacement"), (3, "without_replacement")]
)
def test_moments_of_quadratics(batch_size, sampling):
    problem = critical_sum(0, samples=8, dimension=3)
    replicas = 4000
    found = run(
        sgd.quadratic(problem), np.full(3, 0.5), steps=12, record_every=4, replicas=replicas,
        batch_size=batch_size, sampling=sampling,
    )  # fmt: skip
    with jax.enable_x64(True):
        exact = sgd.moments(
            jax.tree.map(lambda x: x.astype(float), problem), learning_rate=0.1, steps=12,
            batch_size=batch_size, replace=sampling == "with_replacement", mean=jnp.full(3, 0.5),
        )  # fmt: skip
    mean = np.asarray(exact.mean)[found.steps] - 0.5
    variance = np.diagonal(exact.covariance, axis1=1, axis2=2)[found.steps]
    assert found.steps.tolist() == [4, 8, 12]
    assert (np.abs(found.mean - mean) < 4 * np.sqrt(variance / replicas)).all()
    # Four standard errors of a variance; tails a little heavier than a Gaussian's.
    error = variance * np.sqrt(2.5 / replicas)
    assert (np.abs(found.variance - variance) < 4 * error).all()
    assert found.mean.dtype == found.variance.dtype == np.float64


def test_the_replicas_one_by_one(network):
    """The same batches, plain loops, NumPy moments."""
    system, params = network
    found = run(system, params, block_size=4)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(float), params))
        data = jax.tree.map(jnp.asarray, system.data)

        @jax.jit
        def displacement(replica):
            def step(n, w):
                batch = sgd.batch_indices(own, n, num_samples=40, batch_size=4)
                gradient = jax.grad(system.loss)(unravel(w), jax.tree.map(lambda x: x[batch], data))
                return w - 0.1 * ravel_pytree(gradient)[0]

            own = jax.random.fold_in(jax.random.key(1), replica)
            return jax.lax.fori_loop(0, 6, step, flat) - flat

        moved = np.stack([displacement(replica) for replica in range(10)])
    np.testing.assert_allclose(found.mean[-1], moved.mean(0), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.variance[-1], moved.var(0, ddof=1), rtol=1e-8, atol=1e-18)


@pytest.mark.parametrize("replicas", [16, 19])
def test_a_mesh_changes_no_bit(network, replicas):
    system, params = network
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("replicas"))
    one, many = (
        run(system, params, replicas=replicas, block_size=2, sharding=s) for s in (None, sharding)
    )
    np.testing.assert_array_equal(one.mean, many.mean)
    np.testing.assert_array_equal(one.variance, many.variance)
    assert one.variance.max() > 0


def test_blocks_change_rounding_only(network):
    system, params = network
    one, other = (run(system, params, block_size=size) for size in (10, 3))
    np.testing.assert_allclose(one.variance, other.variance, rtol=1e-10)


@pytest.mark.parametrize("sampling", ["without_replacement", "epochs"])
def test_whole_batches_without_replacement_do_not_spread(network, sampling):
    system, params = network
    still = run(system, params, batch_size=40, sampling=sampling)
    spread = run(system, params, batch_size=40)
    assert still.variance.max() < 1e-28 < 1e-9 < spread.variance.max()


def test_whole_epochs_nearly_cancel(network):
    system, params = network
    small = {"learning_rate": 0.01, "batch_size": 8, "steps": 10, "record_every": 5, "replicas": 50}
    epochs, independent = (
        run(system, params, **small, sampling=s) for s in ("epochs", "with_replacement")
    )
    assert epochs.variance[-1].sum() < 0.02 * independent.variance[-1].sum()


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement", "epochs"])
def test_carried_batches_are_the_drawn_ones(sampling):
    order, draw = carried_batches(sampling, 7, 3)
    key = jax.random.key(5)
    for step in range(5):
        order, batch = draw(key, jnp.asarray(step), order)
        wanted = sgd.batch_indices(key, step, num_samples=7, batch_size=3, sampling=sampling)
        np.testing.assert_array_equal(batch, wanted)


def test_flat_does_not_imply_diffusive():
    """Least squares with a feature that is always zero: no noise there, no motion."""
    draws = np.random.default_rng(3)
    x = draws.standard_normal((20, 3)) * np.asarray([1.0, 1.0, 0.0])
    data = {"x": x, "y": draws.standard_normal(20)}
    found = sgd.run_ensemble(
        jax.random.key(0), least_squares, np.zeros(3), data, directions=np.eye(3), **SMALL
    )
    assert (found.variance[-1, 2], found.mean[-1, 2]) == (0, 0)
    assert (found.variance[-1, :2] > 0).all()


def test_a_transform_of_the_gradient(network):
    """Half of the deviation from the full gradient: a quarter of the first step's variance."""

    def halve(updates, state, params=None, *, full_grad, **extra):
        return full_grad + 0.5 * (updates - full_grad), state

    system, params = network
    transform = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), halve)
    once = {"steps": 1, "record_every": 1}
    plain = run(system, params, **once)
    halved = run(system, params, **once, transform=transform, full_gradient=True)
    np.testing.assert_allclose(halved.variance, plain.variance / 4, rtol=1e-9, atol=1e-25)
    np.testing.assert_allclose(
        run(system, params, transform=optax.scale(2.0)).variance,
        run(system, params, learning_rate=0.2).variance,
        rtol=1e-10,
    )


def test_training_lowers_loss_and_gradient():
    system = tiny_network(samples=200)
    point = sgd.reference_point(
        jax.random.key(0),
        system,
        sgd_steps=200,
        sgd_rate=0.3,
        batch_size=8,
        gd_steps=2000,
        gd_rate=0.3,
        records=4,
    )
    assert point.steps.tolist() == [0, 50, 100, 150, 200, 700, 1200, 1700, 2200]
    assert point.loss[-1] < point.loss[0] - 0.1
    assert point.gradient_norm[-1] < 0.2 * point.gradient_norm[4]
    further = sgd.reference_point(
        jax.random.key(0), system, sgd_steps=0, sgd_rate=0.3, batch_size=8, params=point.params
    )
    assert further.loss.tolist() == [point.loss[-1]]


def test_divergence_is_reported():
    steep = sgd.quadratic(sgd.finite_sum([1.0], [1.0]))
    with pytest.raises(ValueError, match="lower sgd_rate"):
        sgd.reference_point(
            jax.random.key(0), steep, sgd_steps=1000, sgd_rate=1e4, batch_size=1, records=1
        )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"steps": 7}, "record_every: got 3"),
        ({"replicas": 1}, "replicas: got 1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 41, "sampling": "epochs"}, "batch_size: got 41"),
        ({"sampling": "shuffled"}, "sampling: got 'shuffled'"),
        ({"block_size": 0}, "block_size"),
        ({"directions": np.eye(5)}, r"directions has shape \(5, 5\), expected \(23"),
        ({"directions": np.full((23, 1), np.nan)}, "directions: not finite"),
    ],
)
def test_bad_arguments(network, changes, named):
    with pytest.raises(ValueError, match=named):
        run(*network, **changes)


def test_bad_losses_and_data(network):
    system, params = network
    arguments = {"directions": np.eye(23), **SMALL}
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="different numbers of samples"):
        data = dict(system.data, labels=system.data["labels"][1:])
        sgd.run_ensemble(key, system.loss, params, data, **arguments)
    with pytest.raises(ValueError, match="expected the mean loss"):
        sgd.run_ensemble(key, lambda p, b: b["inputs"], params, system.data, **arguments)
    with pytest.raises(ValueError, match="params.* is int"):
        sgd.run_ensemble(key, system.loss, np.zeros(23, int), system.data, **arguments)
    with pytest.raises(ValueError, match="no mesh axis"):
        mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
        run(system, params, sharding=NamedSharding(mesh, PartitionSpec()))
