"""Adapters beside the kernels of the decoder: equal to adapted kernels, in every style and loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import lora, models
from tests.models.decoders import GPT2_BIASED, GQA, LLAMA, tokens, varied_params

STYLES = {"llama": LLAMA, "gqa": GQA, "gpt2": GPT2_BIASED}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def wide(config, **changes):
    return dataclasses.replace(config, param_dtype="float64", compute_dtype="float64", **changes)


@functools.cache
def parameters(config):
    return jax.tree.map(jnp.asarray, varied_params(config))


def made(config, seed=0, **options):
    """Adapters whose factors are all drawn, and their spec."""
    options = {"rank": 2, "alpha": 3.0, "dtype": "float64", **options}
    names = models.matrix_names(config)
    chosen = lora.LoraConfig(**options)
    params = parameters(config)
    spec = lora.resolve(chosen, params, models.matrix_axes(config), names)
    adapters = lora.init(jax.random.key(seed), spec, params)
    rng = np.random.default_rng(seed)

    def stir(path, x):
        wanted = str(path[-1]) in ("['b']", "['weight']", "['magnitude']")
        return x + 0.1 * rng.normal(size=x.shape) if wanted else x

    return jax.tree_util.tree_map_with_path(stir, adapters), spec


def logits(config, params, side=None):
    def run(params, side):
        return models.apply(config, params, tokens(config), side=side)

    return jax.jit(run)(params, side)


KINDS = {
    "all": {},
    "queries and values": {"target": ("q_proj", "v_proj")},
    "ragged": {"target": r".*layers\.0\.self_attn\.q_proj|.*layers\.1\..*(v|down)_proj"},
    "weights": {"weights": True, "rslora": True},
    "dora": {"dora": True, "dropout": 0.1},
}


# Both loops for what they do differently; kernels of queries apart from those of keys and values.
CASES = [
    *(("llama", kind, "unrolled") for kind in KINDS),
    *(("llama", kind, "scanned") for kind in ("ragged", "dora")),
    ("gqa", "queries and values", "scanned"),
    ("gqa", "all", "unrolled"),
]


@pytest.mark.parametrize(("style", "kind", "loop"), CASES)
def test_side_equals_adapted_kernels(style, kind, loop):
    config = wide(STYLES[style], loop=loop)
    adapters, spec = made(config, **KINDS[kind])
    params = parameters(config)
    base = logits(config, params)
    merged = logits(config, lora.merge(params, adapters, spec))
    beside = logits(config, params, lora.side(adapters, spec))
    np.testing.assert_allclose(beside, merged, rtol=1e-12, atol=1e-12)
    assert np.abs(np.asarray(beside - base)).max() > 1e-2


@pytest.mark.parametrize("fused", ["one", "three"])
def test_fused_kernels_of_gpt2(fused):
    config = wide(GPT2_BIASED, fused_qkv_as=fused)
    adapters, spec = made(config)
    (qkv,) = [e for e in spec.adapters if "qkv" in e.path]
    assert qkv.matrix_shape == ((2, 16, 48) if fused == "one" else (6, 16, 16))
    params = parameters(config)
    merged = logits(config, lora.merge(params, adapters, spec))
    np.testing.assert_allclose(
        logits(config, params, lora.side(adapters, spec)), merged, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions(dtype):
    config = dataclasses.replace(LLAMA, compute_dtype=dtype)
    adapters, spec = made(config, dtype="float32")
    params = parameters(config)
    merged = logits(config, lora.merge(params, adapters, spec)).astype(jnp.float32)
    beside = logits(config, params, lora.side(adapters, spec))
    assert beside.dtype == dtype
    scale = float(jnp.abs(merged).max())
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(beside.astype(jnp.float32), merged, atol=tolerance * scale)
    base = logits(config, params).astype(jnp.float32)
    assert float(jnp.abs(base - merged).max()) > 3 * tolerance * scale


STARTS = [
    ("default", False),
    ("gaussian", True),
    ("wlora", False),
    ("pissa", False),
    ("olora", False),
]


@pytest.mark.parametrize(("init", "dora"), STARTS)
def test_training_starts_at_the_base(init, dora):
    config = wide(LLAMA)
    params = parameters(config)
    chosen = lora.LoraConfig(rank=2, init=init, dtype="float64", dora=dora)
    spec = lora.resolve(chosen, params, models.matrix_axes(config))
    adapters = lora.init(jax.random.key(0), spec, params)
    wanted, base = logits(config, params), params
    if init in ("pissa", "olora"):
        base = lora.unmerge(params, adapters, spec)
        assert not np.allclose(logits(config, base), wanted, atol=1e-3)
    got = logits(config, base, lora.side(adapters, spec))
    if dora or base is not params:
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    else:
        np.testing.assert_array_equal(got, wanted)


def test_first_gradients():
    # Every adapter learns at step one, through b alone; the base gets no gradient at all.
    config = wide(GQA)
    params = parameters(config)
    spec = lora.resolve(
        lora.LoraConfig(rank=2, dtype="float64"), params, models.matrix_axes(config)
    )
    adapters = lora.init(jax.random.key(0), spec, params)

    @jax.jit
    def grads(adapters):
        def objective(adapters):
            side = lora.side(adapters, spec)
            return models.loss(config, params, {"tokens": tokens(config)}, side=side)[0]

        return jax.grad(objective)(adapters)

    found = grads(adapters)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for path, g in jax.tree_util.tree_leaves_with_path(found):
        each = np.abs(np.asarray(g)).max((1, 2))
        assert (each > 0).all() if str(path[-1]) == "['b']" else (each == 0).all(), path


def test_merge_and_back():
    for dtype, tolerance in (("float32", 2e-7), ("bfloat16", 8e-3)):
        config = dataclasses.replace(LLAMA, param_dtype=dtype)
        adapters, spec = made(config, dtype="float32")
        params = parameters(config)
        back = lora.unmerge(lora.merge(params, adapters, spec), adapters, spec)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
            assert a.dtype == b.dtype
            # One unit in the last place of the larger of kernel and merged kernel.
            gap = jnp.abs((a - b).astype(jnp.float32))
            assert float(gap.max()) <= 2 * tolerance * max(1.0, float(jnp.abs(a).max()))
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), adapters)
    with pytest.raises(ValueError, match=r"merge: layers\.attention\.out\.kernel is not finite"):
        lora.merge(params, spoilt, spec)


def test_an_adapter_on_a_changed_base_becomes_an_ordinary_one():
    config = wide(LLAMA)
    params = parameters(config)
    chosen = lora.LoraConfig(rank=2, init="pissa", dtype="float64")
    spec = lora.resolve(chosen, params, models.matrix_axes(config))
    start = lora.init(jax.random.key(0), spec, params)
    base = lora.unmerge(params, start, spec)
    trained = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), start)
    ordinary, doubled = lora.difference(trained, start, spec)
    assert {e.rank for e in doubled.adapters} == {4}
    np.testing.assert_allclose(
        logits(config, params, lora.side(ordinary, doubled)),
        logits(config, base, lora.side(trained, spec)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_dora_gradients_hold_the_norm_fixed():
    config = wide(LLAMA)
    adapters, spec = made(config, dora=True, target=("down_proj",))
    params = parameters(config)
    (entry,) = spec.adapters

    def loss(adapters, path):
        if path == "effective":
            return models.loss(config, lora.effective(params, adapters, spec), batch)[0]
        return models.loss(config, params, batch, side=lora.side(adapters, spec))[0]

    batch = {"tokens": tokens(config)}
    one, two = (
        jax.jit(jax.grad(functools.partial(loss, path=path)))(adapters)
        for path in ("effective", "side")
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)
    # The derivative along the magnitude is that of the loss.
    g = one["layers"]["mlp"]["down"]["kernel"]["magnitude"]
    step = jnp.cos(jnp.arange(g.size)).reshape(g.shape)

    @jax.jit
    def moved(t):
        new = jax.tree.map(lambda x: x, adapters)
        node = new["layers"]["mlp"]["down"]["kernel"]
        node["magnitude"] = node["magnitude"] + t * step
        return loss(new, "side")

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, jnp.vdot(g, step), rtol=1e-6)


def test_dropout():
    n, m, rows, rate = 12, 6, 400, 0.25
    params = {"up": {"kernel": jnp.zeros((n, m))}}
    spec = lora.resolve(lora.LoraConfig(rank=3, alpha=3.0, dropout=rate, dtype="float64"), params)
    adapters = lora.init(jax.random.key(0), spec, params)
    adapters["up"]["kernel"]["b"] = jnp.ones((3, m))
    x, kernel = jnp.ones((rows, n)), params["up"]["kernel"]
    plain = lora.side(adapters, spec)["up"].product(x, kernel)
    keyed = [lora.side(adapters, spec, jax.random.key(i))["up"].product(x, kernel) for i in (1, 2)]
    assert not np.allclose(*keyed) and np.unique(keyed[0][:, 0]).size > 20
    error = float(keyed[0].std()) / np.sqrt(rows)
    assert abs(float(keyed[0].mean() - plain.mean())) < 4 * error
    # Without a rate a key changes nothing.
    still = lora.resolve(lora.LoraConfig(rank=3, alpha=3.0, dtype="float64"), params)
    again = lora.side(adapters, still, jax.random.key(1))["up"].product(x, kernel)
    np.testing.assert_array_equal(again, plain)


@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
def test_dropout_of_an_adapter_does_not_depend_on_the_others(loop):
    config = wide(LLAMA, loop=loop)
    adapters, spec = made(config, dropout=0.5, target=("q_proj", "v_proj"), weights=True)
    node = adapters["layers"]["attention"]["qkv"]["kernel"]
    node["weight"] = jnp.array([1.0, 0.0, 0.0, 0.5])
    small, entry = {"layers": {"attention": {"qkv": {"kernel": {}}}}}, spec.adapters[0]
    stay = np.array([0, 3])
    small["layers"]["attention"]["qkv"]["kernel"] = jax.tree.map(lambda x: x[stay], node)
    fewer = spec.with_adapters([entry._replace(kept=tuple(np.array(entry.kept)[stay].tolist()))])
    params, key = parameters(config), jax.random.key(5)
    np.testing.assert_allclose(
        logits(config, params, lora.side(adapters, spec, key)),
        logits(config, params, lora.side(small, fewer, key)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_dora_in_a_part_of_the_layers_needs_the_unrolled_loop():
    config = wide(LLAMA, loop="scanned")
    adapters, spec = made(config, dora=True, layers=(1,))
    with pytest.raises(ValueError, match='DoRA on a part of the layers needs .*"unrolled"'):
        logits(config, parameters(config), lora.side(adapters, spec))


def test_kernels_of_more_axes_and_experts():
    # (experts, heads, width, out): experts count matrices, heads and width are the inputs.
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
    params = {"out": {"kernel": kernel}}
    axes = {"out": {"kernel": MuonDimensionNumbers((1, 2), 3)}}
    spec = lora.resolve(lora.LoraConfig(rank=2, alpha=2.0, dtype="float64"), params, axes)
    adapters = lora.init(jax.random.key(0), spec, params)
    node = adapters["out"]["kernel"]
    assert node["a"].shape == (2, 12, 2) and node["b"].shape == (2, 2, 5)
    node["b"] = node["b"] + 1.0
    merged = lora.merge(params, adapters, spec)["out"]["kernel"]
    wanted = kernel + (node["a"] @ node["b"]).reshape(kernel.shape)
    np.testing.assert_allclose(merged, wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="contracts its first axis alone"):
        lora.side(adapters, spec)


def test_gauge_and_scale():
    config = wide(LLAMA)
    adapters, spec = made(config, target=("down_proj",))
    node = adapters["layers"]["mlp"]["down"]["kernel"]
    turn = jnp.array([[2.0, 1.0], [0.0, 0.5]])
    turned = {**node, "a": node["a"] @ turn, "b": jnp.linalg.inv(turn) @ node["b"]}
    (entry,) = spec.adapters
    doubled = spec.with_adapters([entry._replace(scale=2 * entry.scale)])
    params, where = parameters(config), adapters["layers"]["mlp"]["down"]
    wanted = lora.merge(params, adapters, spec)["layers"]["mlp"]["down"]["kernel"]
    where["kernel"] = turned
    got = lora.merge(params, adapters, spec)["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)
    where["kernel"] = {**node, "b": node["b"] / 2}
    got = lora.merge(params, adapters, doubled)["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


def test_a_side_that_nothing_reads_is_refused():
    config = wide(LLAMA)
    adapters, spec = made(config, target=("down_proj",))
    side = lora.side(adapters, spec)
    down = side["layers"]["mlp"]["down"]
    for wrong, name in (
        ({"layers": {"mlp": {"downs": down}}}, "layers.mlp.downs is not a linear layer"),
        ({"layers": {"mlp_norm": down}}, "layers.mlp_norm is not a linear layer"),
        ({"head": down}, "head is not a stack of layers"),
    ):
        with pytest.raises(ValueError, match=name):
            models.apply(config, parameters(config), tokens(config), side=wrong)
