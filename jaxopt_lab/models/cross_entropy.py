"""Next-token cross-entropy, whole or in chunks of positions.

Logits stay in the compute dtype; their log-sum-exp is taken in float32 or wider. The logits are
the largest array of a training step. The chunked form never holds more than one chunk of them and
needs no second pass: the forward pass also computes the gradient with respect to the hidden
states and the head, and the backward pass only scales it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.packed import is_packed, unpacked
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.models.decoder import Params, Sides, bind
from jaxopt_lab.models.gpu_kernels import cross_entropy, kernels_apply
from jaxopt_lab.models.sharding import LOGITS, OnMesh, constrain, free_spec, gathered
from jaxopt_lab.models.side import Side, matmul


def loss(
    config: DecoderConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    *,
    z_loss: float = 0.0,
    head_chunks: int = 1,
    mesh: OnMesh = None,
    side: Sides = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean next-token loss of a batch.

    For logits s and target y at each of the N valid positions,
    loss = 1/N sum (log sum exp s - s_y + z_loss (log sum exp s)^2).

    Args:
        config: of the decoder.
        params: as from `init_params`.
        batch: ``tokens`` (B, T + 1), position t predicts token t + 1; optional ``mask`` (B, T)
            that is nonzero where the prediction counts; ``segment_ids`` (B, T) or (B, T + 1),
            used with ``config.document_mask``.
        z_loss: weight of the squared log-sum-exp, a Python number; it keeps logits from drifting.
        head_chunks: pieces into which the T positions are cut for the head; 1 keeps all logits
            for the backward pass.
        mesh: with axes among data, fsdp and tensor, pins activations to it.
        side: what stands beside the kernels of linear layers, as for `apply`.

    Returns:
        The objective, a scalar in nats per token, and a dict of scalars that carry no gradient:
        ``tokens``, the number N of valid positions, and ``cross_entropy``, the mean without the
        z-loss.

    Raises:
        ValueError: for inputs that do not fit the config, or T not divisible by ``head_chunks``.

    >>> from jaxopt_lab.models import init_params
    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> value, aux = loss(config, params, {"tokens": jnp.zeros((2, 9), int)})
    >>> int(aux["tokens"])
    16
    """
    asked = predictions(config, batch)
    _check_chunks(head_chunks, asked)
    x_BxTxD, head = _hidden(config, params, asked, mesh, side)
    if head_chunks > 1:
        # Of what is in pieces, the head's gradient is formed as well: packed there would be none.
        head = unpacked(head)
    plain = head[1] is None and not is_packed(head[0])
    on_gpu = plain and kernels_apply(x_BxTxD.dtype, config.attention, mesh)
    shape = (*x_BxTxD.shape[:2], config.vocab_size)
    on_gpu = on_gpu and free_spec(mesh, LOGITS, shape)[2] is None  # each row on one device
    sums: Any = _kernel_sums if on_gpu else _weighted_sums
    if head_chunks > 1:
        sums = _chunked_sums(head_chunks, sums)
    objective, nats = sums(x_BxTxD, head, asked.targets_BxT, asked.weights_BxT, z_loss, mesh)
    return objective, {"tokens": asked.count, "cross_entropy": jax.lax.stop_gradient(nats)}


def target_nats(
    config: DecoderConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    *,
    head_chunks: int = 1,
    mesh: OnMesh = None,
    side: Sides = None,
) -> jax.Array:
    """Next-token loss of every target by itself, for held-out text.

    Args:
        config: of the decoder.
        params: as from `init_params`.
        batch: as for `loss`.
        head_chunks: pieces into which the T positions are cut for the head.
        mesh: as for `loss`.
        side: as for `loss`.

    Returns:
        Nats (B, T), 0 where the mask is; their sum over the number of valid positions is the
        cross-entropy of `loss`.

    Raises:
        ValueError: as for `loss`.
    """
    asked = predictions(config, batch)
    _check_chunks(head_chunks, asked)
    x_BxTxD, head = _hidden(config, params, asked, mesh, side)
    targets_BxT = asked.targets_BxT
    if head_chunks == 1:
        nats_BxT = _nats(x_BxTxD, head, targets_BxT, mesh)[0]
    else:
        pieces = (_pieces(x_BxTxD, head_chunks), _pieces(targets_BxT, head_chunks))
        found = jax.lax.map(lambda piece: _nats(piece[0], head, piece[1], mesh)[0], pieces)
        nats_BxT = jnp.moveaxis(found, 0, 1).reshape(targets_BxT.shape)
    return jnp.where(asked.weights_BxT > 0, nats_BxT, 0)


Head = tuple[jax.Array, Side | None]


def _check_chunks(head_chunks: int, asked: "Predictions") -> None:
    positions = asked.targets_BxT.shape[1]
    if head_chunks < 1 or positions % head_chunks:
        raise ValueError(
            f"head_chunks: got {head_chunks}, wanted a divisor of {positions} positions"
        )


def _hidden(
    config: DecoderConfig, params: Params, asked: "Predictions", mesh: OnMesh, side: Sides
) -> tuple[jax.Array, Head]:
    """What the head is applied to, and the head."""
    decoder = bind(config, params)
    x_BxTxD = decoder.hidden(asked.tokens_BxT, asked.segment_ids_BxT, mesh=mesh, side=side)
    return x_BxTxD, (decoder.head_kernel(), decoder.head_side(side))


class Predictions(NamedTuple):
    """What is predicted from what."""

    tokens_BxT: jax.Array
    targets_BxT: jax.Array  # the token after each position
    segment_ids_BxT: jax.Array | None
    weights_BxT: jax.Array  # of the mean, float32 or wider; 0 where the mask is
    count: jax.Array  # number of positions that count, int32


def predictions(config: DecoderConfig, batch: Mapping[str, jax.Array]) -> Predictions:
    """Unpacks a batch.

    Args:
        config: of the decoder.
        batch: as for `loss`.

    Raises:
        ValueError: segment ids are missing, or the mask has another shape.
    """
    tokens_BxT, targets_BxT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    segment_ids_BxT = None
    if config.document_mask:
        if "segment_ids" not in batch:
            raise ValueError("batch: no segment_ids, which document_mask = True needs")
        segment_ids_BxT = batch["segment_ids"][:, : tokens_BxT.shape[1]]
    mask_BxT = batch.get("mask", jnp.ones(targets_BxT.shape, bool))
    if mask_BxT.shape != targets_BxT.shape:
        raise ValueError(f"mask: got shape {mask_BxT.shape}, wanted {targets_BxT.shape}")
    dtype = jnp.promote_types(config.compute_dtype, jnp.float32)
    count = jnp.sum(mask_BxT != 0, dtype=jnp.int32)
    weights_BxT = (mask_BxT != 0).astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    return Predictions(tokens_BxT, targets_BxT, segment_ids_BxT, weights_BxT, count)


def _weighted_sums(
    x_BxTxD: jax.Array,
    head: Head,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    z_loss: float,
    mesh: OnMesh,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over positions of the objective and of the plain cross-entropy."""
    nats_BxT, normaliser_BxT = _nats(x_BxTxD, head, targets_BxT, mesh)
    objective_BxT = nats_BxT + z_loss * jnp.square(normaliser_BxT)
    return jnp.sum(weights_BxT * objective_BxT), jnp.sum(weights_BxT * nats_BxT)


# The same, whose forward pass puts the gradient in the place of the logits.
_kernel_sums = jax.custom_vjp(_weighted_sums, nondiff_argnums=(4, 5))


def _kernel_forward(x_BxTxD, head, targets_BxT, weights_BxT, z_loss, mesh):
    logits_BxTxV = x_BxTxD @ gathered(head[0], mesh)
    found = cross_entropy(logits_BxTxV, targets_BxT, weights_BxT, z_loss, mesh)
    dlogits_BxTxV, nats_BxT, normaliser_BxT = found
    objective_BxT = nats_BxT + z_loss * jnp.square(normaliser_BxT)
    sums = jnp.sum(weights_BxT * objective_BxT), jnp.sum(weights_BxT * nats_BxT)
    return sums, (dlogits_BxTxV, x_BxTxD, head)


def _kernel_backward(z_loss, mesh, residuals, cotangents):
    # As in `_chunked_sums`, the objective alone carries a gradient.
    dlogits_BxTxV, x_BxTxD, (head_DxV, _) = residuals
    dlogits_NxV, x_NxD = (x.reshape(-1, x.shape[-1]) for x in (dlogits_BxTxV, x_BxTxD))
    gradients = dlogits_NxV @ gathered(head_DxV, mesh).T, dlogits_NxV.T @ x_NxD
    # Both at once: this frees the logits before the backward pass of the layers.
    gradients = jax.lax.optimization_barrier(gradients)
    dx_NxD, dhead_VxD = (cotangents[0].astype(g.dtype) * g for g in gradients)
    return dx_NxD.reshape(x_BxTxD.shape), (dhead_VxD.T, None), None, None


_kernel_sums.defvjp(_kernel_forward, _kernel_backward)


def _nats(
    x_BxTxD: jax.Array, head: Head, targets_BxT: jax.Array, mesh: OnMesh
) -> tuple[jax.Array, jax.Array]:
    """Loss of every position, and its log-sum-exp."""
    head_DxV, side = head
    logits_BxTxV = constrain(matmul(side, x_BxTxD, head_DxV, mesh), mesh, LOGITS)
    logits_BxTxV = logits_BxTxV.astype(jnp.promote_types(logits_BxTxV.dtype, jnp.float32))
    normaliser_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    # A masked sum and not a gather: it stays local when the vocabulary is sharded, and its
    # gradient is elementwise where a gather's is a scatter.
    is_target_BxTxV = jnp.arange(logits_BxTxV.shape[-1]) == targets_BxT[:, :, None]
    nats_BxT = normaliser_BxT - jnp.sum(jnp.where(is_target_BxTxV, logits_BxTxV, 0), axis=-1)
    return nats_BxT, normaliser_BxT


def _pieces(a_BxTx: jax.Array, chunks: int) -> jax.Array:
    # Pieces of T keep every device busy with its own rows of a sharded batch.
    shape = (a_BxTx.shape[0], chunks, -1, *a_BxTx.shape[2:])
    return jnp.moveaxis(a_BxTx.reshape(shape), 1, 0)


@functools.cache
def _chunked_sums(chunks: int, of_piece: Callable[..., Any]) -> Any:
    """A sum over positions in pieces of them, differentiated in its forward pass."""
    split = functools.partial(_pieces, chunks=chunks)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
    def sums(x_BxTxD, head, targets_BxT, weights_BxT, z_loss, mesh):
        def chunk(totals, piece):
            x, targets, weights = piece
            values = of_piece(x, head, targets, weights, z_loss, mesh)
            return jax.tree.map(jnp.add, totals, values), None

        zero = jnp.zeros((), weights_BxT.dtype)
        pieces = jax.tree.map(split, (x_BxTxD, targets_BxT, weights_BxT))
        return jax.lax.scan(chunk, (zero, zero), pieces)[0]

    def forward(x_BxTxD, head, targets_BxT, weights_BxT, z_loss, mesh):
        gradient = jax.value_and_grad(of_piece, argnums=(0, 1), has_aux=True)

        def chunk(carry, piece):
            x, targets, weights = piece
            values, (dx, dhead) = gradient(x, head, targets, weights, z_loss, mesh)
            return jax.tree.map(jnp.add, carry, (values, dhead)), dx

        zero = jnp.zeros((), weights_BxT.dtype)
        # One sum over all chunks: in float32 even when the head is bfloat16.
        dhead = jax.tree.map(lambda w: jnp.zeros(w.shape, weights_BxT.dtype), head)
        pieces = jax.tree.map(split, (x_BxTxD, targets_BxT, weights_BxT))
        (totals, dhead), dx = jax.lax.scan(chunk, ((zero, zero), dhead), pieces)
        dx_BxTxD = jnp.moveaxis(dx, 0, 1).reshape(x_BxTxD.shape)
        return totals, (dx_BxTxD, jax.tree.map(lambda g, w: g.astype(w.dtype), dhead, head))

    def backward(z_loss, mesh, residuals, cotangents):
        # Only the objective carries a gradient; the caller stops the one of the cross-entropy.
        scaled = jax.tree.map(lambda g: cotangents[0].astype(g.dtype) * g, residuals)
        return (*scaled, None, None)

    sums.defvjp(forward, backward)
    return sums
