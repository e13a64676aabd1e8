"""One step on a mesh against the same step on one device, from the same state."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.bench.methods import method

AXES = {
    "stack": MuonDimensionNumbers(1, 2),  # (layers, m, n)
    "single": MuonDimensionNumbers(0, 1),
    "qkv": MuonDimensionNumbers(1, 3),  # (layers, d, 3, d)
    "bias": None,
}
# Wide enough for the products that an accelerator splits. A CPU splits none, and takes long to
# decompose wide matrices for many devices. Three layers and a single matrix leave a rest on every
# number of devices but one: stacks are filled up with zeros.
WIDTH = 48 if jax.default_backend() == "cpu" else 288
SHAPES = {
    "stack": (3, WIDTH, 2 * WIDTH),
    "single": (WIDTH, WIDTH),
    "qkv": (2, WIDTH, 3, WIDTH),
    "bias": (WIDTH,),
}
SPECS = {
    "data": {name: P() for name in SHAPES},
    "fsdp": {
        "stack": P(None, None, "fsdp"),
        "single": P("fsdp"),
        "qkv": P(None, "fsdp"),
        "bias": P(),
    },
    "tensor": {
        "stack": P(None, "tensor"),
        "single": P(None, "tensor"),
        "qkv": P(None, None, None, "tensor"),
        "bias": P("tensor"),
    },
}
# Start, steps with and without a refresh, and refreshes of factors that have full rank.
STEPS = 6
KINDS = (AxisType.Auto, AxisType.Explicit)

# Largest relative difference of an update, in the Frobenius norm. AdamW works entry by entry;
# iterates, rotations and bases of the others are rounded to bfloat16.
LIMITS = {"adamw": 1e-5}
OTHER_LIMIT = 5e-2
OPTIMIZERS = (
    "adamw",
    "lion_muon_p1",
    "lion_muon_p2",
    "soap_f2",
    "soap_f2_stagger",
    "dykaf_f2",
    "shampoo_f2",
)


class Parity(NamedTuple):
    """How far the updates of an optimizer on a mesh are from those of one device."""

    optimizer: str
    mesh: str
    kind: str
    difference: float  # the largest of all steps and leaves; NaN where one of them is NaN
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN is not."""
        return self.difference <= self.limit


def parity(optimizer: str, axis: str, kind: AxisType, devices: int) -> Parity:
    """Compares all steps, each from the state of one device."""
    mesh = jax.make_mesh((devices,), (axis,), axis_types=(kind,), devices=jax.devices()[:devices])
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS[axis].items()}
    step, state_at = _compiled(optimizer, mesh, shardings)
    states = _of_one_device(optimizer)
    worst = 0.0
    for t in range(STEPS):
        params, state, _ = states[t]
        with jax.set_mesh(mesh):
            got = step(
                jax.device_put(params, shardings),
                jax.device_put(state, state_at),
                jax.device_put(gradient(t), shardings),
            )
        worst = max(worst, difference(jax.device_get(got[2]), states[t + 1][2]), key=_nan_is_worst)
    limit = LIMITS.get(optimizer, OTHER_LIMIT)
    return Parity(optimizer, f"{axis} {devices}", kind.name, worst, limit)


def difference(tree: Any, wanted: Any) -> float:
    """The largest relative distance of a leaf, in the Frobenius norm."""

    def of_leaf(x: np.ndarray, y: np.ndarray) -> float:
        size = float(np.linalg.norm(y))
        return float(np.linalg.norm(x - y)) / (size or 1.0)

    return max(jax.tree.leaves(jax.tree.map(of_leaf, tree, wanted)), key=_nan_is_worst)


def gradient(step: int) -> dict[str, np.ndarray]:
    """Of full rank with a decaying spectrum, as those of a network."""
    rng = np.random.default_rng(step)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        scale = np.linspace(0, 4, shape[-1])
        return np.float32(0.1 * x * np.exp(-scale))

    return {name: draw(shape) for name, shape in SHAPES.items()}


def _nan_is_worst(x: float) -> float:
    return np.inf if np.isnan(x) else x


def _step(tx: optax.GradientTransformation):
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return run


def _start() -> dict[str, jax.Array]:
    return {name: jnp.full(shape, 0.02) for name, shape in SHAPES.items()}


@functools.cache
def _of_one_device(optimizer: str) -> list[Any]:
    """Parameters, state and last update before each step and after the last one."""
    tx = method(optimizer).build(AXES)
    step, params = jax.jit(_step(tx)), _start()
    history: list[Any] = [jax.device_get((params, tx.init(params), None))]
    for t in range(STEPS):
        params, state, _ = history[-1]
        history.append(jax.device_get(step(params, state, gradient(t))))
    return history


def _compiled(optimizer: str, mesh: Mesh, shardings: Mapping[str, NamedSharding]) -> Any:
    """The step on a mesh, and where its state lies."""
    tx = method(optimizer).build(AXES, dict(shardings))
    abstract = jax.eval_shape(_start)
    with jax.set_mesh(mesh):
        state_at = jol.state_shardings(tx, abstract, shardings)
        step = jax.jit(
            _step(tx),
            in_shardings=(shardings, state_at, shardings),
            out_shardings=(shardings, state_at, shardings),
        )
    return step, state_at
