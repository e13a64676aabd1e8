"""Losses and scores without a backward pass; weights may be perturbed where they are used.

A layer is cut from its stack, perturbed in float32 or wider and cast, all inside of the loop over
layers; the rows of a token table are perturbed as they are looked up, and again piece by piece in
the head. So a perturbed model needs the memory of one perturbed layer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import KeyPath

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.numerics import perturbed
from jaxopt_lab.models.config import DecoderConfig, check_tokens
from jaxopt_lab.models.cross_entropy import predictions
from jaxopt_lab.models.decoder import Params, abstract_decoder
from jaxopt_lab.models.encoder import abstract_encoder, pooled
from jaxopt_lab.models.encoder_config import EncoderConfig, ModelConfig
from jaxopt_lab.models.sharding import OnMesh, constrain
from jaxopt_lab.models.vocabulary_loss import PIECES, check_chunk, vocabulary_nats


class Direction(Protocol):
    """What is added to the parameters, part by part; leaves are named by their paths."""

    def layer(self, name: str, index: Any) -> jax.Array:
        """Of a stack (L, ...), one layer (...)."""
        ...

    def rows(self, name: str, rows: jax.Array) -> jax.Array:
        """Of a table (V, D), some rows (r, D)."""
        ...

    def columns(self, name: str, start: Any, size: int) -> jax.Array:
        """Of a head (D, V), some columns (D, size)."""
        ...

    def slice(self, name: str) -> jax.Array:
        """A leaf that is no stack and no table, whole."""
        ...


def probe_loss(
    config: DecoderConfig,
    batch: Mapping[str, jax.Array],
    *,
    vocabulary_chunk: int = 8192,
    mesh: OnMesh = None,
) -> Callable[..., jax.Array]:
    """The mean next-token loss of a batch, as zero-order methods take it.

    The result is a `probe_fn`: called as (params, direction, scale), it is the loss at
    params + scale * direction, and never holds more than one perturbed layer. Called with
    parameters alone it is a `value_fn`, and their loss. It has the value of `loss`; its gradient
    would keep every piece of the logits.

    Memory is that of inference where ``config.loop`` is "scanned"; in an unrolled loop the compiler
    decides how many layers are perturbed ahead of their use. Zero-order methods need the layout of
    the stacks: ``Probes(matrix_axes=models.matrix_axes(config))``.

    Args:
        config: of the decoder.
        batch: as for `loss`.
        vocabulary_chunk: tokens whose logits are computed at once, a multiple of 32.
        mesh: with axes among data, fsdp and tensor, pins activations to it.

    Raises:
        ValueError: for inputs that do not fit the config, or a chunk that is no multiple of 32.

    >>> from jaxopt_lab import models, zeroth_order as zo
    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, loop="scanned")
    >>> params = models.init_params(config, jax.random.key(0))
    >>> probes = zo.Probes(zo.signs(), matrix_axes=models.matrix_axes(config))
    >>> tx = zo.mezo(1e-4, key=jax.random.key(1), probes=probes)
    >>> probe_fn = probe_loss(config, {"tokens": jnp.zeros((2, 9), int)})
    >>> updates, state = tx.update(None, tx.init(params), params, probe_fn=probe_fn)
    >>> bool(jnp.allclose(zo.recorded(state), probe_fn(params), atol=0.01))
    True
    """
    check_chunk(vocabulary_chunk)
    tokens_BxT, targets_BxT, segment_ids_BxT, weights_BxT, _ = predictions(config, batch)
    check_tokens(config, tokens_BxT, segment_ids_BxT)

    def loss(params: Params, direction: Direction | None = None, scale: Any = 0.0) -> jax.Array:
        weights = _Weights(config, params, direction, scale)
        x_BxTxD = weights.decoded(tokens_BxT, segment_ids_BxT, mesh)
        nats_BxT = vocabulary_nats(
            *(x_BxTxD, weights.head_columns, targets_BxT),
            vocab_size=config.vocab_size,
            chunk=vocabulary_chunk,
        )
        return jnp.sum(nats_BxT * weights_BxT.astype(nats_BxT.dtype))

    return loss


def probe_scores(
    config: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    direction: Direction,
    scale: Any,
    *,
    words: Sequence[int] = (),
    mesh: OnMesh = None,
) -> jax.Array:
    """Scores of classes at params + scale * direction, in the memory of one perturbed layer.

    Those of an encoder's head, or of a decoder's tokens behind a prompt. Layers go through a scan,
    whatever ``config.loop`` says, and without dropout.

    Args:
        config: of the encoder, with ``classes``, or of the decoder.
        params: as from `init_params`.
        batch: ``tokens`` and ``mask`` (B, T), the mask False on the padding behind a text.
        direction: what is added, as a `probe_fn` is given it.
        scale: times this.
        words: of a decoder, the token of each class.
        mesh: with axes among data, fsdp and tensor, pins activations to it.

    Returns:
        (B, classes) in float32 or wider.

    >>> from jaxopt_lab import models, zeroth_order as zo
    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4)
    >>> params = models.init_params(config, jax.random.key(0))
    >>> probes = zo.Probes(matrix_axes=models.matrix_axes(config))
    >>> tx = zo.mezo(1e-4, key=jax.random.key(1), probes=probes)
    >>> batch = {"tokens": jnp.zeros((2, 8), int), "mask": jnp.ones((2, 8), bool)}
    >>> probe_fn = lambda *at: probe_scores(config, at[0], batch, *at[1:], words=[5, 9]).max()
    >>> losses = lambda p: zo.recorded(tx.update(None, tx.init(p), p, probe_fn=probe_fn)[1])
    >>> jax.eval_shape(losses, params).shape
    (2,)
    """
    config = dataclasses.replace(config, loop="scanned")
    weights = _Weights(config, params, direction, scale)
    tokens_BxT, mask_BxT = batch["tokens"], batch["mask"].astype(bool)
    if isinstance(config, EncoderConfig):
        x_BxTxD = weights.embedded(tokens_BxT, None, mesh)
        x_BxTxD = weights.through_layers(x_BxTxD, mask_BxT, mesh, None)
        return weights.module("head")(pooled(x_BxTxD, mask_BxT, config.pooling))
    documents_BxT = jnp.ones_like(tokens_BxT) if config.document_mask else None
    x_BxTxD = weights.decoded(tokens_BxT, documents_BxT, mesh)
    # Padding comes behind the prompt, where no token of it looks.
    last_BxD = x_BxTxD[jnp.arange(len(tokens_BxT)), mask_BxT.sum(1) - 1]
    wide = jnp.promote_types(last_BxD.dtype, jnp.float32)
    return last_BxD.astype(wide) @ weights.head_words(words).astype(wide)


class _Found(NamedTuple):
    """Beside a table, what a lookup gives (`models.side.TableSide`)."""

    x_BxTxD: jax.Array

    def rows(self, index: jax.Array, table: jax.Array) -> jax.Array:
        """What was found."""
        del index, table
        return self.x_BxTxD


class _Weights:
    """Parameters, perturbed where they are asked for."""

    def __init__(
        self, config: ModelConfig, params: Params, direction: Direction | None, scale: Any
    ):
        self.config: Any = config
        self.params, self.direction, self.scale = params, direction, jnp.asarray(scale)
        decoder = isinstance(config, DecoderConfig)
        self.model: Any = abstract_decoder(config) if decoder else abstract_encoder(config)

    def add(self, x: jax.Array, draw: Callable[[Direction], jax.Array]) -> jax.Array:
        """x, perturbed by what is drawn."""
        return x if self.direction is None else perturbed(x, self.scale, draw(self.direction))

    def tree(
        self,
        name: str,
        draw: Callable[[Direction, str], jax.Array],
        cut: Any = lambda x: x,
        of: Any = None,
    ) -> Any:
        """What is cut from the leaves below a name, or from some of them, perturbed."""

        def one(path: KeyPath, x: jax.Array) -> jax.Array:
            leaf = "/".join((name, *path_names(path)))
            return self.add(cut(x), lambda direction: draw(direction, leaf))

        return jax.tree_util.tree_map_with_path(one, self.params[name] if of is None else of)

    def module(self, name: str) -> Any:
        """A module that is no stack."""
        weights = self.tree(name, lambda direction, leaf: direction.slice(leaf))
        return nnx.merge(nnx.graphdef(getattr(self.model, name)), weights)

    def decoded(
        self, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array | None, mesh: OnMesh
    ) -> jax.Array:
        """What the head of a decoder reads."""
        x_BxTxD = self.embedded(tokens_BxT, segment_ids_BxT, mesh)
        return self.module("final_norm")(self.through_layers(x_BxTxD, segment_ids_BxT, mesh))

    def embedded(self, tokens_BxT: jax.Array, beside: Any, mesh: OnMesh) -> jax.Array:
        """The residual stream at its start.

        Args:
            tokens_BxT: token ids.
            beside: segments of a decoder, token types of an encoder.
            mesh: pins activations to it.
        """
        rows_N, table_VxD = tokens_BxT.reshape(-1), self.params["embedding"]["tokens"]
        others = {name: x for name, x in self.params["embedding"].items() if name != "tokens"}
        others = self.tree("embedding", lambda direction, leaf: direction.slice(leaf), of=others)
        # As in training: rows of a table that is cut along their length would be exchanged between
        # groups of devices that evaluate different probes.
        x_NxD = constrain(table_VxD, mesh, ("vocab", None))[rows_N]
        x_NxD = self.add(x_NxD, lambda direction: direction.rows("embedding/tokens", rows_N))
        embedding = nnx.merge(nnx.graphdef(self.model.embedding), {**others, "tokens": table_VxD})
        found = {"tokens": _Found(x_NxD.reshape(*tokens_BxT.shape, -1))}
        return constrain(
            embedding(tokens_BxT, beside, None, found), mesh, ("batch", "length", "stream")
        )

    def through_layers(self, x_BxTxD: jax.Array, *options: Any) -> jax.Array:
        """All layers, called with these options; each casts its own weights."""
        graphdef = nnx.graphdef(self.model.layers)

        def layer(i: Any, x_BxTxD: jax.Array) -> jax.Array:
            weights = self.tree(
                "layers", lambda direction, leaf: direction.layer(leaf, i), lambda x: x[i]
            )
            return nnx.merge(graphdef, weights)(x_BxTxD, *options)

        if self.config.loop == "scanned":
            return jax.lax.fori_loop(0, self.config.depth, layer, x_BxTxD)
        for i in range(self.config.depth):
            x_BxTxD = layer(i, x_BxTxD)
        return x_BxTxD

    def head_words(self, words: Sequence[int]) -> jax.Array:
        """Columns (D, words) of a decoder's output matrix in the compute dtype."""
        if self.config.tied:
            index = jnp.asarray(words)
            rows_CxD = self.add(
                self.params["embedding"]["tokens"][index],
                lambda direction: direction.rows("embedding/tokens", index),
            )
            return rows_CxD.T.astype(self.config.compute_dtype)
        columns = []
        for word in map(int, words):
            start = word // PIECES * PIECES
            size = min(PIECES, self.config.vocab_size - start)
            columns.append(self.head_columns(start, size)[:, word - start])
        return jnp.stack(columns, 1)

    def head_columns(self, start: Any, size: int) -> jax.Array:
        """Columns (D, size) of the output matrix in the compute dtype."""
        cut = jax.lax.dynamic_slice_in_dim
        if self.config.tied:
            rows_CxD = cut(self.params["embedding"]["tokens"], start, size)
            rows_CxD = self.add(
                rows_CxD,
                lambda direction: direction.rows("embedding/tokens", start + jnp.arange(size)),
            )
            return rows_CxD.T.astype(self.config.compute_dtype)
        columns_DxC = self.add(
            cut(self.params["head"], start, size, 1),
            lambda direction: direction.columns("head", start, size),
        )
        return columns_DxC.astype(self.config.compute_dtype)
