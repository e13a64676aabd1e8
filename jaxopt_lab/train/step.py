"""The training step: accumulate, clip, update, guard. One compiled program with fixed layouts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_lab.optim.shardings import state_shardings
from jaxopt_lab.train.mesh import BATCH_AXES

Batch = Mapping[str, Array]
LossFn = Callable[[PyTree, Batch], tuple[Float[Array, " "], Mapping[str, Array]]]
"""(params, batch) -> (mean nats per token, {"tokens": number of tokens in the mean, ...})"""

SIGNALS = "signals"
"""Entry of a batch that carries one row of flags per batch row; see `make_step`."""


class TrainState(NamedTuple):
    """Everything that training changes; what a checkpoint holds."""

    step: Int[Array, " "]  # optimizer steps taken, skipped ones included
    skipped: Int[Array, " "]  # steps whose update was dropped because something was not finite
    params: PyTree  # plain nested dict
    opt_state: PyTree


class Step(NamedTuple):
    """The step before compilation, with the layouts it was built for."""

    init: Callable[[Array], TrainState]  # (key) -> state, jitted
    init_from: Callable[[PyTree], TrainState]  # (parameters) -> state, jitted
    update: Any  # (state, batch) -> (state, metrics), jitted, donates the state
    preview: Any  # (state, batch) -> (loss, gradients, updates) of that step, jitted
    value_and_grad: Any  # (params, batch) -> (loss, gradients, neither clipped nor cast), jitted
    shardings: Any  # TrainState of NamedSharding
    abstract_state: Any  # TrainState of ShapeDtypeStruct with shardings; the target of a restore


def param_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings of parameters from their PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def make_step(
    init_params: Callable[[Array], PyTree],
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    param_specs: PyTree,
    accumulation: int = 1,
    clip: float | None = None,
    rates: Callable[[Array, PyTree], Mapping[str, Array]] = lambda step, opt_state: {},
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    r"""Builds the initialisation and the step with explicit shardings.

    One step splits the batch into `accumulation` microbatches, averages their gradients in
    float32 weighted by their numbers of tokens, scales the result by
    $\min(1, \mathrm{clip} / \lVert g \rVert_2)$ over all parameters, and applies `tx`,
    which also receives the loss as `value`.

    A step whose loss or gradient norm is not finite leaves parameters and floating-point
    optimizer state as they were. Integer state and keys advance all the same: they count steps,
    and selecting between old and new counters would batch the predicates that transforms branch
    on. A transform that counts for each matrix, such as SOAP, refuses gradients that are not
    finite by itself; every leaf is NaN to it then. Such a step adds one to `skipped`.

    Args:
      init_params: (key) -> parameters.
      loss_fn: (params, batch) -> (mean loss, aux with "tokens").
      tx: The optimizer; it returns updates to be added.
      mesh: Axes data, fsdp, tensor.
      param_specs: Tree of PartitionSpec, like the parameters.
      accumulation: Number of microbatches; divides the batch.
      clip: Largest global gradient norm; None does not clip.
      rates: (steps taken, optimizer state) -> learning rates of the step, to report.
      compiler_options: Passed to the compiler for every program built here.

    Returns:
      The jitted programs. A batch may contain "signals", an int array (batch, k): its maximum over
      the batch comes back as a metric, which is how processes agree on stopping and saving
      without a synchronisation of their own.
    """
    params_at = param_shardings(mesh, param_specs)
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract_params = jax.eval_shape(init_params, key)
    replicated = NamedSharding(mesh, PartitionSpec())
    layout: Any = TrainState  # here its fields hold shardings
    shardings = layout(
        step=replicated,
        skipped=replicated,
        params=params_at,
        opt_state=state_shardings(tx, abstract_params, params_at),
    )

    def init(key: Array) -> TrainState:
        return init_from(init_params(key))

    def init_from(params: PyTree) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(step=zero, skipped=zero, params=params, opt_state=tx.init(params))

    def raw(params: PyTree, batch: Batch) -> tuple[Array, Array, PyTree]:
        batch = {name: value for name, value in batch.items() if name != SIGNALS}
        return accumulated_gradients(loss_fn, params, batch, accumulation)

    def value_and_grad(params: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        loss, _, grads = raw(params, batch)
        return loss, grads

    def received(params: PyTree, batch: Batch) -> tuple[Array, Array, Array, PyTree]:
        """Loss, tokens, gradient norm, and the gradients as the optimizer gets them."""
        loss, tokens, grads = raw(params, batch)
        norm = optax.tree.norm(grads)
        # Optimizers keep the dtype of what they are given: parameters decide it.
        clipped = _clipped(grads, norm, clip)
        return loss, tokens, norm, jax.tree.map(lambda g, p: g.astype(p.dtype), clipped, params)

    def preview(state: TrainState, batch: Batch) -> tuple[Array, PyTree, PyTree]:
        loss, _, _, grads = received(state.params, batch)
        updates, _ = _apply(tx, state, grads, loss)
        return loss, grads, updates

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        signals = batch.get(SIGNALS)
        loss, tokens, norm, grads = received(state.params, batch)
        new, finite = _guarded_update(tx, state, grads, loss, norm)
        metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens, "finite": finite}
        metrics |= {"skipped": new.skipped, **rates(state.step, state.opt_state)}
        if signals is not None:
            metrics[SIGNALS] = jnp.max(signals, axis=0)
        return new, metrics

    options = dict(compiler_options) if compiler_options else None
    inputs = (shardings, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    abstract = jax.eval_shape(init, key)
    return Step(
        init=jax.jit(init, out_shardings=shardings, compiler_options=options),
        init_from=jax.jit(
            init_from,
            in_shardings=(params_at,),
            out_shardings=shardings,
            compiler_options=options,
        ),
        update=jax.jit(
            update,
            in_shardings=inputs,
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=options,
        ),
        preview=jax.jit(
            preview,
            in_shardings=inputs,
            out_shardings=(replicated, params_at, params_at),
            compiler_options=options,
        ),
        value_and_grad=jax.jit(
            value_and_grad,
            in_shardings=(params_at, inputs[1]),
            out_shardings=(replicated, params_at),
            compiler_options=options,
        ),
        shardings=shardings,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        ),
    )


def accumulated_gradients(
    loss_fn: LossFn, params: PyTree, batch: Batch, accumulation: int
) -> tuple[Float[Array, " "], Float[Array, " "], PyTree]:
    """Loss and gradient of the mean over all tokens of the batch, one microbatch at a time.

    Args:
      loss_fn: (params, batch) -> (mean loss, aux with "tokens").
      params: Parameters.
      batch: Arrays whose first axis is the batch.
      accumulation: Number of microbatches.

    Returns:
      Mean loss, number of tokens and float32 gradients.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def weighted(micro: Batch) -> tuple[Array, Array, PyTree]:
        (loss, aux), grads = value_and_grad(params, micro)
        tokens = jnp.asarray(aux["tokens"], jnp.float32)
        return loss * tokens, tokens, jax.tree.map(lambda g: g.astype(jnp.float32) * tokens, grads)

    if accumulation == 1:
        (loss, aux), grads = value_and_grad(params, batch)
        tokens = jnp.asarray(aux["tokens"], jnp.float32)
        return loss, tokens, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, weighted(micro)), None

    zeros = (
        jnp.zeros(()), jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape), params),
    )  # fmt: skip
    (loss, tokens, grads), _ = jax.lax.scan(add, zeros, _microbatches(batch, accumulation))
    # A batch without a single token has nothing to learn from: loss and gradient 0.
    share = 1.0 / jnp.maximum(tokens, 1.0)
    return loss * share, tokens, jax.tree.map(lambda g: g * share, grads)


def _microbatches(batch: Batch, accumulation: int) -> dict[str, Array]:
    def split(x: Array) -> Array:
        # Microbatch i takes the rows i, i + k, ...: every device keeps its own rows, so that
        # nothing moves. Contiguous microbatches would each live on a part of the devices.
        rows = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return {name: split(x) for name, x in batch.items()}


def _clipped(grads: PyTree, norm: Float[Array, " "], clip: float | None) -> PyTree:
    if clip is None:
        return grads
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * scale, grads)


def _guarded_update(
    tx: optax.GradientTransformation,
    state: TrainState,
    grads: PyTree,
    loss: Float[Array, " "],
    norm: Float[Array, " "],
) -> tuple[TrainState, Bool[Array, " "]]:
    # The norm is finite only if every gradient is, and it is at hand already.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # Leaves that are finite in a dropped step must not be taken for seen: a counter of theirs would
    # advance without the moments that it corrects.
    grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)
    updates, opt_state = _apply(tx, state, grads, loss)
    params = optax.apply_updates(state.params, updates)

    def keep_if_bad(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    new = TrainState(
        step=state.step + 1,
        skipped=state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
        params=jax.tree.map(keep_if_bad, params, state.params),
        opt_state=jax.tree.map(keep_if_bad, opt_state, state.opt_state),
    )
    return new, finite


def _apply(
    tx: optax.GradientTransformation, state: TrainState, grads: PyTree, loss: Float[Array, " "]
) -> tuple[PyTree, PyTree]:
    return optax.with_extra_args_support(tx).update(
        grads, state.opt_state, state.params, value=loss
    )


def make_eval(
    loss_fn: LossFn,
    *,
    mesh: Mesh,
    param_shardings: PyTree,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[PyTree, Batch], tuple[Array, Array]]:
    """Builds the jitted (params, batch) -> (sum of nats, number of tokens)."""

    def evaluate(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        loss, aux = loss_fn(params, batch)
        tokens = jnp.asarray(aux["tokens"], jnp.float32)
        return loss * tokens, tokens

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        evaluate,
        in_shardings=(param_shardings, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
        out_shardings=(replicated, replicated),
        compiler_options=dict(compiler_options) if compiler_options else None,
    )
