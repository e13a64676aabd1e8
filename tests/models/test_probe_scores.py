"""Scores of perturbed models, layer by layer and beside the weights: those of whole trees."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxopt_lab import models
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.models import encoder
from jaxopt_lab.tasks import encoder_logits, prompt_logits
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from tests.models import encoders
from tests.models.decoders import GPT2_BIASED, LLAMA, jit
from tests.zeroth_order.problems import KEY, cheap_normals

WORDS = np.array([5, 33, 69])
SCALE = 0.3


def prompts(config):
    rng = np.random.default_rng(1)
    lengths = np.array([[9], [4]])
    return {"tokens": rng.integers(0, 70, (2, 9)), "mask": np.arange(9) < lengths}


def of(model):
    """Configuration, parameters, scores and rows, in float64."""
    if model == "encoder":
        config = encoders.wide(encoders.BERT, depth=1, pooling="mean")
        params = encoder.init_params(config, jax.random.key(0))
        return config, params, encoder_logits(config), encoders.batch()
    # The last columns of a head are fewer than are drawn at once.
    config = {"tied": LLAMA, "untied": GPT2_BIASED}[model]
    config = dataclasses.replace(
        config, vocab_size=70, depth=1, compute_dtype="float64", param_dtype="float64"
    )
    params = models.init_params(config, jax.random.key(0))
    return config, params, prompt_logits(config, WORDS), prompts(config)


@pytest.mark.parametrize(
    "model", ["encoder", "tied", pytest.param("untied", marks=pytest.mark.slow)]
)
def test_scores_of_a_perturbed_model(model, monkeypatch):
    cheap_normals(monkeypatch)
    with jax.enable_x64(True):
        config, params, logits, rows = of(model)
        leaves = leaves_of(params, models.matrix_axes(config))

        def found(params):
            direction = Direction(zo.low_rank(2), KEY, 3, leaves)
            noise = jax.tree.structure(params).unflatten(
                [direction.of(i) for i in range(len(leaves))]
            )
            moved = jax.tree.map(lambda x, z: x + SCALE * z, params, noise)
            found = [
                logits(params, rows, None),
                logits(moved, rows, None),
                logits(params, rows, None, perturbation=(direction, SCALE)),
            ]
            if model == "encoder":  # of decoders tests/zeroth_order has them
                beside = zo.beside(lambda p, sides: logits(p, rows, None, side=sides))
                found.append(beside(params, direction, jax.numpy.asarray(SCALE)))
            return found

        plain, whole, *ways = jit(found)(params)
        for scores in ways:
            np.testing.assert_allclose(scores, whole, rtol=1e-10)
        assert np.abs(whole - plain).min() > 1e-3
