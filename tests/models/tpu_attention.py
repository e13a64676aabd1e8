"""What the compiler of a TPU makes of attention, on a machine without one.

A table of scratch memory, with XLA's attention and with the kernel. It needs an environment with
`libtpu`, better not that of the tests: elsewhere JAX would look for a TPU.

    python -m tests.models.tpu_attention
"""

import argparse
import dataclasses
import json
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import models
from jaxopt_lab.models.attention import attend

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1), help="data fsdp tensor")
    parser.add_argument("--programs", nargs="+", default=["layer", "gpt2-124m", "llama-124m"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--kernels", nargs="+", default=["xla", "auto"])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    used = np.array(devices[: np.prod(args.mesh)]).reshape(args.mesh)
    mesh = Mesh(used, ("data", "fsdp", "tensor"))
    for program in args.programs:
        for length in args.lengths:
            for kernel in args.kernels:
                row = {"program": program, "length": length, "kernel": kernel}
                print(json.dumps(row | compiled(mesh, **row)), flush=True)


def compiled(mesh, program, length, kernel):
    """Scratch bytes of a device and collectives; what is missing where it does not fit."""
    started = time.perf_counter()
    make = layer if program == "layer" else training_step
    fn, args, donated = make(mesh, program, length, kernel)
    try:
        done = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := re.search(r"([\d.]+)G\) exceeds|Used ([\d.]+)G of", str(error))) is None:
            raise
        return {"needs_gib": float(needed[1] or needed[2])}
    text = done.as_text()
    return {
        "temporaries": done.memory_analysis().temp_size_in_bytes,
        "kernels": text.count("tpu_custom_call"),
        "collectives": {x: len(re.findall(rf" {x}(?:-start)?\(", text)) for x in COLLECTIVES},
        "seconds": round(time.perf_counter() - started),
    }


def layer(mesh, program, length, kernel):
    """Forward and backward of the attention of eight heads of width 64 over one window."""
    del program
    rows = int(np.prod(mesh.devices.shape[:2]))
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
    q = jax.ShapeDtypeStruct((rows, length, 8, 64), jnp.bfloat16, sharding=heads)
    of_rows = NamedSharding(mesh, P(("data", "fsdp")))
    segment_ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=of_rows)

    def fn(q, k, v, segment_ids, dy):
        def mixed(*qkv):
            return attend(*qkv, segment_ids, kernel=kernel, mesh=mesh)

        return jax.vjp(mixed, q, k, v)[1](dy)

    return fn, (q, q, q, segment_ids, q), ()


def training_step(mesh, program, length, kernel):
    """A step of AdamW with one window a device, layers recomputed and logits in pieces."""
    config = dataclasses.replace(
        models.PRESETS[program],
        **{"context": length, "attention": kernel, "compute_dtype": "bfloat16"},
        **{"document_mask": True, "loop": "scanned", "remat": "full"},
    )
    specs = models.partition_specs(config, mesh)
    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        models.abstract_params(config),
        specs,
    )
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(tx.init, params)
    state = optax.tree_utils.tree_map_params(tx, lambda _, param: param, state, params)
    rows, of_rows = int(np.prod(mesh.devices.shape[:2])), NamedSharding(mesh, P(("data", "fsdp")))
    window = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32, sharding=of_rows)

    def step(params, state, tokens, segment_ids):
        batch = {"tokens": tokens, "segment_ids": segment_ids}

        def objective(params):
            return models.loss(config, params, batch, head_chunks=length // 1024, mesh=mesh)[0]

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, state, window, window), (0, 1)


if __name__ == "__main__":
    main()
