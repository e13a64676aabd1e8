"""The encoder: padding, loops, adapters on every linear layer, meshes, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import lora, models
from jaxopt_lab.models import EncoderConfig, attention, encoder, encoder_layers
from tests.models.decoders import jit, largest_difference, varied_params
from tests.models.encoders import (
    BERT,
    batch,
    cross_entropy,
    hidden,
    logits,
    loss_and_gradient,
    scores,
    wide,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def parameters(config):
    return jax.tree.map(jnp.asarray, varied_params(config))


def test_padding_changes_no_token():
    config, given = wide(BERT), batch()
    params, there = parameters(config), batch()["mask"]
    wanted = hidden(config, params, given)
    other = np.random.default_rng(1).integers(0, 64, there.shape, dtype=np.int32)
    changed = {**given, "tokens": np.where(there, given["tokens"], other)}
    found = hidden(config, params, changed)
    np.testing.assert_array_equal(found[there], wanted[there])
    assert not np.allclose(found[~there], wanted[~there])  # other tokens stand there
    longer = {name: np.pad(given[name], ((0, 0), (0, 2))) for name in ("tokens", "mask", "types")}
    found = hidden(config, params, longer)[:, : there.shape[1]]
    np.testing.assert_allclose(found[there], wanted[there], rtol=1e-12, atol=1e-12)
    for kind in ("mean", "cls"):
        rows = [encoder.pooled(x, given["mask"], kind) for x in (wanted, found)]
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-12, atol=1e-12)
    # No mask is a mask of tokens alone.
    every = hidden(config, params, {**given, "mask": np.ones_like(there)})
    np.testing.assert_allclose(
        hidden(config, params, {**given, "mask": None}), every, rtol=1e-12, atol=1e-12
    )


def test_a_row_of_padding_stays_finite():
    config, given = wide(BERT), batch()
    given["mask"] = given["mask"] & (np.arange(4) != 2)[:, None]
    value, grads = loss_and_gradient(config, parameters(config), given)
    assert np.isfinite(value)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    rows = encoder.pooled(jnp.ones((4, 10, 2)), given["mask"], "mean")
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 0, 1])


def test_loop_and_remat_change_no_gradient():
    config = wide(BERT, dropout=0.2, attention_dropout=0.3)
    params, given, key = parameters(config), batch(), jax.random.key(3, impl="rbg")
    wanted = loss_and_gradient(config, params, given, key)
    for changes in (
        {"loop": "scanned"},
        {"loop": "scanned", "remat": "full"},
        {"loop": "unrolled", "remat": "dots"},
    ):
        found = loss_and_gradient(dataclasses.replace(config, **changes), params, given, key)
        assert largest_difference(found, wanted) < 1e-12, changes


def test_every_tree_has_the_structure_of_the_parameters():
    params, leaf = models.abstract_params(BERT), lambda x: x is None or isinstance(x, tuple)
    wanted = jax.tree.structure(params)
    for tree in (models.roles(BERT), models.matrix_axes(BERT), models.logical_axes(BERT)):
        assert jax.tree.structure(tree, is_leaf=leaf) == wanted
    drawn = encoder.init_params(BERT, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert models.parameter_count(BERT) == sum(x.size for x in jax.tree.leaves(drawn))
    axes, specs = models.matrix_axes(BERT), models.partition_specs(BERT, {"fsdp": 2, "tensor": 2})
    assert axes["layers"]["attention"]["qkv"]["kernel"] == MuonDimensionNumbers(1, 3)
    assert axes["head"]["kernel"] is None and axes["embedding"]["types"] is None
    assert specs["layers"]["attention"]["qkv"]["kernel"] == P(None, "fsdp", None, "tensor")
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["head"]["kernel"] == P("fsdp", None)
    heads = models.partition_specs(BERT, {"tensor": 8})["layers"]["attention"]["qkv"]["kernel"]
    assert heads == P(None, None, None, None)  # 4 heads are not cut


def adapted(config, **options):
    """Adapters whose factors are all drawn, and their spec."""
    options = {"rank": 2, "alpha": 3.0, "dtype": "float64", **options}
    params = parameters(config)
    axes, names = models.matrix_axes(config), models.matrix_names(config)
    spec = lora.resolve(lora.LoraConfig(**options), params, axes, names)
    fresh = lora.init(jax.random.key(0), spec, params)
    rng = np.random.default_rng(0)
    stirred = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), fresh)
    return params, fresh, stirred, spec


@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
def test_adapters_beside_every_linear_layer_are_adapted_kernels(loop):
    config, given = wide(BERT, loop=loop), batch()
    params, fresh, adapters, spec = adapted(config)
    # Query, key, value, output, up and down of two layers.
    assert sum(len(entry.kept) for entry in spec.adapters) == 12
    base = logits(config, params, given)
    merged = logits(config, lora.merge(params, adapters, spec), given)
    found = logits(config, params, given, lora.side(adapters, spec))
    np.testing.assert_allclose(found, merged, rtol=1e-12, atol=1e-12)
    assert np.abs(merged - base).max() > 1e-2
    np.testing.assert_allclose(
        logits(config, params, given, lora.side(fresh, spec)), base, rtol=1e-13
    )


def test_merged_is_adapted_in_float32():
    params, _, adapters, spec = adapted(BERT, dtype="float32")
    adapters = jax.tree.map(lambda x: x.astype("float32"), adapters)
    found = logits(BERT, params, batch(), lora.side(adapters, spec))
    merged = logits(BERT, lora.merge(params, adapters, spec), batch())
    np.testing.assert_allclose(found, merged, rtol=1e-5, atol=1e-5)
    assert found.dtype == jnp.float32
    assert np.abs(merged - logits(BERT, params, batch())).max() > 1e-2


def test_taps_are_gradients_of_the_kernels_and_no_adapter_is_dead():
    config, given = wide(BERT), batch()
    params, fresh, _, spec = adapted(config)

    @jit
    def run(adapters, params):
        def loss(adapters, side):
            return cross_entropy(config, params, given, side=side)

        dense = jax.grad(lambda params: cross_entropy(config, params, given))(params)
        return *lora.value_grad_and_taps(loss, adapters, spec)[1:], dense

    found = run(fresh, params)
    for entry in spec.adapters:
        grads, tap, dense = found
        for name in entry.path:
            grads, tap, dense = grads[name], tap[name], dense[name]
        assert np.all(np.abs(grads["b"]).max((1, 2)) > 1e-8), entry.module
        x = np.repeat(tap.x, len(tap.s) // len(tap.x), 0)  # query, key and value share theirs
        if len(entry.shape) == 4:
            dense = np.moveaxis(dense, 2, 1).reshape(-1, *entry.matrix_shape[1:])
        wanted = np.einsum("krn,krm->knm", x, tap.s)
        np.testing.assert_allclose(wanted, dense, rtol=1e-10, atol=1e-13)


def test_peft_names_choose_matrices():
    params, axes = models.abstract_params(BERT), models.matrix_axes(BERT)
    chosen = lora.LoraConfig(rank=2, target=("query", "value"))
    spec = lora.resolve(chosen, params, axes, models.matrix_names(BERT))
    (entry,) = spec.adapters
    assert entry.kept == (0, 2, 3, 5)
    assert entry.names[3] == "encoder.layer.1.attention.self.query"


def test_eight_devices_compute_what_one_computes():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3)
    config = wide(BERT, depth=1, attention_dropout=0.1)
    params, _, adapters, spec = adapted(config)
    given, key = batch(rows=8), jax.random.key(0)

    def loss(both, given, mesh):
        params, adapters = both
        side = lora.side(adapters, spec)
        return cross_entropy(config, params, given, side=side, mesh=mesh, dropout_key=key)

    run = jit(jax.value_and_grad(loss), static_argnums=2)
    alone = run((params, adapters), given, None)
    where = jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        models.partition_specs(config, mesh),
        is_leaf=lambda s: isinstance(s, P),
    )
    both = jax.device_put((params, adapters), (where, lora.shardings(spec, where)))
    rows = jax.device_put(given, NamedSharding(mesh, P(("data", "fsdp"))))
    assert largest_difference(run(both, rows, mesh), alone) < 1e-13


def test_dropout_is_for_training():
    quiet, given = wide(BERT), batch()
    params, keys = parameters(quiet), [jax.random.key(i, impl="rbg") for i in (1, 2)]
    wanted = logits(quiet, params, given)
    np.testing.assert_array_equal(logits(quiet, params, given, None, keys[0]), wanted)
    for rates in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        config = dataclasses.replace(quiet, **rates)
        np.testing.assert_array_equal(logits(config, params, given), wanted)
        one, two = (logits(config, params, given, None, key) for key in keys)
        assert not np.allclose(one, wanted) and not np.allclose(one, two), rates
        np.testing.assert_array_equal(logits(config, params, given, None, keys[0]), one)


def test_each_place_draws_its_own_mask(monkeypatch):
    config, found = wide(BERT, dropout=0.5, attention_dropout=0.5), []

    def note(x, rate, key):
        found.append(jax.random.key_data(key))
        return x

    for module in (encoder, encoder_layers, attention):
        monkeypatch.setattr(module, "dropped", note)

    @jit
    def keys(key):
        scores(config, parameters(config), batch(), dropout_key=key)
        return jnp.stack(found)

    # Embeddings, weights and two sublayers of two layers, the head.
    assert len(np.unique(keys(jax.random.key(0)), axis=0)) == len(found) == 8


def test_what_stays_is_scaled():
    x = attention.dropped(jnp.ones((40, 50)), 0.25, jax.random.key(0))
    assert set(np.unique(x)) == {0.0, 1 / 0.75}
    assert abs(x.mean() - 1) < 4 * np.sqrt(0.25 / 0.75 / x.size)


def test_dropout_of_attention_keeps_the_mean():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(8, 16, 2, 4)), "float32") for _ in range(2))
    ones = jnp.ones((8, 16, 2, 4), "float32")
    y = attention.attend(q, k, ones, causal=False, dropout=(0.5, jax.random.key(0)))[..., 0]
    assert y.dtype == jnp.float32 and float(y.std()) > 0.1
    # Rows, positions and heads draw their masks independently.
    assert abs(float(y.mean()) - 1) < 4 * float(y.std()) / np.sqrt(y.size)
    plain = attention.attend(q, k, ones, causal=False, dropout=(0.5, None))
    np.testing.assert_allclose(plain, 1, rtol=1e-6)


def test_gelu_keeps_one_array_and_has_the_right_slopes():
    x = jnp.linspace(-6.0, 6.0, 25)

    def plain(x):
        return jax.nn.gelu(x, approximate=False)

    for wrap in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
        found, wanted = (jax.vmap(wrap(f))(x) for f in (encoder_layers.gelu, plain))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)
    kept = jax.eval_shape(lambda x: jax.vjp(encoder_layers.gelu, x)[1], x)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == x.size


def test_half_precision():
    config = dataclasses.replace(BERT, compute_dtype="bfloat16")
    given, params = batch(), jax.tree.map(lambda x: x.astype("float32"), parameters(wide(BERT)))
    half, single = hidden(config, params, given), hidden(BERT, params, given)
    assert half.dtype == jnp.bfloat16
    there = given["mask"]
    assert np.abs(np.asarray(half, "float32") - single)[there].max() < 0.1
    assert jax.eval_shape(lambda: scores(config, params, given)).dtype == jnp.float32


def test_a_fresh_head():
    config = dataclasses.replace(BERT, classes=None)
    params = encoder.init_params(config, jax.random.key(0))
    assert "head" not in params
    with pytest.raises(ValueError, match="classes: got None"):
        scores(config, params, batch())
    config, params = encoder.with_head(config, params, 5, jax.random.key(1))
    assert config.classes == 5 and jax.tree.structure(params) == jax.tree.structure(
        models.abstract_params(config)
    )
    given = batch()
    x = encoder.pooled(hidden(config, params, given), given["mask"], "mean")
    wanted = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits(config, params, given), wanted, rtol=1e-5, atol=1e-6)
    first = dataclasses.replace(config, pooling="cls")
    wanted = hidden(config, params, given)[:, 0] @ params["head"]["kernel"]
    np.testing.assert_allclose(logits(first, params, given), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads: got 3, wanted a divisor of width = 16"),
        ({"activation": "relu"}, "activation: got 'relu', wanted one of gelu, gelu_tanh"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"types": 0}, "types: got 0, wanted at least 1"),
        ({"classes": 0}, "classes: got 0"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0"),
    ],
)
def test_bad_configurations(changes, message):
    fields = {f.name: getattr(BERT, f.name) for f in dataclasses.fields(BERT)}
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{**fields, **changes})


def test_bad_batches():
    params, given = models.abstract_params(BERT), batch()
    for wrong, message in (
        ({"tokens": np.zeros((2, 13), int)}, "got 13 positions, wanted at most context = 12"),
        ({"tokens": np.zeros(3, int)}, r"tokens: got shape \(3,\)"),
        ({"mask": given["mask"][:, :4]}, r"mask: got shape \(4, 4\), wanted \(4, 10\)"),
        ({"types": given["types"][:2]}, r"types: got shape \(2, 10\), wanted \(4, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, wrong=wrong: scores(BERT, p, {**given, **wrong}), params)
    for wrong, name in (
        ({"pooler": None}, "pooler"),
        ({"embedding": {"rows": None}}, "embedding.rows"),
    ):
        with pytest.raises(ValueError, match=f"side: {name} is not a stack of layers or table"):
            jax.eval_shape(lambda p, wrong=wrong: scores(BERT, p, given, side=wrong), params)
    only_scores = {"head": None}
    with pytest.raises(ValueError, match="side: head is not a stack of layers"):
        rows = given["tokens"]
        jax.eval_shape(lambda p: encoder.hidden(BERT, p, rows, side=only_scores), params)
