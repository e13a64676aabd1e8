"""What activations go through on a GPU, against plain JAX; kernels are interpreted."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxopt_lab import models
from jaxopt_lab.models import cross_entropy, gpu_kernels, kept, layers

# bfloat16 has 8 bits; results and plain ones are both rounded to it.
TOLERANCES = {"float32": 2e-6, "bfloat16": 6e-3}
BASE = {"vocab_size": 150, "width": 48, "depth": 2, "heads": 4, "hidden": 64, "context": 12}
KINDS = {
    "gpt": {"positions": "learned", "norm": "layer", "mlp": "gelu"},
    "llama": {"depth": 1, "kv_heads": 2, "qkv_bias": True, "tied": False},
}


def distance(found, wanted):
    """Largest relative distance of the leaves, in float32."""

    def one(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(one, found, wanted)))


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def value_and_gradients(function, arguments):
    """Of the sum of the results times fixed random numbers."""
    results, pullback = jax.vjp(function, *arguments)
    cotangents = [normal(90 + i, *r.shape, dtype=r.dtype) for i, r in enumerate(results)]
    return results, pullback(type(results)(cotangents))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("centred", [True, False])
def test_norm_of_a_sum(dtype, centred):
    arguments = (normal(0, 2, 6, 48, dtype=dtype), normal(1, 2, 6, 48, dtype=dtype))
    scale = 1 + 0.1 * normal(2, 48)

    def plain(x, y, scale):
        total = x + y
        s = total.astype(jnp.float32)
        s = s - s.mean(-1, keepdims=True) if centred else s
        s = s * jax.lax.rsqrt(jnp.mean(jnp.square(s), -1, keepdims=True) + 1e-5)
        return total, (s * scale).astype(dtype)

    def kernel(x, y, scale):
        return gpu_kernels.add_norm(x, y, scale, centred, 1e-5)

    wanted = value_and_gradients(plain, (*arguments, scale))
    found = value_and_gradients(kernel, (*arguments, scale))
    assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cross_entropy_and_its_gradient(dtype, monkeypatch):
    # Three blocks, the last of them not full.
    monkeypatch.setattr(gpu_kernels, "_VOCABULARY_BLOCK", 64)
    logits = (4 * normal(3, 2, 5, 150)).astype(dtype)
    targets = jax.random.randint(jax.random.key(4), (2, 5), 0, 150).at[1, 2].set(-100)
    weights = jnp.linspace(0, 1, 10).reshape(2, 5).at[1, 2].set(0)

    def objective(logits):
        logits = logits.astype(jnp.float32)
        normaliser = jax.nn.logsumexp(logits, -1)
        nats = normaliser - jnp.take_along_axis(logits, targets[..., None] % 150, -1)[..., 0]
        return jnp.sum(weights * (nats + 0.1 * jnp.square(normaliser))), (nats, normaliser)

    gradient, wanted = jax.grad(objective, has_aux=True)(logits)
    found, *values = gpu_kernels.cross_entropy(logits, targets, weights, 0.1)
    assert found.dtype == logits.dtype and distance(found, gradient) < TOLERANCES[dtype]
    nats, normaliser = wanted
    # There is no such target.
    wanted = nats.at[1, 2].set(normaliser[1, 2]), normaliser
    assert distance(tuple(values), wanted) < 1e-6


def test_logits_of_any_size():
    logits = jnp.array([[[90.0, -jnp.inf, 3.0], [-90.0, -90.0, -90.0]]])
    targets, weights = jnp.array([[0, 2]]), jnp.ones((1, 2))
    gradient, nats, _ = gpu_kernels.cross_entropy(logits, targets, weights, 0.0)
    assert jnp.allclose(nats, jnp.array([0, jnp.log(3.0)]), atol=1e-5)
    assert jnp.allclose(gradient, jnp.array([[0, 0, 0], [1 / 3, 1 / 3, -2 / 3]]), atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("function", "plain", "shapes"),
    [
        (kept.gelu, jax.nn.gelu, [(2, 3, 40)]),
        (kept.gated, lambda g, u: jax.nn.silu(g) * u, [(2, 3, 40), (2, 3, 40)]),
        (
            lambda *given: jnp.stack(kept.products(*given), 2),
            lambda x, w: jnp.tensordot(x, w, 1),
            [(2, 3, 16), (16, 3, 8)],
        ),
    ],
    ids=["gelu", "gated", "products"],
)
def test_what_is_kept_for_the_backward_pass(dtype, function, plain, shapes):
    given = [normal(i, *shape) for i, shape in enumerate(shapes)]
    wanted = value_and_gradients(lambda *x: [plain(*x)], given)
    given = [x.astype(dtype) for x in given]
    found = value_and_gradients(lambda *x: [function(*x)], given)
    assert distance(found, wanted) < TOLERANCES[dtype]


def gradients(config, batch, **options):
    params = models.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)

    def objective(params):
        # Not the loss alone: what is done with it reaches the gradients.
        return jnp.square(models.loss(config, params, batch, **options)[0])

    return jax.jit(jax.value_and_grad(objective))(params)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt", "bfloat16"), ("llama", "float32")])
def test_the_model_is_the_plain_one(kind, dtype, monkeypatch):
    config = models.DecoderConfig(**BASE | KINDS[kind])
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 150)
    batch = {"tokens": tokens, "mask": jnp.ones((2, 12)).at[0, :5].set(0)}
    options = {"z_loss": 1e-2, "head_chunks": 1 if kind == "gpt" else 2}
    wanted, allowed = gradients(config, batch, **options), 1e-5
    if dtype == "bfloat16":
        config = dataclasses.replace(config, compute_dtype=dtype)
        allowed = 1.2 * distance(gradients(config, batch, **options), wanted)
    for module in (layers, cross_entropy):
        monkeypatch.setattr(module, "kernels_apply", lambda *given: True)
    monkeypatch.setattr(gpu_kernels, "_VOCABULARY_BLOCK", 64)
    assert distance(gradients(config, batch, **options), wanted) < allowed


def test_where_the_kernels_apply(monkeypatch):
    apply, cpus = gpu_kernels.kernels_apply, jax.devices()[:2]
    assert not apply(jnp.bfloat16, "auto", None)

    def only(**device):
        devices = [SimpleNamespace(**device)]
        monkeypatch.setattr(jax, "devices", lambda: devices)
        return SimpleNamespace(axis_names=("data",), devices=np.array(2 * devices))

    for capability in ("gfx942", "7.5"):  # AMD's, and before bfloat16
        only(platform="gpu", compute_capability=capability)
        assert not apply(jnp.bfloat16, "auto", None)
    on_two = only(platform="gpu", compute_capability="9.0")
    assert apply(jnp.bfloat16, "auto", None)
    assert not apply(jnp.float32, "auto", None)
    assert not apply(jnp.bfloat16, "xla", None)
    assert not apply(jnp.bfloat16, "auto", None, width=16384)
    assert apply(jnp.bfloat16, "auto", on_two)
    # Without a mesh nothing tells over how many of them an array is spread.
    monkeypatch.setattr(jax, "devices", lambda: list(on_two.devices))
    assert not apply(jnp.bfloat16, "auto", None)
    assert not apply(jnp.bfloat16, "auto", jax.sharding.Mesh(cpus, ("data",)))
    only(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(gpu_kernels, "triton", None)
    assert not apply(jnp.bfloat16, "auto", None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_written_in_what_triton_knows(kind, monkeypatch):
    config = models.DecoderConfig(**BASE | KINDS[kind], compute_dtype="bfloat16", attention="auto")
    shapes = models.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((2, 13), jnp.int32)
    for module in (layers, cross_entropy):
        monkeypatch.setattr(module, "kernels_apply", lambda *given: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def objective(params, tokens):
        return models.loss(config, params, {"tokens": tokens})[0]

    # Newer versions of JAX want to know for which GPU a kernel is lowered.
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        traced = jax.jit(jax.grad(objective)).trace(shapes, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(
        f"{name}_kernel" in text for name in ("add_norm", "add_norm_backward", "cross_entropy")
    )
