import dataclasses

import jax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import models
from jaxopt_lab.bench import shapes


def described(params, axes):
    """Path -> (shape, dtype, matrix axes)."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    layouts = structure.flatten_up_to(axes)
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, layout)
        for (path, leaf), layout in zip(leaves, layouts, strict=True)
    }


def test_the_same_models_are_named():
    assert set(shapes.SHAPES) == set(models.PRESETS)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model", shapes.SHAPES)
def test_stacked_shapes_and_axes_are_those_of_the_model(model, fused):
    config = dataclasses.replace(models.PRESETS[model], fused_qkv_as="one" if fused else "three")
    assert described(
        shapes.abstract_params(model), shapes.matrix_axes(model, fused_qkv=fused)
    ) == described(models.abstract_params(config), models.matrix_axes(config))


@pytest.mark.parametrize("model", shapes.SHAPES)
def test_per_layer_leaves_stack_to_the_stacked_ones(model):
    stacked = shapes.abstract_params(model)["layers"]
    layers = shapes.abstract_params(model, "per-layer")["layers"]
    assert list(layers) == [str(i) for i in range(shapes.SHAPES[model].depth)]
    for layer in layers.values():
        restacked = jax.tree.map(lambda x: (len(layers), *x.shape), layer)
        assert restacked == jax.tree.map(lambda x: x.shape, stacked)
    axes = shapes.matrix_axes(model, "per-layer")["layers"]["0"]["attention"]["qkv"]["kernel"]
    assert axes == MuonDimensionNumbers(0, 2)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model: 'gpt5' is not one of tiny"):
        shapes.abstract_params("gpt5")
