"""Adapters in the one training step: what is frozen has no gradient, no state, and no memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import lora, models
from jaxopt_lab.step import Step
from tests.lora.test_side import made, parameters
from tests.models.decoders import LLAMA, tokens


def test_the_training_step_moves_adapters_alone():
    adapters, spec = made(LLAMA, dtype="float32", weights=True)
    params = {"base": parameters(LLAMA), "adapters": adapters}
    trainable = {
        "base": jax.tree.map(lambda _: False, params["base"]),
        "adapters": jax.tree.map(lambda _: True, adapters),
    }

    def loss(params, batch, key):
        side = lora.side(params["adapters"], spec, key)
        value, aux = models.loss(LLAMA, params["base"], batch, side=side)
        return value, aux["tokens"], {}

    step = Step(loss, lora.weight_lora(3e-2, keep=5, weight_learning_rate=0.5))
    state = step.start(params, jax.random.key(0), trainable)
    batch = {"tokens": tokens(LLAMA, batch=4)}
    take, losses = jax.jit(step.take), []
    for _ in range(6):
        state, metrics = take(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02, losses
    for a, b in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(params["base"]), strict=True):
        np.testing.assert_array_equal(a, b)
    paths = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    assert not [p for p, _ in paths if "base" in jax.tree_util.keystr(p)]
    moving = sum(x.size for x in jax.tree.leaves(adapters))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim > 1)
    assert moments == 2 * (moving - sum(len(e.kept) for e in spec.adapters))
    assert np.count_nonzero(weights(state.params["adapters"])) == 5


def weights(adapters):
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    return np.concatenate([np.ravel(x) for p, x in leaves if "weight" in str(p[-1])])


def test_memory_follows_the_number_of_adapters_and_their_layers():
    config = dataclasses.replace(LLAMA, depth=6, width=32, hidden=64, context=64)
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    batch = {"tokens": jax.ShapeDtypeStruct((8, 65), jnp.int32)}

    def peak(**options):
        """Bytes of temporaries of a compiled gradient."""
        chosen = lora.LoraConfig(rank=4, target=("q_proj", "k_proj", "v_proj"), **options)
        names = models.matrix_names(config)
        spec = lora.resolve(chosen, params, models.matrix_axes(config), names)
        adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), spec, p), params)

        def grads(adapters, params, batch, key):
            def loss(adapters):
                side = lora.side(adapters, spec, key)
                return models.loss(config, params, batch, side=side)[0]

            return jax.grad(loss)(adapters)

        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = jax.jit(grads).lower(adapters, params, batch, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # From layer 0 upwards each adapter with dropout keeps an input of its own.
    one, two, all_six = (peak(layers=tuple(range(k)), dropout=0.05) for k in (1, 2, 6))
    assert one < two < all_six, (one, two, all_six)
    # The backward pass ends at the lowest adapter.
    assert peak(layers=(5,)) < 0.7 * peak(layers=(0,))
