"""What the compiler for NVIDIA's GPUs makes of a training step on a mesh, on a machine without one.

    python -m tests.models.gpu_meshes h200.txtpb --mesh 1 2 1

prints the kernels, the collectives (number and bytes) and the scratch memory of one device, of the
plain code and with the kernels. It needs an environment with `jax-cuda13-plugin` and
`jax-cuda13-pjrt` of the version of JAX (0.11.2 was used), without their dependencies, and the text
that describes the GPU: xla/backends/gpu/target_config/specs/h200.txtpb in the sources of XLA.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which looks for a driver

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import models
from jaxopt_lab.models import cross_entropy, decoder, gpu_kernels, layers
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.step.compilation import compiler_options


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="file that describes the GPU")
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 2, 1), help="data fsdp tensor")
    parser.add_argument("--length", nargs="*", default=[], help="mesh axes that split positions")
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32, help="windows of 1024 tokens of a device")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    as_on_a_gpu()
    devices = topologies.get_topology_desc(
        platform="cuda",
        target_config=args.target.read_text(),
        topology=f"1x1x{math.prod(args.mesh)}",
    ).devices
    mesh = Mesh(np.array(devices).reshape(args.mesh), ("data", "fsdp", "tensor"))
    on = models.Placement(mesh, models.ShardingRules(length=tuple(args.length)))
    config = dataclasses.replace(
        models.PRESETS[args.model], depth=args.depth, context=1024, compute_dtype="bfloat16"
    )
    for applies in (lambda *given: False, gpu_kernels.kernels_apply):
        for module in (layers, cross_entropy, decoder):
            module.kernels_apply = applies
        program = compiled(config, on, args.batch)
        text = program.as_text()
        row = {
            "kernels": text.count('custom_call_target="__gpu$xla.gpu.triton"'),
            "collectives": {kind: tuple(total) for kind, total in collectives(text).items()},
            "scratch_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20),
        }
        print(json.dumps(row), flush=True)


def as_on_a_gpu():
    """JAX and the kernels find a GPU where they look for one."""
    jax.default_backend = lambda: "gpu"
    cudnn: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    cudnn.check_cudnn_version = lambda: 91000
    triton: Any = importlib.import_module("jax._src.pallas.triton.gpu_info")
    triton.get_gpu_info = lambda *_: SimpleNamespace(compute_capability=90)


def compiled(config, on, batch):
    """A step of AdamW."""

    def at(spec):
        return NamedSharding(on.mesh, spec)

    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(spec)),
        models.abstract_params(config),
        models.partition_specs(config, on),
    )
    tx = optax.adamw(1e-3)
    state = optax.tree_utils.tree_map_params(
        tx, lambda _, param: param, jax.eval_shape(tx.init, params), params
    )
    rows = batch * on.mesh.shape["data"] * on.mesh.shape["fsdp"]
    tokens = jax.ShapeDtypeStruct((rows, 1025), jnp.int32, sharding=at(P(("data", "fsdp"))))

    def step(params, state, tokens):
        def objective(params):
            return models.loss(config, params, {"tokens": tokens}, mesh=on)[0]

        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    kept = jax.tree.map(lambda x: x.sharding or at(P()), (params, state))
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, at(P())))
    # Nothing can be timed here to choose between algorithms.
    options = {"xla_gpu_autotune_level": 0, **compiler_options("gpu")}
    return lowered.lower(params, state, tokens).compile(compiler_options=options)


if __name__ == "__main__":
    main()
