"""The TPU's attention kernel, in interpret mode on the CPU; `tpu_attention` takes its compiler."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab.models import attention, encoder, generate, loss, probe_loss, splash
from tests.models.decoders import GPT2, GQA, jit, largest_difference, tokens, varied_params
from tests.models.encoders import BERT, batch


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs on the CPU, in blocks of 128 positions, and `attend` takes it always."""
    made = functools.partial(splash.kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash.kernels, "make_splash_mha", made)
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)
    monkeypatch.setattr(attention, "splash_applies", lambda *_: True)


def drawn(B, T, H, K, E, dtype="float32", seed=0):
    """Queries, keys, values, cotangents and documents."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal((B, T, heads, E)), dtype) for heads in (H, K, K, H)]
    return *arrays, jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), axis=1))


def values_and_gradients(attend, q, k, v, dy):
    y, pull_back = jax.vjp(attend, q, k, v)
    return y, *pull_back(dy)


@pytest.mark.parametrize(
    ("T", "heads", "E", "dtype", "causal", "documents"),
    [
        (200, (4, 2), 64, "float32", True, True),
        (128, (2, 1), 128, "bfloat16", True, False),
        (200, (2, 2), 64, "bfloat16", False, True),
        (130, (1, 1), 128, "float32", False, False),
    ],
)
def test_the_kernel_is_attention(interpreted, T, heads, E, dtype, causal, documents):
    *arrays, segment_ids = drawn(2, T, *heads, E, dtype)
    segment_ids = segment_ids if documents else None
    run = jit(values_and_gradients, static_argnums=0)
    found = run(lambda *qkv: splash.splash(*qkv, segment_ids, causal=causal), *arrays)
    plain = functools.partial(
        attention.attend, segment_ids_BxT=segment_ids, kernel="xla", causal=causal
    )
    wanted = run(plain, *(x.astype("float32") for x in arrays))
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == dtype
        error = jnp.linalg.norm(x.astype("float32") - y) / jnp.linalg.norm(y)
        assert error < (2e-6 if dtype == "float32" else 6e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("K", "sizes"), [(4, (2, 2, 2)), (2, (2, 1, 4))])
def test_each_device_attends_for_its_own_rows_and_heads(interpreted, kind, K, sizes):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (kind,) * 3)
    *arrays, segment_ids = drawn(4, 16, 4, K, 8)

    def attend(mesh, q, k, v, segment_ids):
        return splash.splash(q, k, v, segment_ids, mesh=mesh)

    alone = jit(attend, static_argnums=0)(None, *arrays[:3], segment_ids)
    of_keys = "tensor" if K == 4 else None
    specs = [P(("data", "fsdp"), None, name, None) for name in ("tensor", of_keys, of_keys)]
    specs = [*specs, P(("data", "fsdp"))]
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((*arrays[:3], segment_ids), specs, strict=True)
        ]
        program = jit(attend, static_argnums=0).lower(mesh, *placed).compile()
        together = program(*placed)
    np.testing.assert_array_equal(together, alone)
    assert together.sharding.is_equivalent_to(placed[0].sharding, 4)
    text = program.as_text()
    assert not [x for x in ("all-", "reduce-scatter", "collective-permute") if f" {x}" in text]


def test_an_axis_of_another_shard_map_stays_its_own(interpreted):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
    q, k, v, _, segment_ids = drawn(4, 16, 2, 2, 8)

    def attend(scale, q, k, v, segment_ids):
        return splash.splash(scale * q, k, v, segment_ids, mesh=mesh)

    both = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(P("data"), *[P()] * 4),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    found = jit(both)(jnp.array([1.0, 2.0]), q, k, v, segment_ids)
    wanted = [splash.splash(scale * q, k, v, segment_ids) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(found, jnp.concatenate(wanted), atol=1e-6)


def compared(monkeypatch, fn, *args):
    """What a function returns with the kernel, and without."""
    found = jit(lambda *args: fn(*args))(*args)
    monkeypatch.setattr(attention, "splash_applies", lambda *_: False)
    return found, jit(lambda *args: fn(*args))(*args)


def test_a_decoder_trains_through_it(interpreted, monkeypatch):
    config = dataclasses.replace(GQA, document_mask=True, loop="scanned", remat="full")
    given = {"tokens": tokens(config, length=13), "segment_ids": np.array([[1] * 5 + [2] * 8] * 2)}
    train = jax.value_and_grad(lambda params: loss(config, params, given)[0])
    found, wanted = compared(monkeypatch, train, varied_params(config))
    assert largest_difference(found, wanted) < 2e-6


def test_forward_passes_and_samples_go_through_it(interpreted, monkeypatch):
    params, given = varied_params(GPT2), {"tokens": tokens(GPT2, length=13)}

    def forward(params):
        drawn = generate(GPT2, params, given["tokens"][:, :3], steps=12, key=jax.random.key(0))
        return probe_loss(GPT2, given, vocabulary_chunk=32)(params), drawn

    found, wanted = compared(monkeypatch, forward, params)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], wanted[1])


def test_an_encoder_goes_through_it_except_with_dropout(interpreted, monkeypatch):
    given = batch()
    config = dataclasses.replace(BERT, attention_dropout=0.5)
    params = encoder.init_params(config, jax.random.key(0))

    def hidden(params, key=None):
        inputs = (given["tokens"], given["mask"], given["types"])
        return encoder.hidden(config, params, *inputs, dropout_key=key)

    found, wanted = compared(monkeypatch, hidden, params)
    assert largest_difference(found, wanted) < 2e-6
    key = jax.random.key(1)
    dropped, as_before = compared(monkeypatch, functools.partial(hidden, key=key), params)
    np.testing.assert_array_equal(dropped, as_before)


def test_no_array_of_a_long_context_is_quadratic(monkeypatch):
    monkeypatch.setattr(attention, "splash_applies", lambda *_: True)
    T = 2048
    config = dataclasses.replace(GPT2, context=T, document_mask=True, depth=1, loop="scanned")
    given = {"tokens": tokens(config, 1, T + 1), "segment_ids": np.zeros((1, T), np.int32)}
    params = varied_params(config)
    train = jax.make_jaxpr(jax.grad(lambda params: loss(config, params, given)[0]))(params)
    assert max(sizes(train.jaxpr)) < T * T / 2  # of scores there are 4 T^2


def sizes(jaxpr):
    """Entries of all arrays, those inside of kernels left out."""
    for equation in jaxpr.eqns:
        yield from (x.aval.size for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)


def mesh_of(platform="tpu", kind="TPU v5 lite"):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(axis_names=("data",), devices=np.array([device]))


def test_where_the_kernel_applies():
    q = jax.ShapeDtypeStruct((1, 256, 2, 20), jnp.bfloat16)
    short, half = (
        jax.ShapeDtypeStruct(*x) for x in (((1, 255, 2, 20), "float32"), (q.shape, "f2"))
    )
    applies, tpu = splash.splash_applies, mesh_of()
    assert applies(q, tpu)
    assert applies(q.update(dtype="float32"), tpu)
    assert not applies(short, tpu) and not applies(half, tpu)
    assert not applies(q, mesh_of(kind="TPU v3"))
    assert not applies(q, mesh_of("gpu", "NVIDIA H200"))
    assert not applies(q, None)
    with jax.default_matmul_precision("highest"):
        assert not applies(q, tpu)


def test_without_a_mesh_a_single_tpu_is_needed(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    for count, applies in ((1, True), (4, False)):
        monkeypatch.setattr(jax, "devices", lambda: list(mesh_of().devices))
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        assert splash.splash_applies(q, None) == applies


@pytest.mark.slow
def test_the_tpu_compiler_takes_long_contexts():
    """Two minutes; in an environment with libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: install it into an environment of its own")

    def rows(*arguments):
        command = [sys.executable, "-m", "tests.models.tpu_attention", *arguments]
        # A compiler that hangs shall not outlive the test.
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
        return [json.loads(line) for line in done.stdout.splitlines()]

    before, after = rows("--programs", "layer", "--lengths", "8192")
    assert before["temporaries"] > 4 * 2**30 and before["kernels"] == 0
    assert after["temporaries"] < 2**26 and after["kernels"] == 3
    (longest,) = rows("--programs", "layer", "--lengths", "32768", "--kernels", "auto")
    assert longest["temporaries"] < 2**30
    *_, split = rows("--programs", "layer", "--lengths", "8192", "--mesh", "1", "2", "2")
    assert split["kernels"] == 3 and not any(split["collectives"].values())
