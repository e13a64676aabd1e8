r"""Many runs of SGD from one point, and the variance of their displacement per direction.

R replicas start at the reference point $w^*$ and take n steps $w \leftarrow w - \eta \nabla L_n(w)$
with their own batches. What is kept are the mean and variance over the replicas of
$O^\top (w - w^*)$ for chosen directions O, at some of the steps; no trajectory is stored.

Everything runs in float64: variances along flat directions are 1e-10 to 1e-14, which is where
float32 rounds the weights. For the same reason the state of a replica is $w - w^*$.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.batches import Sampling, check_sampling
from jaxopt_lab.dynamics.landscape.carried_batches import carried_batches
from jaxopt_lab.dynamics.landscape.flat import Loss

_LARGEST_BLOCK = 1024


class Ensemble(NamedTuple):
    """Moments over the replicas of the displacement from the reference point."""

    steps: Int[np.ndarray, "records"]  # SGD steps taken
    mean: Float[np.ndarray, "records directions"]
    variance: Float[np.ndarray, "records directions"]  # unbiased
    replicas: int


def run_ensemble(
    key: Key[Array, ""],
    loss: Loss,
    params: PyTree,
    data: PyTree,
    *,
    directions: ArrayLike,
    learning_rate: float,
    batch_size: int,
    steps: int,
    replicas: int,
    record_every: int = 1,
    sampling: Sampling = "with_replacement",
    transform: optax.GradientTransformation | None = None,
    full_gradient: bool = False,
    block_size: int | None = None,
    sharding: NamedSharding | None = None,
) -> Ensemble:
    """Runs SGD in many replicas and measures their spread along some directions.

    The batches of a replica depend on the key, the number of the replica and the step alone. The
    moments of a block of replicas are taken on one device and the blocks joined in order: the
    result does not depend on the sharding, bit for bit, as long as the block size stays.

    Args:
      key: Typed key.
      loss: (params, batch) -> mean loss of the batch. Pass the same function again and nothing is
        compiled again.
      params: Reference point, where all replicas start.
      data: Tree of arrays with a leading sample axis.
      directions: Columns to project on, shape (parameters, directions), in the order of
        `jax.flatten_util.ravel_pytree`.
      learning_rate: η.
      batch_size: Samples of a batch.
      steps: Number of SGD steps.
      replicas: Number of runs, at least 2.
      record_every: Steps between records; it divides `steps`.
      sampling: "with_replacement", as the theory assumes; "without_replacement" inside each batch;
        or "epochs", as in `batch_indices`.
      transform: What is done to the flat gradient before the step, with one state a replica.
      full_gradient: Give `transform` the gradient of the whole data, as the extra argument
        `full_grad`; it costs one full gradient a step and replica.
      block_size: Replicas run at once; memory grows with it. None takes an eighth of the replicas,
        1024 at most.
      sharding: Spreads blocks of replicas over the mesh axes of the first entry of its
        specification; None uses one device.

    Returns:
      Moments at steps record_every, 2 record_every, ..., as NumPy float64.

    Raises:
      ValueError: An argument out of range or of a wrong shape.

    >>> from jaxopt_lab.dynamics.landscape.quadratics import finite_sum
    >>> from jaxopt_lab.dynamics.landscape.systems import quadratic
    >>> flat_line = quadratic(finite_sum([0.0, 0.0], [-1.0, 1.0]))
    >>> spread = run_ensemble(
    ...     jax.random.key(0), flat_line.loss, np.zeros(1), flat_line.data, directions=np.eye(1),
    ...     learning_rate=0.1, batch_size=1, steps=10, replicas=2000, record_every=10,
    ... )
    >>> bool(abs(spread.variance[-1, 0] / (0.1**2 * 10) - 1) < 0.1)  # η² d n
    True
    """
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        directions = jnp.asarray(directions, jnp.float64)
        samples = flat.check_loss(loss, params, data)
        check_directions(directions, flat.parameter_count(params))
        check_sampling(samples, batch_size, sampling)
        _check_run(learning_rate, steps, replicas, record_every, block_size)
        sharding = _one_device() if sharding is None else sharding
        ids = _blocks(replicas, block_size, sharding)
        plan = _Plan(loss, batch_size, steps, record_every, sampling, transform, full_gradient)
        rate = jnp.float64(learning_rate)
        moments = _run(plan, sharding, ids, key, rate, replicas, params, data, directions)
        mean, variance = _joined(*jax.device_get(moments))
    return Ensemble(np.arange(record_every, steps + 1, record_every), mean, variance, replicas)


def check_directions(directions: Array, parameters: int) -> None:
    """Raises ValueError unless the directions are finite columns of the length of the params."""
    if directions.ndim != 2 or directions.shape[0] != parameters or not directions.shape[1]:
        raise ValueError(
            f"directions has shape {directions.shape}, expected ({parameters}, directions): one "
            "row a parameter"
        )
    if not bool(jnp.isfinite(directions).all()):
        raise ValueError("directions: not finite")


class _Plan(NamedTuple):
    """What the compiled program depends on."""

    loss: Loss
    batch_size: int
    steps: int
    record_every: int
    sampling: Sampling
    transform: optax.GradientTransformation | None
    full_gradient: bool


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    plan: _Plan, sharding: NamedSharding, ids: Int[Array, "blocks block"], *shared: Any
) -> tuple[Array, Array, Array]:
    """Number, mean and sum of squared deviations of every block of replicas, at every record."""

    def local(ids: Array, *shared: Any) -> tuple[Array, Array, Array]:
        return jax.lax.map(lambda block: _run_block(plan, block, *shared), ids)

    spread = PartitionSpec(sharding.spec[0])
    # shard_map over a single device as well: the program of a block is then the same on any mesh.
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(spread, *(PartitionSpec() for _ in shared)),
        out_specs=spread,
        check_vma=False,
    )(ids, *shared)


def _run_block(
    plan: _Plan,
    ids: Int[Array, "block"],
    key: Key[Array, ""],
    learning_rate: Float[Array, ""],
    replicas: Int[Array, ""],
    params: PyTree,
    data: PyTree,
    directions: Float[Array, "parameters directions"],
) -> tuple[Array, Array, Array]:
    weights = (ids < replicas).astype(jnp.float64)  # the last blocks may be filled up
    count = jnp.sum(weights)
    start, step = _replica(plan, params, data)

    def advance(carry: PyTree, number: Int[Array, ""]) -> tuple[PyTree, None]:
        return jax.vmap(step, in_axes=(0, None, 0, None))(keys, number, carry, learning_rate), None

    def record(carry: PyTree, first: Int[Array, ""]) -> tuple[PyTree, tuple[Array, Array]]:
        carry, _ = jax.lax.scan(advance, carry, first + jnp.arange(plan.record_every))
        projections = carry[0] @ directions
        mean = weights @ projections / jnp.maximum(count, 1)
        return carry, (mean, weights @ jnp.square(projections - mean))

    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(ids)
    starts = jnp.arange(0, plan.steps, plan.record_every)
    _, (means, squares) = jax.lax.scan(record, jax.vmap(start)(keys), starts)
    return count, means, squares


def _replica(plan: _Plan, params: PyTree, data: PyTree) -> tuple[Any, Any]:
    """Start and step of one replica; its state is (w - w*, state of the transform, order)."""
    reference = ravel_pytree(params)[0]
    gradient = jax.grad(flat.displaced(plan.loss, params))
    first_order, draw = carried_batches(plan.sampling, flat.sample_count(data), plan.batch_size)
    transform = optax.with_extra_args_support(plan.transform or optax.identity())

    def start(_: Key[Array, ""]) -> tuple[Array, PyTree, Array]:
        return jnp.zeros_like(reference), transform.init(reference), first_order

    def step(key: Key[Array, ""], number: Array, state: PyTree, learning_rate: Array) -> PyTree:
        theta, inner, order = state
        order, indices = draw(key, number, order)
        direction = gradient(theta, flat.take(data, indices))
        extra = {"full_grad": gradient(theta, data)} if plan.full_gradient else {}
        updates, inner = transform.update(direction, inner, reference + theta, **extra)
        return theta - learning_rate * jnp.asarray(updates), inner, order

    return start, step


def _joined(
    counts: Float[np.ndarray, "blocks"],
    means: Float[np.ndarray, "blocks records directions"],
    squares: Float[np.ndarray, "blocks records directions"],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all blocks, joined one after the other."""
    count, mean, square = 0.0, np.zeros_like(means[0]), np.zeros_like(squares[0])
    for n, block_mean, block_square in zip(counts, means, squares, strict=True):
        if n:
            shift = block_mean - mean
            mean = mean + shift * (n / (count + n))
            square = square + block_square + np.square(shift) * (count * n / (count + n))
            count += n
    return mean, square / (count - 1)


def _blocks(
    replicas: int, block_size: int | None, sharding: NamedSharding
) -> Int[np.ndarray, "blocks block"]:
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        raise ValueError(
            f"sharding: {sharding} names no mesh axis for the replicas; expected a NamedSharding "
            "whose specification begins with one"
        )
    axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
    devices = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
    size = min(-(-replicas // 8), _LARGEST_BLOCK) if block_size is None else block_size
    blocks = -(-replicas // size)
    blocks = -(-blocks // devices) * devices
    return np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)


def _one_device() -> NamedSharding:
    mesh = jax.make_mesh(
        (1,), ("replicas",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)
    )
    return NamedSharding(mesh, PartitionSpec("replicas"))


def _check_run(
    learning_rate: float, steps: int, replicas: int, record_every: int, block_size: int | None
) -> None:
    if not np.isfinite(learning_rate) or learning_rate <= 0:
        raise ValueError(f"learning_rate: got {learning_rate}, expected a positive number")
    if steps < 1 or record_every < 1 or steps % record_every:
        raise ValueError(
            f"record_every: got {record_every}, expected a divisor of the {steps} steps"
        )
    if replicas < 2:
        raise ValueError(f"replicas: got {replicas}, expected at least 2")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size: got {block_size}, expected at least 1")
