"""Zero-order probes along an axis of devices, and adapters on a batch that they share.

Values against one device, the bytes that travel, and the time. Frozen parameters are whole on every
device, so neither sends anything of their size.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.report.hlo import collectives
from tests.devices.parity import difference

ON_CPU = jax.default_backend() == "cpu"
# What is timed needs the size of a real model; simulated devices only have to agree.
MODEL, ROWS, CONTEXT = ("tiny", 2, 32) if ON_CPU else ("gpt2-124m", 8, 512)
PROBES_OF_A_DEVICE = 4
EPS = 1e-2
# Differences of float32 losses over 2 eps, and means over rows, in another order of sums.
LIMITS = {"probes": 3e-3, "adapters": 1e-3}
STEPS, ROUNDS = 3, 5


class Spread(NamedTuple):
    """One way to use several devices."""

    difference: float  # relative, of what one step makes, from that of one device
    limit: float
    megabytes: float  # results of all collectives of a step, on one device
    most_megabytes: float
    speed: float  # work a second, in that of one device

    @property
    def passed(self) -> bool:
        """Whether values agree and nothing large travels."""
        return self.difference <= self.limit and self.megabytes <= self.most_megabytes


def probes(devices: int) -> Spread:
    """An estimate from as many directions as the devices have room for."""
    mesh = _mesh("probe", devices)
    config, params = _model()
    count = PROBES_OF_A_DEVICE * devices
    tokens = _tokens(config, ROWS)

    def program(engine: zo.Engine, **layout: Any) -> tuple[Any, ...]:
        tx = zo.estimate(
            zo.signs(), eps=EPS, num_directions=count, key=jax.random.key(0), engine=engine,
            matrix_axes=models.matrix_axes(config),
        )  # fmt: skip

        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            return tx.update(None, state, params, value_fn=lambda w: _loss(config, w, tokens))[0]

        inputs = jax.device_put((params, tx.init(params), tokens), layout.get("out_shardings"))
        return jax.jit(step, **layout).lower(*inputs).compile(), inputs

    whole = {"out_shardings": NamedSharding(mesh, P())}
    several, alone = program(zo.sharded(mesh), **whole), program(zo.sequential())
    values = difference(*(jax.device_get(run(*inputs)) for run, inputs in (several, alone)))
    speed = _seconds(*alone) / _seconds(*several)
    # Two losses of a direction as float32; a megabyte would be a hundredth of one small leaf.
    return Spread(values, LIMITS["probes"], _megabytes(several[0]), 1e-3, speed)


def adapters(devices: int) -> Spread:
    """A step of LoRA with AdamW, with as many rows as the devices have room for."""
    mesh = _mesh("data", devices)
    config, params = _model()
    axes = models.matrix_axes(config)
    spec = jol.lora.resolve(jol.lora.LoraConfig(rank=8, target="all-linear"), params, axes)
    start = jol.lora.init(jax.random.key(1), spec, params)
    tx = optax.adamw(1e-3)

    def step(params: Any, start: Any, state: Any, tokens: jax.Array) -> Any:
        def loss(pairs: Any) -> jax.Array:
            return _loss(config, params, tokens, side=jol.lora.side(pairs, spec))

        grads = jax.grad(loss)(start)
        return tx.update(grads, state, start)[0], grads

    def program(tokens: jax.Array, **layout: Any) -> tuple[Any, ...]:
        inputs = jax.device_put((params, start, tx.init(start)), layout.get("out_shardings"))
        inputs = (*inputs, tokens)
        return jax.jit(step, **layout).lower(*inputs).compile(), inputs

    tokens = _tokens(config, ROWS * devices)
    whole = {"out_shardings": NamedSharding(mesh, P())}
    several = program(jax.device_put(tokens, NamedSharding(mesh, P("data"))), **whole)
    alone = program(tokens)
    # Gradients: the first update of AdamW is their sign.
    values = difference(*(jax.device_get(run(*inputs)[1]) for run, inputs in (several, alone)))
    speed = _seconds(*alone) / _seconds(*several)
    size = sum(x.nbytes for x in jax.tree.leaves(start)) / 1e6
    return Spread(values, LIMITS["adapters"], _megabytes(several[0]), 1.1 * size, speed)


KINDS = {"probes": probes, "adapters": adapters}


def _mesh(axis: str, devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (devices,), (axis,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def _model() -> tuple[models.DecoderConfig, Any]:
    config = models.PRESETS[MODEL]
    return config, jax.jit(lambda key: models.init_params(config, key))(jax.random.key(0))


def _loss(
    config: models.DecoderConfig, params: Any, tokens: jax.Array, **options: Any
) -> jax.Array:
    return models.loss(config, params, {"tokens": tokens}, **options)[0]


def _tokens(config: models.DecoderConfig, rows: int) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, config.vocab_size, (rows, CONTEXT + 1), np.int32))


def _megabytes(compiled: Any) -> float:
    return sum(total.bytes for total in collectives(compiled.as_text() or "").values()) / 1e6


def _seconds(run: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """A step, as the median over rounds after a warm-up."""
    rounds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([run(*inputs) for _ in range(STEPS)])
        rounds.append((time.perf_counter() - start) / STEPS)
    return float(np.median(rounds[1:]))
