"""Losses that perturb their layers themselves: the numbers of whole trees, in the memory of one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from tests.models.decoders import GPT2, LLAMA, tokens, varied_params
from tests.zeroth_order.problems import AXES, KEY, entries, probe_state, quadratic


def wide(config, **changes):
    return dataclasses.replace(
        config, vocab_size=70, compute_dtype="float64", param_dtype="float64", **changes
    )


def steps(tx, params, count, **loss):
    """Parameters, state and losses of some steps."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, **loss)
        return optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(count):
        params, state = step(params, state)
        losses.append(zo.recorded(state))
    return params, state, jnp.stack(losses)


def assert_equal_runs(config, make, count=2):
    """Runs with whole trees and layer by layer; returns what the latter found."""
    params = varied_params(config)
    batch = {"tokens": tokens(config, length=13)}
    axes = models.matrix_axes(config)
    tx = make(matrix_axes=axes)
    whole = steps(tx, params, count, value_fn=lambda p: models.loss(config, p, batch)[0])
    probe_fn = models.probe_loss(config, batch, vocabulary_chunk=32)
    found = steps(tx, params, count, probe_fn=probe_fn)
    np.testing.assert_allclose(found[2], whole[2], rtol=1e-13)
    np.testing.assert_allclose(entries(found[0]), entries(whole[0]), rtol=1e-12, atol=1e-12)
    assert (entries(found[0]) != entries(params)).any()
    return tx, params, found[2], found[0]


def test_mezo_with_a_tied_head_is_the_same_in_one_loop_for_both_signs_and_replayed(tmp_path):
    def make(**options):
        return zo.mezo(1e-3, key=KEY, probes=zo.Probes(engine=zo.chunked(1), **options))

    with jax.enable_x64(True):
        tx, params, losses, found = assert_equal_runs(wide(LLAMA, loop="scanned"), make)
        run = {"method": "mezo", "settings": {}}
        file = tmp_path / "run.npz"
        zo.save_replay(file, **run, key=KEY, params=params, losses=losses)
        again = zo.apply_replay(file, tx, params, **run)
        np.testing.assert_allclose(entries(again), entries(found), rtol=1e-14)


@pytest.mark.slow  # compiles for half a minute
def test_the_mean_of_ldsd_with_an_untied_head_and_positions():
    def make(**options):
        policy = {"policy_rate": 0.5, "start": "random", "candidates": 2}
        return zo.ldsd(optax.sgd(1e-3), **policy, key=KEY, probes=zo.Probes(zo.signs(), **options))

    with jax.enable_x64(True):
        assert_equal_runs(wide(GPT2, loop="scanned", tied=False), make)


def test_other_methods_and_one_side():
    # A small stack in place of a decoder: programs compile quickly.
    params = {"layers": {"w": 0.3 * jnp.ones((3, 4, 4)), "b": jnp.zeros((3, 4))}}
    axes = {"layers": {"w": AXES["kernel"], "b": None}}

    def value_fn(params):
        x = jnp.ones((2, 4))
        for i in range(3):
            x = jnp.tanh(x @ params["layers"]["w"][i] + params["layers"]["b"][i])
        return jnp.mean(x)

    def probe_fn(params, direction, scale):
        def layer(x, i):
            part = zo.perturbed_layer("layers", params["layers"], direction, scale, i)
            return jnp.tanh(x @ part["w"] + part["b"]), None

        return jnp.mean(jax.lax.scan(layer, jnp.ones((2, 4)), jnp.arange(3))[0])

    for make in (
        functools.partial(zo.conservative, 1e-2),
        functools.partial(zo.jaguar_signsgd, 1e-2),
        functools.partial(zo.estimate, num_directions=2, two_sided=False, matrix_axes=axes),
        functools.partial(
            *(zo.estimate, zo.sphere()),
            **{"num_directions": 2, "matrix_axes": axes, "engine": zo.vmapped()},
        ),
    ):
        options = {} if make.func is zo.estimate else {"probes": zo.Probes(matrix_axes=axes)}
        tx = make(key=KEY, **options)
        _, _, wanted = steps(tx, params, 1, value_fn=value_fn)
        _, _, losses = steps(tx, params, 1, probe_fn=probe_fn)
        np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    # One layer moves alone.
    given = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)).at[0, 1].set(1.0), params)
    tx = zo.estimate(key=KEY, matrix_axes=axes)
    one = {"probe_fn": probe_fn, "draws": given}
    updates, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, **one))(params)
    assert state.losses[0] > state.losses[1]
    assert updates["layers"]["w"][1].all() and not updates["layers"]["w"][::2].any()


# A 1B decoder in small: 16 layers, a table of a fifth of the parameters, few tokens.
SMALL = models.DecoderConfig(
    vocab_size=8192, width=128, depth=16, heads=4, kv_heads=2, hidden=512, context=16,
    loop="scanned",
)  # fmt: skip


def memory(fn, *args, donate=()):
    """Arguments and temporaries of a compiled function over the size of the parameters.

    XLA gives out memory before LLVM compiles: they are those that users get.
    """
    found = jax.jit(fn, donate_argnums=donate).lower(*args).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0]))
    return (found.argument_size_in_bytes + found.temp_size_in_bytes) / size


def small(vocabulary_chunk=1024):
    batch = {"tokens": np.zeros((1, 17), np.int32)}
    loss = models.probe_loss(SMALL, batch, vocabulary_chunk=vocabulary_chunk)
    return loss, models.abstract_params(SMALL), models.matrix_axes(SMALL)


def step_memory(tx, params, **loss):
    def step(params, state):
        updates, state = tx.update(None, state, params, **loss)
        return optax.apply_updates(params, updates), state

    return memory(step, params, jax.eval_shape(tx.init, params), donate=(0, 1))


def test_a_perturbed_loss_needs_the_memory_of_inference():
    loss, params, axes = small()
    leaves = leaves_of(params, axes)
    plain = memory(loss, params)

    def perturbed(params, data):
        direction = Direction(zo.gaussian(), jax.random.wrap_key_data(data), 0, leaves)
        return loss(params, direction, 1e-3)

    found = memory(perturbed, params, jax.ShapeDtypeStruct((2,), jnp.uint32))
    assert found <= 1.15 and found <= 1.05 * plain


@pytest.mark.parametrize("engine", [zo.sequential(), zo.chunked(1)], ids=lambda e: e.name)
def test_a_whole_step_needs_the_memory_of_inference(engine):
    # A loop that emits updated layers would need twice the parameters.
    loss, params, axes = small()
    tx = zo.mezo(1e-6, key=KEY, probes=zo.Probes(matrix_axes=axes, engine=engine))
    assert step_memory(tx, params, probe_fn=loss) <= 1.2


def test_a_step_of_ldsd_needs_one_copy_for_its_mean():
    # Were the mean replaced in the step that reads it, the old one would live beside the new one.
    params = {"layers": {"w": jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)}}
    axes = {"layers": {"w": AXES["kernel"]}}

    def probe_fn(params, direction, scale):
        def layer(x, i):
            part = zo.perturbed_layer("layers", params["layers"], direction, scale, i)
            return jnp.tanh(x @ part["w"]), None

        return jnp.mean(jax.lax.scan(layer, jnp.ones((1, 64)), jnp.arange(16))[0])

    tx = zo.ldsd(optax.sgd(1e-6), key=KEY, probes=zo.Probes(zo.signs(), matrix_axes=axes))
    assert step_memory(tx, params, probe_fn=probe_fn) <= 2.2


def test_draws_stay_in_the_loop_over_both_signs():
    # The head in one piece: its noise does not depend on the round of any loop but for the
    # barrier, and drawn in front of them it would be kept beside the perturbed table.
    loss, params, axes = small(vocabulary_chunk=8192)
    tx = zo.mezo(1e-6, key=KEY, probes=zo.Probes(zo.signs(), matrix_axes=axes))
    table = SMALL.vocab_size * SMALL.width / models.parameter_count(SMALL)
    assert step_memory(tx, params, probe_fn=loss) <= 1.05 + table + 0.5 * table


def bad(message, params=None, tx=None, **loss):
    params = {"w": jnp.ones((3, 4))} if params is None else params
    tx = zo.mezo(0.1, key=KEY) if tx is None else tx
    with pytest.raises(ValueError, match=message):
        tx.update(None, tx.init(params), params, **loss)


def test_models_without_stacked_layers_are_refused():
    def probe_fn(params, direction, scale):
        return jnp.sum(scale * direction.layer("w", 0))

    bad(r"layer of leaf w, but its shape is \(3, 4\).*pass value_fn", probe_fn=probe_fn)
    bad("matrix_axes does not say", {"w": jnp.ones((2, 3, 4))}, probe_fn=probe_fn)
    bad(r"its shape is \(\)", {"w": jnp.ones(())}, probe_fn=probe_fn)
    bad("no leaf 'w'; there are kernel", {"kernel": jnp.ones((3, 4))}, probe_fn=probe_fn)
    # Decoders whose layout was not given.
    params = varied_params(LLAMA)
    loss = models.probe_loss(LLAMA, {"tokens": tokens(LLAMA)})
    bad(r"leaf embedding/tokens.*models.matrix_axes\(config\)", params, probe_fn=loss)


def test_bad_losses_are_refused():
    def probe_fn(params, direction, scale):
        return quadratic(params) + scale

    bad("got both value_fn and probe_fn", value_fn=quadratic, probe_fn=probe_fn)
    bad("probe_fn: got .*wanted one floating", probe_fn=lambda p, d, s: p["w"])
    bad("probe_fn cannot be traced", probe_fn=lambda p, d, s: float(p["w"][0, 0]))
    whole = "got probe_fn, wanted value_fn"
    bad(f"forward_gradient: {whole}", tx=zo.forward_gradient(0.1, key=KEY), probe_fn=probe_fn)
    bad(f"subspace_muon: {whole}", tx=zo.subspace_muon(0.1, key=KEY), probe_fn=probe_fn)
    tx = zo.ldsd(optax.sgd(0.1), start="gradient", key=KEY)
    bad(f"start='gradient': {whole}", tx=tx, probe_fn=probe_fn)


def test_dropout_is_refused():
    key = jax.random.key(3)

    def dropped(params):
        # Inside of a loop and a compiled function, as in models.
        def layer(x, w):
            return jax.jit(lambda x: jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0))(x), w

        return jnp.sum(jax.lax.scan(layer, jnp.ones(4), params["w"])[0])

    bad("value_fn draws random numbers, as dropout does", value_fn=dropped)
    bad("probe_fn draws random numbers", probe_fn=lambda params, direction, scale: dropped(params))
    # What belongs to the batch is drawn in front.
    noise = jax.random.normal(key, (4,))
    params, tx = {"w": jnp.ones((3, 4))}, zo.mezo(0.1, key=KEY)
    tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"] @ noise))


def test_losses_that_are_not_finite_are_counted():
    params = {"w": jnp.ones((3, 4))}

    def probe_fn(params, direction, scale):
        return jnp.where(scale > 0, jnp.nan, 1.0)

    tx = zo.estimate(key=KEY, num_directions=2, engine=zo.chunked(2))
    updates, state = tx.update(None, tx.init(params), params, probe_fn=probe_fn)
    assert not entries(updates).any() and probe_state(state).notfinite_count == 2
