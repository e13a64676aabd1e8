"""Kernels for GPUs that read and write large activations once: sum and norm, cross-entropy.

XLA needs a pass of its own for each of: a sum that a product has taken in (a copy), the statistics
of its rows, their normalisation, and the sums over rows in the backward pass. The functions here
are compared with plain JAX in `tests.models.test_gpu_kernels`, on meshes in
`tests.models.test_kernels_on_meshes`.
"""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from jaxopt_lab.models.sharding import OnMesh, free_spec, on_each_device, placement

try:
    triton: Any = importlib.import_module("jax.experimental.pallas.triton")
except ImportError:  # JAX means to remove this backend of Pallas: XLA's own kernels then
    triton = None

F32 = jnp.float32
_LARGEST_WIDTH = 8192  # of a norm: a row stays in registers
_ROWS = 32  # of a norm's backward pass in one program, which adds up their share of d scale
# 16 bytes a thread and load; the fastest of what was tried on an H200 for 50304 tokens.
_VOCABULARY_BLOCK, _VOCABULARY_WARPS, _VOCABULARY_STAGES = 4096, 16, 2


def kernels_apply(dtype: Any, attention: str, mesh: OnMesh, width: int = 1) -> bool:
    """Whether activations go through the kernels: on GPUs of NVIDIA's, in bfloat16.

    Like cuDNN's attention they have no forward-mode and no second derivatives, so a model with
    ``attention = "xla"`` does without them. Nor can the compiler split them over devices: without a
    mesh they are used only where there is one device.

    Args:
        dtype: of activations.
        attention: as in the configuration of the model.
        mesh: over which activations are spread.
        width: of the rows that a norm is of.
    """
    devices = jax.devices() if mesh is None else placement(mesh).mesh.devices.flat
    wanted = attention != "xla" and dtype == jnp.bfloat16 and width <= _LARGEST_WIDTH
    # NVIDIA's alone have a number, such as 9.0, and bfloat16 came with 8.0.
    major = str(getattr(devices[0], "compute_capability", "")).split(".")[0]
    on_gpu = devices[0].platform == "gpu" and major.isdigit() and int(major) >= 8
    alone = mesh is not None or len(devices) == 1
    return wanted and alone and triton is not None and on_gpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def add_norm(
    x_BxTxD: jax.Array,
    y_BxTxD: jax.Array,
    scale_D: jax.Array,
    centred: bool,
    eps: float,
    mesh: OnMesh = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum x + y, and the LayerNorm (`centred`) or RMSNorm of its rows, both (B, T, D).

    On a mesh each device has its own rows: its part of the batch and of the positions.
    """
    return _add_norm_forward(x_BxTxD, y_BxTxD, scale_D, centred, eps, mesh)[0]


def _add_norm_forward(x_BxTxD, y_BxTxD, scale_D, centred: bool, eps: float, mesh: OnMesh):
    def own(x, y, scale):
        rows, width = math.prod(x.shape[:2]), x.shape[2]
        row = jax.ShapeDtypeStruct((rows,), F32)
        wide = jax.ShapeDtypeStruct((rows, width), x.dtype)
        found = _call(
            functools.partial(_add_norm_kernel, centred=centred, eps=eps),
            rows,
            (wide, wide, row, row),
            warps=_norm_warps(width),
        )(_rows(x), _rows(y), scale)
        return tuple(a.reshape(*x.shape[:2], *a.shape[1:]) for a in found)

    wide, row = _specs(mesh, x_BxTxD, "length")
    arrays, specs = (x_BxTxD, y_BxTxD, scale_D), (wide, wide, PartitionSpec())
    total, normed, mean, inverse = on_each_device(own, arrays, mesh, specs, (wide, wide, row, row))
    return (total, normed), (total, scale_D, mean, inverse)


def _add_norm_backward(centred: bool, eps: float, mesh: OnMesh, residuals: Any, cotangents: Any):
    def own(total, d_normed, d_total, scale, mean, inverse):
        rows, width = math.prod(total.shape[:2]), total.shape[2]
        together = math.gcd(rows, _ROWS)
        wide = jax.ShapeDtypeStruct((rows, width), total.dtype)
        shares = jax.ShapeDtypeStruct((rows // together, width), F32)
        dx, d_scale = _call(
            functools.partial(_add_norm_backward_kernel, rows=together, centred=centred),
            rows // together,
            (wide, shares),
            warps=_norm_warps(width),
            stages=2,
        )(_rows(total), _rows(d_normed), _rows(d_total), scale, _rows(mean), _rows(inverse))
        return dx.reshape(total.shape), jnp.sum(d_scale, axis=0)[None, None]

    (total, scale, mean, inverse), (d_total, d_normed) = residuals, cotangents
    wide, row = _specs(mesh, total, "length")
    arrays = (total, d_normed, d_total, scale, mean, inverse)
    specs = (wide, wide, wide, PartitionSpec(), row, row)
    dx, d_scale = on_each_device(own, arrays, mesh, specs, (wide, wide))
    # One row from each device with rows of its own; the compiler sums them as it does plain code.
    return dx, dx, jnp.sum(d_scale, axis=(0, 1)).astype(scale.dtype)


add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def _add_norm_kernel(x, y, scale, total, normed, mean, inverse, *, centred: bool, eps: float):
    row, width = pl.program_id(0), x.shape[1]
    at, valid = _columns(width)
    # The statistics are those of the sum as it is stored.
    stored = (_load(x.at[row, at], valid) + _load(y.at[row, at], valid)).astype(total.dtype)
    triton.store(total.at[row, at], stored, mask=valid)
    s = stored.astype(F32)
    centre = jnp.sum(s) / width if centred else jnp.zeros((), F32)
    s = jnp.where(valid, s - centre, 0)
    inverse_deviation = jax.lax.rsqrt(jnp.sum(s * s) / width + eps)
    value = s * inverse_deviation * _load(scale.at[at], valid)
    triton.store(normed.at[row, at], value.astype(normed.dtype), mask=valid)
    mean[row] = centre
    inverse[row] = inverse_deviation


def _add_norm_backward_kernel(
    total, d_normed, d_total, scale, mean, inverse, dx, d_scale, *, rows: int, centred: bool
):
    program, width = pl.program_id(0), total.shape[1]
    at, valid = _columns(width)
    scales = _load(scale.at[at], valid)

    def one(index, sums):
        row = program * rows + index
        s = jnp.where(valid, (_load(total.at[row, at], valid) - mean[row]) * inverse[row], 0)
        cotangent = _load(d_normed.at[row, at], valid)
        g = cotangent * scales
        inner = g - s * (jnp.sum(g * s) / width)
        if centred:
            inner = inner - jnp.sum(g) / width
        value = inner * inverse[row] + _load(d_total.at[row, at], valid)
        triton.store(dx.at[row, at], value.astype(dx.dtype), mask=valid)
        return sums + cotangent * s

    sums = jax.lax.fori_loop(0, rows, one, jnp.zeros(valid.shape, F32))
    triton.store(d_scale.at[program, at], sums, mask=valid)


def cross_entropy(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    z_loss: float,
    mesh: OnMesh = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of sum weights (nats + z_loss normaliser^2), and its two terms.

    Two passes over each row of the logits, the second one from the cache; the gradient takes their
    place. On a mesh each device has its own rows: its part of the batch.

    Returns:
        The gradient (B, T, V) in the dtype of the logits, and (B, T) in float32
        nats = normaliser - logit of the target, and the normaliser log sum exp logits.
    """

    def own(logits, targets, weights):
        rows, size = math.prod(logits.shape[:2]), logits.shape[2]
        row = jax.ShapeDtypeStruct((rows,), F32)
        found = _call(
            functools.partial(_cross_entropy_kernel, z_loss=z_loss),
            rows,
            (jax.ShapeDtypeStruct((rows, size), logits.dtype), row, row),
            warps=_VOCABULARY_WARPS,
            stages=_VOCABULARY_STAGES,
            input_output_aliases={0: 0},
        )(_rows(logits), _rows(targets), _rows(weights))
        return tuple(a.reshape(*logits.shape[:2], *a.shape[1:]) for a in found)

    wide, row = _specs(mesh, logits_BxTxV)
    arrays = (logits_BxTxV, targets_BxT, weights_BxT)
    return on_each_device(own, arrays, mesh, (wide, row, row), (wide, row, row))


def _cross_entropy_kernel(logits, targets, weights, gradient, nats, normaliser, *, z_loss: float):
    row, size = pl.program_id(0), logits.shape[1]
    block = min(_VOCABULARY_BLOCK, _power_of_two(size))
    whole, index = size // block, jnp.arange(block)
    blocks, valid_in_last = -(-size // block), index < size - whole * block

    def load(number, valid=None):
        place = logits.at[row, pl.ds(number * block, block)]
        x = triton.load(place, mask=valid, other=None if valid is None else -jnp.inf)
        return x.astype(F32)

    def add(number, sums, valid=None):
        largest, total = sums
        x = load(number, valid)
        # One exponential an entry: the smaller of both is measured by the larger one.
        step = _exp(-jnp.abs(x - largest))
        total = jnp.where(x > largest, total * step + 1, total + step)
        return jnp.maximum(x, largest), total

    # Before any sum over the row, which all threads wait for: the gradient overwrites it.
    target, weight = targets[row], weights[row]
    known = (target >= 0) & (target < size)
    at_target = triton.load(logits.at[row, jnp.where(known, target, 0)]).astype(F32)
    # A finite start: two infinities have no difference.
    sums = jnp.full((block,), jnp.finfo(F32).min), jnp.zeros((block,), F32)
    sums = jax.lax.fori_loop(0, whole, add, sums)
    largest, total = jax.lax.fori_loop(
        whole, blocks, functools.partial(add, valid=valid_in_last), sums
    )
    top = jnp.max(largest)
    log_sum = jnp.log(jnp.sum(total * _exp(largest - top))) + top
    nats[row] = log_sum - jnp.where(known, at_target, 0)
    normaliser[row] = log_sum
    slope = weight * (1 + 2 * z_loss * log_sum)

    def write(number, carry, valid=None):
        value = slope * _exp(load(number, valid) - log_sum)
        value = jnp.where(index == target - number * block, value - weight, value)
        place = gradient.at[row, pl.ds(number * block, block)]
        triton.store(place, value.astype(gradient.dtype), mask=valid)
        return carry

    # From the end: the last blocks are still in the L2 cache.
    jax.lax.fori_loop(whole, blocks, functools.partial(write, valid=valid_in_last), 0)
    jax.lax.fori_loop(0, whole, lambda number, carry: write(whole - 1 - number, carry), 0)


def _exp(x: jax.Array) -> jax.Array:
    """In one instruction for the power of two, to 2^-22; that of CUDA's library takes eight."""
    x = x * math.log2(math.e)
    if jax.default_backend() != "gpu":
        return jnp.exp2(x)
    (result,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, F32)],
    )
    return result


def _specs(
    mesh: OnMesh, x_BxTxN: jax.Array, length: str | None = None
) -> tuple[PartitionSpec, PartitionSpec]:
    """How whole rows lie on the mesh, and one number a row."""
    spec = free_spec(mesh, ("batch", length, None), x_BxTxN.shape)
    return spec, PartitionSpec(*spec[:2])


def _rows(x_BxT: jax.Array) -> jax.Array:
    return x_BxT.reshape(-1, *x_BxT.shape[2:])


def _call(
    kernel: Any, programs: int, results: Any, *, warps: int, stages: int = 1, **options: Any
) -> Any:
    """A kernel on whole arrays; interpreted where there is no GPU."""
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() != "gpu",
        name=kernel.func.__name__.strip("_"),
        **options,
    )


def _load(ref: Any, valid: jax.Array) -> jax.Array:
    return triton.load(ref, mask=valid, other=0.0).astype(F32)


def _columns(width: int) -> tuple[Any, jax.Array]:
    """All columns of a row, whose number is rounded up, and which of them there are."""
    rounded = _power_of_two(width)
    # A traced start: of a known one Pallas checks that the slice fits, and knows of no mask.
    return pl.ds(0 * pl.program_id(0), rounded), jnp.arange(rounded) < width


def _norm_warps(width: int) -> int:
    return min(16, max(1, _power_of_two(width) // 256))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
