"""Adapters beside sharded kernels: the values of one device, and no kernel moves for them."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab import lora, models
from jaxopt_lab.report.hlo import collectives
from tests.lora.test_side import made, parameters
from tests.models.decoders import LLAMA, tokens

CONFIG = dataclasses.replace(LLAMA, width=32, hidden=48, depth=2, heads=4)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def placed(mesh):
    specs = models.partition_specs(CONFIG, mesh)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def test_factors_lie_along_their_kernels(mesh):
    _, spec = made(CONFIG, dtype="float32", weights=True)
    found = lora.shardings(spec, placed(mesh))["layers"]
    up, down = (found["mlp"][name]["kernel"] for name in ("up", "down"))
    assert up["a"].spec == P(None, "fsdp", None) and up["b"].spec == P(None, None, "tensor")
    assert down["a"].spec == P(None, "tensor", None) and down["b"].spec == P(None, None, "fsdp")
    assert found["attention"]["qkv"]["kernel"]["b"].spec == P(None, None, "tensor")
    params = {"out": {"kernel": jnp.zeros((2, 4, 6, 8))}}
    layout = {"out": {"kernel": MuonDimensionNumbers((1, 2), 3)}}
    spec = lora.resolve(lora.LoraConfig(rank=2), params, layout)
    for kernel, a in (
        (P(None, "fsdp"), P(None, "fsdp", None)),
        (P(None, None, "fsdp"), P(None, None, None)),
    ):
        found = lora.shardings(spec, {"out": {"kernel": NamedSharding(mesh, kernel)}})
        assert found["out"]["kernel"]["a"].spec == a


def run(side, params, batch, mesh):
    """Loss and gradient by what `side` makes of something trainable."""

    def loss(trained):
        return models.loss(CONFIG, params, batch, side=side(trained), mesh=mesh)[0]

    return jax.value_and_grad(loss)


def test_a_step_on_eight_devices(mesh):
    adapters, spec = made(CONFIG, dtype="float32")
    params, batch = parameters(CONFIG), {"tokens": tokens(CONFIG, batch=8)}
    tx = lora.scaled_lorsum(0.5)

    def step(params, adapters, state, batch, mesh):
        def loss(adapters, side):
            return models.loss(CONFIG, params, batch, side=side, mesh=mesh)[0]

        value, grads, taps = lora.value_grad_and_taps(loss, adapters, spec)
        updates, state = tx.update(grads, state, adapters, taps=taps)
        return value, jax.tree.map(jnp.add, adapters, updates), state

    alone = jax.jit(step, static_argnums=4)(params, adapters, tx.init(adapters), batch, None)
    param_shardings = placed(mesh)
    where = lora.shardings(spec, param_shardings)
    of_state = jol.state_shardings(tx, adapters, where)
    rows = NamedSharding(mesh, P("fsdp"))
    on_mesh = jax.device_put(
        (params, adapters, tx.init(adapters), batch), (param_shardings, where, of_state, rows)
    )
    everywhere = NamedSharding(mesh, P())
    compiled = jax.jit(step, static_argnums=4, out_shardings=(everywhere, where, of_state))
    together = compiled(*on_mesh, mesh)
    pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_no_kernel_is_gathered_for_an_adapter(mesh):
    adapters, spec = made(CONFIG, dtype="float32")
    params, batch = parameters(CONFIG), {"tokens": tokens(CONFIG, batch=8)}
    param_shardings = placed(mesh)
    where, rows = lora.shardings(spec, param_shardings), NamedSharding(mesh, P("fsdp"))

    def adapted(params, adapters, batch):
        return run(lambda a: lora.side(a, spec), params, batch, mesh)(adapters)

    def frozen(params, scale, batch):
        # The same model without adapters; something must be differentiated.
        def loss(scale):
            changed = params | {"embedding": {"tokens": params["embedding"]["tokens"] * scale}}
            return models.loss(CONFIG, changed, batch, mesh=mesh)[0]

        return jax.value_and_grad(loss)(scale)

    def large(fn, shardings, kind, *arguments):
        """Results of a collective that are as large as half a kernel; factors are smaller."""
        text = jax.jit(fn, in_shardings=shardings).lower(*arguments).compile().as_text()
        shapes = re.findall(rf"= \(?[a-z0-9]+\[([\d,]+)\][^=]*? {kind}\(", text)
        found = [math.prod(map(int, shape.split(","))) for shape in shapes]
        return [size for size in found if size >= CONFIG.width**2 // 2], text

    everywhere = NamedSharding(mesh, P())
    ours, text = large(
        adapted, (param_shardings, where, rows), "all-gather", params, adapters, batch
    )
    theirs, _ = large(
        frozen, (param_shardings, everywhere, rows), "all-gather", params, jnp.ones(()), batch
    )
    assert theirs and len(ours) <= len(theirs) and sum(ours) <= sum(theirs), (ours, theirs)
    assert collectives(text)["all-gather"].count > 0  # it is a sharded program
