"""The kernels for GPUs on meshes of eight devices, interpreted: values, gradients, exchanges."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import models
from jaxopt_lab.models import cross_entropy, decoder, gpu_kernels, layers
from jaxopt_lab.report import hlo
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import batch_sharding
from jaxopt_lab.train.program import build_program
from tests.models.test_gpu_kernels import BASE, KINDS, distance, normal
from tests.train.tiny_run import tiny_config

AXES = ("data", "fsdp", "tensor")
USUAL = models.ShardingRules()
SEQUENCE = models.ShardingRules(length=("tensor",))
NORMS, LOSS = "add_norm_kernel", "cross_entropy_kernel"


def placed(sizes, rules, kind=AxisType.Auto):
    return models.Placement(jax.make_mesh(sizes, AXES, (kind,) * 3), rules)


def take_kernels(monkeypatch):
    """As on GPUs, in any dtype."""
    for module in (layers, cross_entropy, decoder):
        monkeypatch.setattr(module, "kernels_apply", lambda *given: True)


@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [
        (AxisType.Auto, "float32", 4),
        (AxisType.Explicit, "bfloat16", 4),
        # Those of the fsdp axis do not divide 6, and have the same rows.
        (AxisType.Auto, "bfloat16", 6),
        (AxisType.Explicit, "float32", 6),
    ],
)
def test_norms_of_rows_that_devices_share(kind, dtype, rows):
    x, y, *cotangents = (normal(i, rows, 6, 48, dtype=dtype) for i in range(4))
    scale, on = 1 + 0.1 * normal(4, 48), placed((2, 2, 2), SEQUENCE, kind)

    def run(x, y, scale, cotangents, mesh):
        norm = functools.partial(gpu_kernels.add_norm, centred=True, eps=1e-5, mesh=mesh)
        results, pullback = jax.vjp(norm, x, y, scale)
        return results, pullback(tuple(cotangents))

    wanted = run(x, y, scale, cotangents, None)
    over = ("data", "fsdp") if rows == 4 else "data"
    rows = NamedSharding(on.mesh, P(over, "tensor"))
    with jax.set_mesh(on.mesh):
        x, y, *cotangents = jax.device_put([x, y, *cotangents], rows)
        scale = jax.device_put(scale, NamedSharding(on.mesh, P()))
        program = jax.jit(run, static_argnums=4).lower(x, y, scale, cotangents, on).compile()
        found = program(x, y, scale, cotangents)
    # All is the same but the order of one sum, that of the gradient of the scale over rows.
    assert distance(found, wanted) < 1e-6
    # The only exchange is that sum, over those with other rows and those with other positions.
    assert hlo.collectives(program.as_text()) == {"all-reduce": (2, 2 * 48 * 4)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_loss_of_rows_that_devices_share(kind):
    logits = normal(0, 4, 3, 50)
    targets = jax.random.randint(jax.random.key(1), (4, 3), 0, 50)
    given = (logits, targets, jnp.linspace(0, 1, 12).reshape(4, 3))
    wanted = gpu_kernels.cross_entropy(*given, 0.1)
    on = placed((2, 2, 2), USUAL, kind)
    with jax.set_mesh(on.mesh):
        # Weights come as they may, whole.
        layouts = [NamedSharding(on.mesh, P(axes)) for axes in (*[("data", "fsdp")] * 2, None)]
        given = jax.device_put(given, tuple(layouts))
        loss = functools.partial(gpu_kernels.cross_entropy, z_loss=0.1, mesh=on)
        program = jax.jit(loss).lower(*given).compile()
        found = program(*given)
    assert distance(found, wanted) < 1e-6
    assert not hlo.collectives(program.as_text())


def test_norms_of_several_probes():
    """Each group of devices along another axis has a batch of its own, as under `zo.sharded`."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "probe"), (AxisType.Auto,) * 3)
    x_PxBxTxD, y, scale = normal(0, 2, 4, 6, 48), normal(1, 4, 6, 48), 1 + 0.1 * normal(2, 48)

    def norms(x_PxBxTxD, mesh):
        def one(x):
            return gpu_kernels.add_norm(x, y, scale, False, 1e-5, mesh)

        return jax.vmap(one, spmd_axis_name=None if mesh is None else "probe")(x_PxBxTxD)

    wanted = norms(x_PxBxTxD, None)
    x_PxBxTxD = jax.device_put(x_PxBxTxD, NamedSharding(mesh, P("probe", ("data", "fsdp"))))
    program = jax.jit(norms, static_argnums=1).lower(x_PxBxTxD, mesh).compile()
    assert distance(program(x_PxBxTxD), wanted) < 1e-6
    assert not hlo.collectives(program.as_text())


REMAT = {"remat": "full"}
UNTIED, SCANNED = (
    KINDS["gpt"] | REMAT | {"tied": False},
    KINDS["llama"] | REMAT | {"loop": "scanned"},
)
# Model, mesh, rules, chunks of the head, dtype, and the kernels that apply.
CASES = {
    "fsdp": (KINDS["gpt"], (2, 4, 1), USUAL, 1, "bfloat16", {NORMS, LOSS}),
    "remat": (UNTIED, (2, 4, 1), USUAL, 1, "float32", {NORMS, LOSS}),
    # 150 tokens are halved: each device has a part of every row of the logits.
    "sequence": (SCANNED, (2, 2, 2), SEQUENCE, 1, "float32", {NORMS}),
    "tensor": (KINDS["llama"], (2, 1, 4), USUAL, 2, "float32", {NORMS, LOSS}),
}


def exchanges(text):
    """Arrays by the collective they go through, their dtype and their size."""
    written = re.findall(r" = (.*?) (all-[a-z-]+?|collective-permute)(?:-start)?\(", text)
    return collections.Counter(
        (kind, dtype, math.prod(int(n) for n in shape.split(",") if n))
        for arrays, kind in written
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", arrays)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_model_on_a_mesh_is_the_plain_one_on_one_device(case, monkeypatch):
    model, sizes, rules, chunks, dtype, kernels = CASES[case]
    config = models.DecoderConfig(**BASE | model | {"depth": 1})
    on = placed(sizes, rules)
    params = jax.tree.map(lambda x: 3 * x, models.init_params(config, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (8, 13), 0, 150)
    # Devices have different numbers of tokens that count.
    batch = {"tokens": tokens, "mask": jnp.ones((8, 12)).at[0, :11].set(0)}

    def step(config, params, batch, mesh=None):
        def objective(params):
            options = {"z_loss": 1e-2, "head_chunks": chunks, "mesh": mesh}
            return jnp.square(models.loss(config, params, batch, **options)[0])

        return jax.value_and_grad(objective)(params)

    run = jax.jit(step, static_argnums=(0, 3))
    wanted, allowed = run(config, params, batch), 1e-5
    if dtype == "bfloat16":
        config = dataclasses.replace(config, compute_dtype=dtype)
        allowed = 1.2 * distance(run(config, params, batch), wanted)
    specs = models.partition_specs(config, on)
    at = jax.tree.map(
        lambda s: NamedSharding(on.mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    params = jax.device_put(params, at)
    batch = jax.device_put(batch, NamedSharding(on.mesh, P(("data", "fsdp"))))

    def compiled():
        one = functools.partial(step, config, mesh=on)
        laid_out = jax.jit(one, out_shardings=(NamedSharding(on.mesh, P()), at))
        traced = laid_out.trace(params, batch)
        program = traced.lower().compile()
        written = set(re.findall(r"\w+_kernel", str(traced.jaxpr))) & {NORMS, LOSS}
        return written, exchanges(program.as_text()), program(params, batch)

    _, of_plain, plain = compiled()
    take_kernels(monkeypatch)
    written, exchanged, found = compiled()
    assert written == kernels
    assert distance(plain, wanted) < allowed and distance(found, wanted) < allowed
    # Nothing that the plain program does not exchange.
    assert exchanged and not exchanged - of_plain


def test_a_step_of_a_run_is_that_of_one_device(monkeypatch):
    tokens = jax.random.randint(jax.random.key(0), (8, 17), 0, 257)

    def step(mesh):
        program = build_program(tiny_config("none", None, mesh=mesh))
        batch = {"tokens": jax.device_put(tokens, batch_sharding(program.mesh))}
        return jax.device_get(program.step.preview(program.step.init(jax.random.key(1)), batch))

    wanted = step(MeshConfig(data=1))
    take_kernels(monkeypatch)
    found = step(MeshConfig(2, 2, 2))
    assert distance(found[:2], wanted[:2]) < 1e-5
    # The optimizer takes the signs of gradients near zero, which rounding decides: 0.03 here, and
    # as much for the plain code on this mesh.
    assert distance(found[2], wanted[2]) < 0.1
