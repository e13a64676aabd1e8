"""Taps: inputs times output gradients are the gradient of the dense kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import lora, models
from jaxopt_lab.core.matrices import batch_first
from tests.lora.test_side import KINDS, made, parameters, wide
from tests.models.decoders import GQA, LLAMA, tokens


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def batch(config, rows=slice(None)):
    return {"tokens": tokens(config, batch=4)[rows]}


def dense(config, adapters, spec, batch):
    """The gradients of the kernels at the adapted model, by autodiff."""
    params = parameters(config)

    def loss(params):
        return models.loss(config, params, batch, side=lora.side(adapters, spec))[0]

    return jax.jit(jax.grad(loss))(params)


def tapped(config, adapters, spec, batch):
    params = parameters(config)

    def run(adapters, batch):
        def loss(adapters, side):
            return models.loss(config, params, batch, side=side)

        return lora.value_grad_and_taps(loss, adapters, spec, has_aux=True)

    return jax.jit(run)(adapters, batch)


def products(tap):
    x, s = (y if y.ndim == 3 else y[None] for y in (tap.x, tap.s))
    return jnp.einsum("kbn,kbm->knm", jnp.repeat(x, len(s) // len(x), 0), s)


def check(spec, taps, wanted):
    for entry in spec.adapters:
        tap, kernel = taps, wanted
        for name in entry.path:
            tap, kernel = tap[name], kernel[name]
        count, n, m = entry.matrix_shape
        kernel = batch_first(kernel, entry.axes).reshape(count, n, m)[np.array(entry.kept)]
        np.testing.assert_allclose(products(tap), kernel, rtol=1e-10, atol=1e-13)
        assert tap.scale == entry.scale


CASES = [
    ("llama", "all", {}),
    ("llama", "ragged", {}),
    ("gqa", "queries and values", {"loop": "scanned"}),
    ("llama", "ragged", {"loop": "scanned", "remat": "full"}),
    ("gqa", "all", {"remat": "dots"}),
]


@pytest.mark.parametrize(("style", "kind", "changes"), CASES)
def test_taps_are_the_gradient_of_the_kernel(style, kind, changes):
    config = wide({"llama": LLAMA, "gqa": GQA}[style], **changes)
    adapters, spec = made(config, **KINDS[kind])
    (value, aux), grads, taps = tapped(config, adapters, spec, batch(config))
    check(spec, taps, dense(config, adapters, spec, batch(config)))
    side = lora.side(adapters, spec)

    def loss(adapters):
        side = lora.side(adapters, spec)
        return models.loss(config, parameters(config), batch(config), side=side)[0]

    wanted, plain = jax.jit(jax.value_and_grad(loss))(adapters)
    del side
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    assert int(aux["tokens"]) == 4 * 11
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_adapters_of_a_layer_share_their_inputs():
    config = wide(LLAMA)
    adapters, spec = made(config, target=("q_proj", "v_proj"))
    _, _, taps = tapped(config, adapters, spec, batch(config))
    tap = taps["layers"]["attention"]["qkv"]["kernel"]
    assert tap.x.shape == (2, 44, 16) and tap.s.shape == (4, 44, 16)


def test_accumulated_taps_are_those_of_the_whole_batch():
    config = wide(LLAMA)
    adapters, spec = made(config)
    parts = [
        tapped(config, adapters, spec, batch(config, rows))[2] for rows in (slice(2), slice(2, 4))
    ]
    check(spec, lora.joined_taps(parts), dense(config, adapters, spec, batch(config)))


def test_taps_feed_the_optimizer():
    config = dataclasses.replace(LLAMA, loop="scanned")
    adapters, spec = made(config, dtype="float32")
    tx = lora.scaled_lorsum(2.0)
    state = tx.init(adapters)
    params = parameters(config)

    @jax.jit
    def step(adapters, state):
        def loss(adapters, side):
            return models.loss(config, params, batch(config), side=side)[0]

        value, grads, taps = lora.value_grad_and_taps(loss, adapters, spec)
        updates, state = tx.update(grads, state, adapters, taps=taps)
        return jax.tree.map(jnp.add, adapters, updates), state, value

    losses = []
    for _ in range(8):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert (np.diff(losses) < 0).all() and losses[-1] < losses[0] - 0.1, losses


def test_what_has_no_taps():
    adapters, spec = made(wide(LLAMA), dora=True)
    with pytest.raises(ValueError, match="taps: DoRA"):
        lora.value_grad_and_taps(lambda a, side: 0.0, adapters, spec)
    adapters, spec = made(wide(LLAMA), weights=True)
    with pytest.raises(ValueError, match="taps: weights change the scale"):
        lora.value_grad_and_taps(lambda a, side: 0.0, adapters, spec)
    adapters, spec = made(wide(LLAMA))
    with pytest.raises(ValueError, match="never uses its layer"):
        lora.value_grad_and_taps(lambda a, side: 0.0, adapters, spec)
