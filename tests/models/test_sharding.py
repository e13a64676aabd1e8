"""Sharding rules: parameters and activations follow the same ones, and mistakes are named."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab.models import Placement, ShardingRules, apply, encoder, partition_specs
from jaxopt_lab.models.layout import abstract_params
from jaxopt_lab.models.sharding import constrain, spec_for
from tests.models.decoders import GQA, LLAMA, largest_difference, loss_and_gradient, tokens
from tests.models.decoders import varied_params as varied
from tests.models.encoders import BERT

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
# Megatron's sequence parallelism, and a layer that is split along its inputs alone.
RULES = ShardingRules(
    embed=("fsdp", "tensor"), hidden=("data",), kv_heads=(), length=("tensor",), position=("data",)
)


def mesh():
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), (AxisType.Auto,) * 3)


def test_parameters_follow_the_rules():
    specs = partition_specs(GQA, Placement(mesh(), RULES))["layers"]
    assert specs["mlp"]["up"]["kernel"] == P(None, ("fsdp", "tensor"), "data")
    assert specs["mlp"]["down"]["kernel"] == P(None, "data", ("fsdp", "tensor"))
    # The heads have taken tensor already where they come first.
    assert specs["attention"]["out"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["attention"]["kv"]["kernel"] == P(None, ("fsdp", "tensor"), None, None)


def pinned(model, rules):
    """The layouts to which activations are pinned, as the program says them."""
    placed = Placement(mesh(), rules)
    forward = encoder.hidden if model is BERT else apply
    params, ids = abstract_params(model), jax.ShapeDtypeStruct((4, 8), np.int32)
    call = jax.jit(lambda params, ids: forward(model, params, ids, mesh=placed))
    lines = call.lower(params, ids).as_text().splitlines()
    return {line.partition("<@mesh, ")[2] for line in lines if "sharding_constraint" in line}


@pytest.mark.parametrize("model", [GQA, BERT], ids=["decoder", "encoder"])
def test_activations_follow_the_rules(model):
    width, hidden, heads = model.width, model.hidden_width, model.heads
    of_hidden = f'[{{"data", "fsdp"}}, {{}}, {{"tensor"}}]> : tensor<4x8x{hidden}xf32>'
    of_heads = f'{{"tensor"}}, {{}}]> : tensor<4x8x{heads}x{width // heads}xf32>'
    along = f'[{{"data", "fsdp"}}, {{"tensor"}}, {{}}]> : tensor<4x8x{width}xf32>'

    def found(rules):
        lines = pinned(model, rules)
        return [any(spec in line for line in lines) for spec in (of_hidden, of_heads, along)]

    assert found(ShardingRules()) == [True, True, False]
    assert found(ShardingRules(length=("tensor",), hidden=(), heads=())) == [False, False, True]


def test_eight_devices_under_other_rules_compute_what_one_computes():
    with jax.enable_x64(True):
        config = dataclasses.replace(LLAMA, depth=1, compute_dtype="float64", param_dtype="float64")
        batch, params = {"tokens": tokens(config, batch=8, length=13)}, varied(config)
        alone = loss_and_gradient(config, params, batch)
        placed = Placement(mesh(), RULES)
        specs = partition_specs(config, placed)
        at = jax.tree.map(
            lambda s: NamedSharding(placed.mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
        )
        rows = jax.device_put(batch, NamedSharding(placed.mesh, P(("data", "fsdp"))))
        together = loss_and_gradient(config, jax.device_put(params, at), rows, mesh=placed)
        assert largest_difference(together, alone) < 1e-14


def test_an_axis_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="rules.vocab: got mesh axis 'modle', expected axes of"):
        Placement(mesh(), ShardingRules(vocab=("modle",)))  # pyright: ignore
    with pytest.raises(ValueError, match="logical axis: got 'widht', expected one of batch, layer"):
        spec_for(("widht",), (4,), SIZES)
    with pytest.raises(ValueError, match="logical axis: got 'lenght'"):
        constrain(np.zeros((4, 4)), mesh(), ("batch", "lenght"))
