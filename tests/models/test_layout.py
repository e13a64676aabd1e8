import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.models import (
    abstract_params,
    init_params,
    logical_axes,
    matrix_axes,
    partition_specs,
    roles,
)
from jaxopt_lab.report.hlo import collectives
from tests.models.decoders import (
    GPT2_BIASED,
    GQA,
    LLAMA,
    STYLES,
    jit,
    largest_difference,
    loss_and_gradient,
    tokens,
    varied_params,
)

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def shardings(config, mesh):
    specs = partition_specs(config, mesh)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def structure(tree):
    return jax.tree.structure(tree, is_leaf=lambda x: x is None or isinstance(x, tuple))


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_every_tree_has_the_structure_of_the_parameters(config):
    params = abstract_params(config)
    for tree in (roles(config), matrix_axes(config), logical_axes(config)):
        assert structure(tree) == structure(params)
    specs = partition_specs(config, SIZES)
    assert jax.tree.structure(specs, is_leaf=lambda s: isinstance(s, P)) == structure(params)


def test_roles_and_matrix_axes():
    assert roles(GPT2_BIASED)["head"] == "head"
    assert roles(GPT2_BIASED)["embedding"] == {"tokens": "embedding", "positions": "position"}
    axes = matrix_axes(GPT2_BIASED)
    assert axes["head"] is None
    assert axes["embedding"] == {"tokens": None, "positions": MuonDimensionNumbers(0, 1)}
    attention = axes["layers"]["attention"]
    assert attention["qkv"] == {"kernel": MuonDimensionNumbers(1, 3), "bias": None}
    assert attention["out"] == {"kernel": MuonDimensionNumbers(1, 2), "bias": None}
    assert axes["layers"]["mlp_norm"] == {"scale": None, "bias": None}
    assert matrix_axes(GQA)["layers"]["attention"]["kv"]["kernel"] == MuonDimensionNumbers(1, 3)
    fused = matrix_axes(
        dataclasses.replace(GPT2_BIASED, fused_qkv_as="one"), position_embedding="adamw"
    )
    assert fused["layers"]["attention"]["qkv"]["kernel"] == MuonDimensionNumbers(1, (2, 3))
    assert fused["embedding"]["positions"] is None


def test_matrix_axes_serve_optax_muon():
    params = varied_params(LLAMA)
    tx = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=matrix_axes(LLAMA))
    updates, _ = jit(lambda p: tx.update(p, tx.init(p), p))(params)
    q, k, _ = np.moveaxis(np.asarray(updates["layers"]["attention"]["qkv"]["kernel"])[1], 1, 0)
    for matrix in (q, k):  # each is orthogonalised on its own
        singular_values = np.linalg.svd(matrix, compute_uv=False) / 1e-2
        assert np.all((singular_values > 0.3) & (singular_values < 1.3))


def test_partition_specs_follow_megatron_and_fsdp():
    specs = partition_specs(GPT2_BIASED, SIZES)
    layers = specs["layers"]
    assert specs["embedding"]["tokens"] == P("tensor", "fsdp")
    assert specs["head"] == P("fsdp", "tensor")
    assert layers["attention"]["qkv"]["kernel"] == P(None, "fsdp", None, "tensor")
    assert layers["attention"]["qkv"]["bias"] == P(None, None, "tensor")
    assert layers["attention"]["out"]["kernel"] == P(None, "tensor", "fsdp")
    assert layers["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")
    assert layers["mlp"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert layers["mlp"]["down"]["bias"] == P(None, None)


def test_mesh_axes_that_do_not_divide_are_dropped():
    kv = partition_specs(GQA, {"tensor": 4, "fsdp": 3})["layers"]["attention"]["kv"]["kernel"]
    assert kv == P(None, None, None, None)  # 2 heads of width 4 are not cut into 4 pieces
    assert partition_specs(GQA, {"tensor": 4})["layers"]["attention"]["q"]["kernel"][2] == "tensor"
    odd = dataclasses.replace(LLAMA, vocab_size=63)
    assert partition_specs(odd, SIZES)["embedding"]["tokens"] == P(None, "fsdp")


def test_parameters_are_created_sharded_and_equal():
    mesh = mesh_of(SIZES)
    placed = shardings(LLAMA, mesh)
    params = jit(lambda key: init_params(LLAMA, key), out_shardings=placed)(jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, params, placed)))
    alone = jit(lambda key: init_params(LLAMA, key))(jax.random.key(0))
    assert largest_difference(params, alone) == 0


@pytest.mark.parametrize(
    ("config", "head_chunks"), [(GPT2_BIASED, 1), (GQA, 4)], ids=["gpt2", "gqa-chunked"]
)
def test_eight_devices_compute_what_one_computes(config, head_chunks):
    mesh = mesh_of(SIZES)
    batch = {"tokens": tokens(config, batch=8, length=13)}
    with jax.enable_x64(True):
        config = dataclasses.replace(
            config, depth=1, compute_dtype="float64", param_dtype="float64"
        )
        params = varied_params(config)
        alone = loss_and_gradient(config, params, batch, head_chunks=head_chunks)
        placed = jax.device_put(params, shardings(config, mesh))
        rows = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
        together = loss_and_gradient(config, placed, rows, head_chunks=head_chunks, mesh=mesh)
        assert largest_difference(together, alone) < 1e-14


def test_collectives_move_weights_and_reductions_but_never_logits():
    mesh = mesh_of(SIZES)
    # Wide enough that an array of activations or logits is larger than any weight.
    config = dataclasses.replace(LLAMA, vocab_size=256, depth=1)
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract_params(config),
        shardings(config, mesh),
    )
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    batch = {"tokens": jax.ShapeDtypeStruct((64, 13), np.int32, sharding=rows)}
    compiled = loss_and_gradient.lower(config, params, batch, mesh=mesh).compile()
    counts = collectives(compiled.as_text())
    assert set(counts) <= {"all-gather", "all-reduce", "reduce-scatter"}
    weight_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    # Each weight is gathered at most twice (forward and backward), halved by the tensor axis.
    assert counts["all-gather"].bytes <= 2 * weight_bytes
    assert counts["all-gather"].bytes < 64 * 12 * 256 * 4 / 4
