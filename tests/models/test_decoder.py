import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab.models import (
    PRESETS,
    Decoder,
    abstract_params,
    apply,
    bind,
    init_params,
    parameter_count,
)
from jaxopt_lab.models.attention import attend, rotate
from jaxopt_lab.models.side import matmul
from tests.models.decoders import (
    GPT2,
    GPT2_BIASED,
    GQA,
    LLAMA,
    STYLES,
    jit,
    largest_difference,
    logits,
    loss_and_gradient,
    tokens,
    varied_params,
)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_single_cpu_sees_products_of_two_matrices(devices):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 5, 6))

    def objective(x, kernel, mesh):
        return jnp.sum(jnp.sin(matmul(None, x, kernel, mesh)))

    gradient = jax.grad(objective, argnums=(0, 1))
    text = str(jax.make_jaxpr(lambda *given: gradient(*given, mesh))(x, kernel))
    assert ("[0, 1]" in text) == (devices > 1), text  # rows and positions contracted apart
    plain = jax.grad(lambda *given: jnp.sum(jnp.sin(jnp.tensordot(*given, axes=1))), (0, 1))
    for found, wanted in zip(gradient(x, kernel, mesh), plain(x, kernel), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_future_tokens_do_not_change_past_logits(config):
    params = varied_params(config)
    before = tokens(config)
    after = np.where(np.arange(12) < 7, before, (before + 1) % config.vocab_size)
    a, b = (np.asarray(logits(config, params, ids)) for ids in (before, after))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a[:, 7:] - b[:, 7:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rope", "learned"])
def test_document_mask_equals_separate_documents(config):
    masked = dataclasses.replace(config, document_mask=True)
    params = varied_params(config)
    packed = tokens(config, batch=1)
    segment_ids = np.array([[4] * 5 + [9] * 6 + [4]])
    together = logits(masked, params, packed, segment_ids)
    # What follows a document does not matter: rolled to the front, it is on its own.
    unmasked = logits(config, params, packed)
    second = logits(config, params, np.roll(packed, -5, axis=1))
    np.testing.assert_allclose(together[:, :5], unmasked[:, :5], atol=2e-6)
    np.testing.assert_allclose(together[:, 5:11], second[:, :6], atol=2e-6)
    assert np.abs(together[:, 5:11] - unmasked[:, 5:11]).max() > 1e-2


@pytest.mark.parametrize(
    ("loop", "remat"),
    [("scanned", "none"), ("unrolled", "full"), ("unrolled", "dots"), ("scanned", "dots")],
)
def test_loop_and_remat_change_no_gradient(loop, remat):
    params = varied_params(GQA)
    batch = {"tokens": tokens(GQA, length=13)}
    plain = loss_and_gradient(GQA, params, batch)
    other = dataclasses.replace(GQA, loop=loop, remat=remat)
    assert largest_difference(loss_and_gradient(other, params, batch), plain) < 2e-6


def test_full_remat_saves_memory():
    deep = dataclasses.replace(LLAMA, depth=8, loop="scanned")
    batch = {"tokens": tokens(deep, batch=8, length=13)}

    def temp_bytes(config):
        compiled = loss_and_gradient.lower(config, abstract_params(config), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(dataclasses.replace(deep, remat="full")) < 0.7 * temp_bytes(deep)


def test_grouped_queries_equal_repeated_heads():
    params = varied_params(GQA)
    attention = params["layers"]["attention"]
    full = dataclasses.replace(GQA, kv_heads=None)
    joined = {}
    for name, q in attention["q"].items():
        kv = attention["kv"][name]
        heads = kv.reshape(*kv.shape[:-1], GQA.num_kv_heads, GQA.head_width)
        repeated = np.repeat(heads, GQA.heads // GQA.num_kv_heads, axis=-2)
        repeated = repeated.reshape(*kv.shape[:-1], GQA.width)
        joined[name] = np.concatenate([q[..., None, :], repeated], axis=-2)
    layers = params["layers"] | {"attention": {"qkv": joined, "out": attention["out"]}}
    repeated = logits(full, params | {"layers": layers}, tokens(GQA))
    np.testing.assert_allclose(repeated, logits(GQA, params, tokens(GQA)), atol=2e-6)


def test_rotary_products_depend_on_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8), np.float32)
    turn = jit(lambda x: rotate(jnp.tile(x, (1, 10, 1, 1)), 100.0)[0, :, 0])
    products = np.asarray(turn(q)) @ np.asarray(turn(k)).T
    for distance in range(-9, 10):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(products[0, 5] - products[0, 0]) > 1e-2
    np.testing.assert_allclose(products[0, 0], np.sum(q * k), atol=1e-6)


def test_float64_attention_agrees_with_the_library():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 6, heads, 8)) for heads in (4, 2, 2))
    segment_ids = np.array([[0, 0, 0, 1, 1, 1]] * 2)
    narrow = jit(attend)(*(x.astype(np.float32) for x in (q, k, v)), segment_ids)
    with jax.enable_x64(True):
        wide = jit(attend)(q, k, v, segment_ids)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, narrow, atol=1e-6)


def test_head_is_the_embedding_exactly_when_tied():
    tied, untied = varied_params(LLAMA), varied_params(dataclasses.replace(LLAMA, tied=False))
    assert "head" not in tied
    assert untied["head"].shape == (LLAMA.width, LLAMA.vocab_size)
    copied = tied | {"head": tied["embedding"]["tokens"].T}
    np.testing.assert_allclose(
        logits(dataclasses.replace(LLAMA, tied=False), copied, tokens(LLAMA)),
        logits(LLAMA, tied, tokens(LLAMA)),
        atol=1e-6,
    )


def test_bfloat16_compute_keeps_float32_parameters_and_gradients():
    config = dataclasses.replace(GPT2_BIASED, compute_dtype="bfloat16")
    params = varied_params(config)
    batch = {"tokens": tokens(config, length=13)}
    (value, _), gradient = loss_and_gradient(config, params, batch)
    assert logits(config, params, batch["tokens"][:, 1:]).dtype == jnp.bfloat16
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    (exact, _), exact_gradient = loss_and_gradient(GPT2_BIASED, params, batch)
    assert 1e-6 < abs(float(value) - float(exact)) < 0.05
    ours, theirs = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(jax.device_get(g))])
        for g in (gradient, exact_gradient)
    )
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_frequent_tokens_keep_their_gradient_in_bfloat16():
    config = dataclasses.replace(GPT2_BIASED, compute_dtype="bfloat16", depth=1)
    params = varied_params(config)
    batch = {"tokens": np.full((512, 13), 3)}
    _, gradient = loss_and_gradient(config, params, batch)
    _, exact = loss_and_gradient(
        dataclasses.replace(config, compute_dtype="float32"), params, batch
    )
    ours, theirs = (np.asarray(g["embedding"]["tokens"])[3] for g in (gradient, exact))
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_float64_works_end_to_end():
    narrow = varied_params(GPT2_BIASED)
    batch = {"tokens": tokens(GPT2_BIASED, length=13)}
    (value, _), _ = loss_and_gradient(GPT2_BIASED, narrow, batch)
    with jax.enable_x64(True):
        config = dataclasses.replace(GPT2_BIASED, compute_dtype="float64", param_dtype="float64")
        assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))} == {
            np.dtype(np.float64)
        }
        params = jax.tree.map(lambda x: x.astype(np.float64), narrow)
        (wide, _), gradient = loss_and_gradient(config, params, batch)
        assert wide.dtype == np.float64
        # A central difference resolves eight digits only if nothing narrows on the way.
        direction = varied_params(config, seed=5)
        plus, minus = (
            loss_and_gradient(
                config, jax.tree.map(lambda x, d, h=h: x + h * d, params, direction), batch
            )[0][0]
            for h in (1e-5, -1e-5)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
        np.testing.assert_allclose((plus - minus) / 2e-5, slope, rtol=1e-8)
    np.testing.assert_allclose(value, wide, atol=1e-5)


def test_initial_values_follow_the_documented_law():
    config = dataclasses.replace(GPT2_BIASED, width=64, depth=8, vocab_size=512)
    params = jax.device_get(jit(lambda key: init_params(config, key))(jax.random.key(0)))
    layers = params["layers"]
    for kernel, std in [
        (params["embedding"]["tokens"], 0.02),
        (params["embedding"]["positions"], 0.02),
        (params["head"], 0.02),
        (layers["attention"]["qkv"]["kernel"], 0.02),
        (layers["mlp"]["up"]["kernel"], 0.02),
        (layers["attention"]["out"]["kernel"], 0.02 / 4),
        (layers["mlp"]["down"]["kernel"], 0.02 / 4),
    ]:
        assert np.std(kernel) == pytest.approx(std, rel=0.05)
        assert abs(np.mean(kernel)) < 5 * std / kernel.size**0.5
    first, second = layers["mlp"]["up"]["kernel"][:2]
    assert abs(np.vdot(first, second)) < 5 * 0.02**2 * first.size**0.5
    assert (layers["mlp_norm"]["scale"] == 1).all()
    assert (layers["mlp"]["up"]["bias"] == 0).all()


def test_module_and_pure_functions_are_the_same_model():
    drawn = jit(lambda key: nnx.split(Decoder(LLAMA, rngs=nnx.Rngs(params=key)))[1])
    state = drawn(jax.random.key(3))
    params = jit(lambda key: init_params(LLAMA, key))(jax.random.key(3))
    assert largest_difference(nnx.to_pure_dict(state), params) == 0
    ids = tokens(LLAMA)
    graphdef = nnx.graphdef(bind(LLAMA, params))
    through_module = jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    np.testing.assert_array_equal(through_module, logits(LLAMA, params, ids))


def test_module_trains_with_the_nnx_optimizer():
    config = dataclasses.replace(LLAMA, depth=1)
    model = bind(config, varied_params(config))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    ids = tokens(LLAMA, batch=1)

    @nnx.jit
    def step(model, optimizer):
        def mean_loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(ids[:, :-1]), ids[:, 1:]
            ).mean()

        value, gradient = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradient)
        return value

    values = [float(step(model, optimizer)) for _ in range(15)]
    assert values[-1] < values[0] - 1


def test_abstract_parameters_cost_no_arrays():
    config = PRESETS["gpt2-720m"]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    out = jax.eval_shape(lambda p: apply(config, p, jnp.zeros((1, 512), int)), params)
    assert out.shape == (1, 512, config.vocab_size)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameter_count(config)
