"""Compiles training steps and writes what memory they need, results/*.json; see README.md.

nice -n 10 python experiments/zeroth_order/memory/run.py
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of

RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = {
    "124m": dataclasses.replace(models.PRESETS["llama-124m"], loop="scanned"),
    "1b": models.DecoderConfig(
        vocab_size=128_256, width=2048, depth=16, heads=32, kv_heads=8, hidden=8192, context=512,
        loop="scanned",
    ),
}  # fmt: skip
BATCH = {"tokens": jax.ShapeDtypeStruct((1, 513), jnp.int32)}
HEAD_CHUNKS = 8
KEY = jax.random.key(0)

# A program, what it takes, and which of its arguments are donated.
Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]


def main() -> None:
    """Compiles the rows that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compute", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--tpu", help="a topology, such as v5e:2x2: compile for a TPU instead")
    args = parser.parse_args()
    name, place = (args.tpu.replace(":", "-"), tpu(args.tpu)) if args.tpu else host()
    RESULTS.mkdir(exist_ok=True)
    for model in args.models:
        for dtype in args.compute:
            config = dataclasses.replace(MODELS[model], compute_dtype=dtype)
            path = RESULTS / f"{name}-{model}-{dtype}.json"
            known = json.loads(path.read_text()) if path.exists() else start(config)
            for row, make in ROWS.items():
                if args.only in row and row not in known["rows"]:
                    known["rows"][row] = measured(*make(config), place)
                    path.write_text(json.dumps(known, indent=1) + "\n")
                    print(path.stem, row, total(known, row), flush=True)


def host() -> tuple[str, None]:
    """The default device, by the name of its kind."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-"), None


def tpu(topology: str) -> NamedSharding:
    """One device of a TPU that is not there."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(devices[:1], ("all",))  # type: ignore[arg-type]
    return NamedSharding(mesh, PartitionSpec())


def start(config: models.DecoderConfig) -> dict[str, Any]:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(models.abstract_params(config)))
    return {"jax": jax.__version__, "parameter_bytes": size, "rows": {}}


def total(known: dict[str, Any], row: str) -> float:
    """Arguments and temporaries over the parameters."""
    found = known["rows"][row]
    return round((found["arguments"] + found["temporaries"]) / known["parameter_bytes"], 4)


def measured(
    fn: Callable[..., Any], args: tuple[Any, ...], donated: tuple[int, ...], place: Any
) -> dict[str, Any]:
    """Bytes of a compiled program."""
    started = time.perf_counter()
    if place is not None:
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    found = jax.jit(fn, donate_argnums=donated).lower(*args).compile().memory_analysis()
    assert found is not None
    return {
        "arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes, "aliased": found.alias_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def inference(config: models.DecoderConfig) -> Program:
    def fn(params: Any, batch: Any) -> Any:
        return models.probe_loss(config, batch)(params)

    return fn, (models.abstract_params(config), BATCH), ()


def perturbed(sampler: zo.Sampler) -> Callable[[models.DecoderConfig], Program]:
    """One loss at perturbed parameters, layer by layer."""

    def make(config: models.DecoderConfig) -> Program:
        params = models.abstract_params(config)
        leaves = leaves_of(params, models.matrix_axes(config))

        def fn(params: Any, batch: Any, data: Any) -> Any:
            direction = Direction(sampler, jax.random.wrap_key_data(data), 0, leaves)
            return models.probe_loss(config, batch)(params, direction, 1e-3)

        return fn, (params, BATCH, jax.ShapeDtypeStruct((2,), jnp.uint32)), ()

    return make


def zeroth_order(
    method: Callable[[zo.Probes], Any], *, layerwise: bool = True, **options: Any
) -> Callable[[models.DecoderConfig], Program]:
    """A whole step of a zero-order method."""

    def make(config: models.DecoderConfig) -> Program:
        params = models.abstract_params(config)
        tx = method(zo.Probes(matrix_axes=models.matrix_axes(config), **options))

        def fn(params: Any, state: Any, batch: Any) -> Any:
            name = "probe_fn" if layerwise else "value_fn"
            loss = {name: models.probe_loss(config, batch)}
            updates, state = tx.update(None, state, params, **loss)
            return optax.apply_updates(params, updates), state

        return fn, (params, jax.eval_shape(tx.init, params), BATCH), (0, 1)

    return make


def mezo(probes: zo.Probes) -> Any:
    return zo.mezo(1e-6, key=KEY, probes=probes)


def jaguar(probes: zo.Probes) -> Any:
    return zo.jaguar_signsgd(1e-6, key=KEY, probes=probes)


def ldsd(probes: zo.Probes) -> Any:
    return zo.ldsd(optax.sgd(1e-6), candidates=5, key=KEY, probes=probes)


def lora(config: models.DecoderConfig) -> Program:
    """Adapters of rank 8 beside frozen parameters."""
    params = models.abstract_params(config)
    spec = jol.lora.resolve(
        jol.lora.LoraConfig(rank=8, alpha=16), params, models.matrix_axes(config)
    )
    adapters = jax.eval_shape(lambda p: jol.lora.init(KEY, spec, p), params)
    tx = optax.adamw(1e-4)

    def fn(params: Any, adapters: Any, state: Any, batch: Any) -> Any:
        def loss(adapters: Any) -> Any:
            side = jol.lora.side(adapters, spec)
            return models.loss(config, params, batch, side=side, head_chunks=HEAD_CHUNKS)[0]

        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    return fn, (params, adapters, jax.eval_shape(tx.init, adapters), BATCH), (1, 2)


def adamw(remat: Any) -> Callable[[models.DecoderConfig], Program]:
    """Backpropagation through all parameters."""

    def make(config: models.DecoderConfig) -> Program:
        config = dataclasses.replace(config, remat=remat)
        params, tx = models.abstract_params(config), optax.adamw(1e-4)

        def fn(params: Any, state: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                return models.loss(config, params, batch, head_chunks=HEAD_CHUNKS)[0]

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return fn, (params, jax.eval_shape(tx.init, params), BATCH), (0, 1)

    return make


ROWS: dict[str, Callable[[models.DecoderConfig], Program]] = {
    "inference": inference,
    "one loss, layer by layer": perturbed(zo.gaussian()),
    "one loss, layer by layer, signs": perturbed(zo.signs()),
    "MeZO, layer by layer": zeroth_order(mezo),
    "MeZO, layer by layer, signs": zeroth_order(mezo, sampler=zo.signs()),
    "MeZO, layer by layer, both signs at once": zeroth_order(mezo, engine=zo.chunked(1)),
    "MeZO, whole trees": zeroth_order(mezo, layerwise=False),
    "JAGUAR SignSGD, layer by layer": zeroth_order(jaguar),
    "LDSD, layer by layer": zeroth_order(ldsd),
    "LoRA + AdamW": lora,
    "AdamW": adamw("none"),
    "AdamW, layers recomputed": adamw("full"),
}


if __name__ == "__main__":
    main()
