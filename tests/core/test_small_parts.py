from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.lax import DotAlgorithmPreset, Precision
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey, tree_leaves_with_path

from jaxopt_lab.core import whole_matrices
from jaxopt_lab.core.keys import leaf_key, leaf_keys, purpose_key, threefry_key
from jaxopt_lab.core.numerics import frobenius_unit
from jaxopt_lab.core.precision import dot_precision
from jaxopt_lab.core.spectral import power_iteration, stable_rank
from jaxopt_lab.core.whole_matrices import on_whole_matrices
from jaxopt_lab.optim.lion_muon.transform import SPECTRAL_SCALES
from jaxopt_lab.parity.lion_muon import SIGN_SCALES
from jaxopt_lab.report.hlo import collectives


def test_power_iteration_approaches_from_below():
    x = jax.random.normal(jax.random.key(0), (4, 6, 9))
    v = jax.random.normal(jax.random.key(1), (4, 9))
    exact = np.linalg.norm(x, ord=2, axis=(-2, -1))
    few, many = (power_iteration(x, v, iterations=k) for k in (1, 60))
    assert (few <= exact * (1 + 1e-5)).all()
    np.testing.assert_allclose(many, exact, rtol=1e-3)
    assert (stable_rank(x, v) >= (np.linalg.norm(x, axis=(-2, -1)) / exact) ** 2 * (1 - 1e-5)).all()


def test_stable_rank_of_known_matrices():
    v = jax.random.normal(jax.random.key(1), (2, 5))
    x = jnp.stack([jnp.ones((5, 5)), jnp.eye(5)])
    np.testing.assert_allclose(stable_rank(x, v), [1.0, 5.0], rtol=1e-5)
    assert stable_rank(jnp.zeros((2, 5, 5)), v).tolist() == [0.0, 0.0]


def test_the_scale_of_a_matrix_does_not_matter_to_its_stable_rank():
    x, v = (jax.random.normal(jax.random.key(0), shape) for shape in ((2, 5, 5), (2, 5)))
    for scale in (1e-30, 1e18):
        np.testing.assert_allclose(stable_rank(scale * x, v), stable_rank(x, v), rtol=1e-5)


def test_scales():
    fan, rms, frob = SPECTRAL_SCALES["fan"], SPECTRAL_SCALES["match_rms"], SIGN_SCALES["frob"]
    assert rms(4, 9) == pytest.approx(0.6) and fan(4, 16) == 2 and fan(16, 4) == 1
    assert SPECTRAL_SCALES["none"](4, 9) == SIGN_SCALES["none"](4, 9) == 1
    assert frob(4, 16) == 0.25 and SIGN_SCALES["muon"](4, 16) == 0.5


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1, 1)])
def test_the_unit_of_a_single_number_is_its_sign(shape):
    # Compiled: XLA folds constants of a square that no sum follows.
    axes = range(max(0, len(shape) - 2), len(shape))
    unit = jax.jit(lambda x: frobenius_unit(x, axes))
    for x, expected in ((0.0, 0.0), (-1e-30, -1.0), (1e30, 1.0), (-3.0, -1.0)):
        np.testing.assert_allclose(unit(jnp.full(shape, x)), np.full(shape, expected))
    assert jnp.isnan(unit(jnp.full(shape, jnp.inf))).all()


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1.0, 1e18, 1e37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unit_of_the_frobenius_norm_at_any_scale(scale, dtype):
    x = (scale * jax.random.normal(jax.random.key(0), (3, 4, 6))).astype(dtype)
    u = frobenius_unit(x.astype("float32"), (1, 2))
    np.testing.assert_allclose(np.linalg.norm(u, axis=(1, 2)), 1, rtol=1e-5)
    # Powers of two round nothing.
    np.testing.assert_array_equal(frobenius_unit(x.astype("float32") * 0.25, (1, 2)), u)


def test_a_unit_of_zero_is_zero_and_nan_spreads():
    u = frobenius_unit(jnp.zeros((2, 2, 2)).at[1, 0, 1].set(jnp.nan), (1, 2))
    assert not u[0].any() and jnp.isnan(u[1]).all()
    slope = jax.grad(lambda x: frobenius_unit(x, (0, 1)).sum())(jnp.zeros((2, 2)))
    assert jnp.isfinite(slope).all()


def test_leaf_keys_depend_on_the_path_alone():
    key = jax.random.key(0)
    full = {"a": jnp.ones(1), "b": {"c": jnp.ones(1)}}
    keys = {str(p): leaf_key(key, p) for p, _ in tree_leaves_with_path(full)}
    ((path, _),) = tree_leaves_with_path({"b": {"c": jnp.ones(1)}})
    assert leaf_key(key, path) == keys[str(path)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys.values()}) == 2


class Box(NamedTuple):
    """A container whose paths are made of fields."""

    b: dict


def test_leaf_keys_are_the_same_in_every_container_and_version():
    key = jax.random.key(0)
    (path, _), *_ = tree_leaves_with_path({"layers": [{"kernel": jnp.ones(1)}]})
    drawn = jax.random.key_data(leaf_key(key, path)).tolist()
    # BLAKE2b of "6:layers1:06:kernel", folded in as two words.
    words = (0xC997C734, 0x16C7A2DD)
    folded = jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])
    assert drawn == jax.random.key_data(folded).tolist()
    state = nnx.state(nnx.Dict(b=nnx.Dict(c=nnx.Param(jnp.ones(1)))), nnx.Param)
    boxed = {"b": {"c": nn.Partitioned(jnp.ones(1), names=(None,))}}
    trees = ({"b": {"c": 0.0}}, Box({"c": 0.0}), state, boxed)
    keys = [jax.random.key_data(leaf_key(key, tree_leaves_with_path(t)[0][0])) for t in trees]
    assert len({tuple(k.tolist()) for k in keys}) == 1


def test_paths_that_look_alike_draw_apart():
    key = jax.random.key(0)
    tree = {"ab": {"c": 0, "": {"c": 0}}, "a": {"bc": 0}, "a/b": {"c": 0}, "['a']": 0, "1:a": 0}
    paths = [path for path, _ in tree_leaves_with_path(tree)]
    keys = {tuple(jax.random.key_data(k).tolist()) for k in leaf_keys(key, paths)}
    assert len(keys) == len(paths)
    with pytest.raises(ValueError, match=r"leaves \['x'\] and \.x would draw the same noise"):
        leaf_keys(key, [(DictKey("x"),), (GetAttrKey("x"),)])


def test_what_belongs_to_no_leaf_draws_by_its_purpose():
    key = jax.random.key(0)
    paths = [path for path, _ in tree_leaves_with_path({"subset": 0})]
    words = [purpose_key(key, "subset"), purpose_key(key, "choice")]
    keys = {tuple(jax.random.key_data(k).tolist()) for k in [*leaf_keys(key, paths), *words]}
    keys.add(tuple(jax.random.key_data(leaf_key(key, ())).tolist()))
    assert len(keys) == 4


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_only_threefry_keys_are_taken(impl):
    with pytest.raises(ValueError, match=f"key: got one of '{impl}', wanted 'threefry2x32'"):
        threefry_key(jax.random.key(0, impl=impl))
    with pytest.raises(ValueError, match=r"keys of shape \(2,\)"):
        threefry_key(jax.random.split(jax.random.key(0)))
    assert threefry_key(jax.random.key_data(jax.random.key(5))) == jax.random.key(5)


def test_split_precisions_exist_where_they_run():
    assert dot_precision("bf16_x3", "gpu") == DotAlgorithmPreset.BF16_BF16_F32_X3
    assert dot_precision("bf16_x3", "tpu") == Precision.HIGH  # three, and not six
    assert dot_precision("tf32_x3", "cpu") == Precision.HIGHEST
    assert dot_precision("tf32", "tpu") == Precision.HIGH
    assert dot_precision("tf32", "gpu") == DotAlgorithmPreset.TF32_TF32_F32
    assert dot_precision("default", "gpu") == Precision.DEFAULT
    x = jax.random.normal(jax.random.key(0), (8, 8))
    exact = np.asarray(x, np.float64) @ np.asarray(x, np.float64)
    for name in ("bf16_x3", "bf16_x6", "tf32_x3", "highest"):
        np.testing.assert_allclose(
            jnp.matmul(x, x, precision=dot_precision(name)), exact, atol=1e-5
        )


def test_operands_of_unlike_layout_meet_as_whole_matrices():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (5, 8, 4))
    v = jax.random.normal(jax.random.key(1), (5, 4))

    def work(x, v):
        return x * 2, (x @ v[..., None]).sum((1, 2))

    run = jax.jit(
        lambda x, v: on_whole_matrices(
            work, (x, v), (P(None, "fsdp", "tensor"), P()), (P(None, "tensor"), P()), mesh
        )
    )
    # The result leaves by another layout than the one the operand came in.
    with pytest.raises(ValueError, match="different ways"):
        jax.jit(
            lambda x: on_whole_matrices(
                work, (x, x), (P(None, "fsdp"), P(None, ("fsdp", "tensor"))), (P(), P()), mesh
            )
        )(x)
    y, s = run(x, v)
    np.testing.assert_allclose(y, 2 * x, rtol=1e-6)
    np.testing.assert_allclose(s, work(x, v)[1], rtol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_exchanges_in_two_stages_are_those_in_one(monkeypatch, axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    rows, columns = P(None, "fsdp"), P(None, None, "fsdp")
    x = jax.random.normal(jax.random.key(0), (5, 16, 24))
    x = jax.device_put(x, jax.NamedSharding(mesh, rows))

    def exchanged(at_once):
        monkeypatch.setattr(whole_matrices, "AT_ONCE", at_once)
        numbers = jnp.arange(16.0)[:, None]
        run = jax.jit(
            lambda x: on_whole_matrices(
                lambda x: (x * numbers, x[:, ::-1]), (x,), (rows,), (rows, columns), mesh
            )
        )
        compiled = run.lower(x).compile()
        return compiled(x), collectives(compiled.as_text() or "")["all-to-all"].count

    (one, three), (two, six) = exchanged(8), exchanged(4)
    jax.tree.map(np.testing.assert_array_equal, two, one)
    np.testing.assert_array_equal(one[0], x * np.arange(16.0)[:, None])
    assert (three, six) == (3, 6)
