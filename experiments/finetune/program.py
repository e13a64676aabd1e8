"""Several runs of one kind of method as one vmapped program: folds and rates are its arrays."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from growth import grown
from inputs import LENGTH, Inputs
from jaxtyping import Array
from methods import ADAPTERS, CLIP, KEEP, SCALE, Method, optimizer

import jaxopt_lab as jol
from jaxopt_lab import models
from jaxopt_lab.lora.adapters import nodes
from jaxopt_lab.models import encoder
from jaxopt_lab.step import Adapted, Step, TrainState, merged
from jaxopt_lab.tasks import classification_loss, encoder_logits

EVALUATED = 128  # rows at a time


class Scale(NamedTuple):
    """Lengths of a run."""

    steps: int
    evaluations: int
    batch: int
    lanes: int  # runs in one program
    folds: int
    rows: int | None  # at most so many rows of a part; None: all

    @property
    def freeze_after(self) -> int:
        """The step from which the choice of adapters stands."""
        return self.steps // 2


class Lane(NamedTuple):
    """One run, as arrays."""

    rate: Any
    seed: Any
    every: Any
    kept: Any  # (ADAPTERS,): 0 where there is no adapter
    first: Any  # the first step whose checkpoint may be the best
    train: Any  # (evaluations, steps, batch): numbers of rows
    validation: Any  # (chunks, EVALUATED)
    validation_weight: Any
    test: Any  # as validation; row 0 everywhere while nothing may look at the test part


def lane(
    scale: Scale, inputs: Inputs, method: Method, rate: float, fold: int, seed: int, test: bool
) -> Lane:
    """The arrays of a run.

    Args:
      scale: Its lengths.
      inputs: All rows.
      method: Which.
      rate: Peak rate.
      fold: Of ids mod 10, the test part; the next one is for validation.
      seed: Of head, adapters, order, dropout and random choice.
      test: Whether the test part is read.
    """
    draw = np.random.default_rng([14, seed])
    of_row = inputs.ids % 10
    validation = _part(scale, inputs, (fold + 1) % 10)
    train = np.flatnonzero((of_row != fold) & (of_row != (fold + 1) % 10))
    wanted = scale.steps * scale.batch
    epochs = [draw.permutation(train) for _ in range(-(-wanted // len(train)))]
    order = np.concatenate(epochs)[:wanted].reshape(scale.evaluations, -1, scale.batch)
    kept = np.ones(ADAPTERS, np.float32)
    if method.random:
        kept[draw.permutation(ADAPTERS)[KEEP:]] = 0
    rows, weight = _chunks(validation, _chunk_count(scale, inputs))
    tested = _chunks(_part(scale, inputs, fold), len(rows))[0]
    first = scale.freeze_after if method.kind == "chosen" else 0
    return Lane(
        np.float32(rate), np.int32(seed), np.int32(method.every), kept, np.int32(first),
        order.astype(np.int32), rows, weight, tested if test else np.zeros_like(tested),
    )  # fmt: skip


def test_rows(scale: Scale, inputs: Inputs, fold: int) -> np.ndarray:
    """Numbers of the test rows of a fold."""
    return _part(scale, inputs, fold)


def _part(scale: Scale, inputs: Inputs, digit: int) -> np.ndarray:
    return np.flatnonzero(inputs.ids % 10 == digit)[: scale.rows]


def _chunk_count(scale: Scale, inputs: Inputs) -> int:
    return max(-(-len(_part(scale, inputs, digit)) // EVALUATED) for digit in range(10))


def _chunks(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up to whole chunks, and the weight of each."""
    size = count * EVALUATED
    weight = (np.arange(size) < len(rows)).astype(np.float32)
    filled = np.pad(rows, (0, size - len(rows))).astype(np.int32)
    return filled.reshape(count, -1), weight.reshape(count, -1)


def program(scale: Scale, inputs: Inputs, method: Method) -> Any:
    """A jitted function of lanes (a leading axis each): what came of every run."""
    table = {
        "tokens": jnp.asarray(inputs.tokens, jnp.int32),
        "mask": jnp.arange(LENGTH) < jnp.asarray(inputs.count)[:, None],
        "label": jnp.asarray(inputs.label, jnp.int32),
    }
    run = functools.partial(_run, scale, inputs.config, method)
    jitted = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))
    params = jax.device_put(inputs.params)
    return lambda lanes: jitted(params, table, lanes)


def spec_of(config: models.EncoderConfig, method: Method, rank: int | None = None) -> Any:
    """The adapters of q, k and v in all layers, and the head beside them."""
    rank = method.stored_rank if rank is None else rank
    wanted = jol.lora.LoraConfig(
        rank=rank, alpha=SCALE * rank, target=("qkv",), full=("head",),
        weights=method.kind in ("chosen", "grown"),
    )  # fmt: skip
    params = models.abstract_params(config)
    axes, names = models.matrix_axes(config), models.matrix_names(config)
    return jol.lora.resolve(wanted, params, axes, names)


def start(
    config: models.EncoderConfig, method: Method, base: Any, key: Array
) -> tuple[Any, Any, Any]:
    """Parameters with a fresh head, which of them move, and the spec of adapters if there are."""
    params = encoder.with_head(config, base, 2, jax.random.fold_in(key, 1))[1]
    if method.kind == "full":
        return params, None, None
    if method.kind == "head":
        moves = {name: jax.tree.map(lambda _, n=name: n == "head", x) for name, x in params.items()}
        return params, moves, None
    narrow = spec_of(config, method, method.rank)
    adapters = jol.lora.init(jax.random.fold_in(key, 2), narrow, params)
    ((_, node),) = nodes(adapters, narrow)
    room = method.stored_rank - method.rank  # columns and rows of zeros have no gradient
    node["a"] = jnp.pad(node["a"], ((0, 0), (0, 0), (0, room)))
    node["b"] = jnp.pad(node["b"], ((0, 0), (0, room), (0, 0)))
    return Adapted(params, adapters), None, spec_of(config, method)


def loss_of(config: models.EncoderConfig, spec: Any, method: Method, *, dropout: bool) -> Any:
    """(params, batch, key) -> (objective, weight, metrics), with or without adapters."""
    of_model = classification_loss(encoder_logits(config), dropout=dropout)

    def loss(params: Any, batch: Mapping[str, Array], key: Array) -> Any:
        base, side = beside(params, spec, method, batch["kept"])
        return of_model(base, batch, key, side=side)

    return loss


def beside(params: Any, spec: Any, method: Method, kept: Array) -> tuple[Any, Any]:
    """The parameters of the model, and what stands beside its kernels."""
    if spec is None:
        return params, None
    moving = params.beside
    if method.kind == "adapters":  # the weights that they have are constants
        moving = jax.tree.map(lambda x: x, moving)
        ((_, node),) = nodes(moving, spec)
        node["weight"] = kept
    adapters, sides = jol.lora.WithSides.of(moving, spec)
    return {**params.base, "head": adapters["head"]}, sides


def step_of(
    scale: Scale, config: models.EncoderConfig, method: Method, spec: Any, rate: Any, every: Any
) -> Step:
    """One step of training; a run that diverges is to show it, so nothing is guarded."""
    schedule = optax.linear_schedule(1.0, 0.0, scale.steps)
    tx = optimizer(method, rate, schedule, every, scale.freeze_after)
    options: dict[str, Any] = {"clip": CLIP}
    if method.kind == "projected":  # which clips by the norm of the kernels' gradients
        options = {"gradient": jol.lora.with_taps(spec)}
    return Step(loss_of(config, spec, method, dropout=True), tx, guarded=False, **options)


def _run(
    scale: Scale,
    config: models.EncoderConfig,
    method: Method,
    base: Any,
    table: Mapping[str, Array],
    lane: Lane,
) -> dict[str, Array]:
    key = jax.random.key(lane.seed)
    params, moves, spec = start(config, method, base, key)
    step = step_of(scale, config, method, spec, lane.rate, lane.every)
    held_out = loss_of(config, spec, method, dropout=False)
    state = step.start(params, key, moves)
    frozen = state.frozen

    def batch(rows: Array) -> dict[str, Array]:
        return {name: x[rows] for name, x in table.items()} | {"kept": lane.kept}

    def advance(carry: TrainState, given: tuple[Array, Array]) -> tuple[TrainState, Array]:
        number, rows = given
        state, metrics = step.take(carry, batch(rows))
        if method.kind == "grown":
            state = grown(step.tx, state, number + 1, jax.random.fold_in(key, 3))
        return state, metrics["loss"]

    def evaluate(params: Any) -> tuple[Array, Array]:
        def sums(given: tuple[Array, Array]) -> tuple[Array, Array]:
            rows, weight = given
            loss, total, metrics = held_out(params, {**batch(rows), "weight": weight}, key)
            return loss * total, metrics["accuracy"] * total

        parts = jax.lax.map(sums, (lane.validation, lane.validation_weight))
        count = lane.validation_weight.sum()
        return parts[0].sum() / count, parts[1].sum() / count

    def stretch(carry: Any, given: tuple[Array, Array]) -> Any:
        state, best = carry
        numbers, rows = given
        state, losses = jax.lax.scan(advance, state, (numbers, rows))
        loss, accuracy = evaluate(merged(state.params, frozen))
        better = (loss < best["loss"]) & (numbers[-1] + 1 >= lane.first)
        now = {"loss": loss, "step": numbers[-1] + 1, "params": state.params}
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        return (state, best), (losses.mean(), loss, accuracy)

    best = {"loss": jnp.inf, "step": jnp.zeros((), jnp.int32), "params": state.params}
    numbers = jnp.arange(scale.steps, dtype=jnp.int32).reshape(scale.evaluations, -1)
    (_, best), (train, loss, accuracy) = jax.lax.scan(stretch, (state, best), (numbers, lane.train))
    out = {"train_loss": train, "validation_loss": loss, "validation_accuracy": accuracy}
    logits, best_params = encoder_logits(config), merged(best["params"], frozen)

    def answers(rows: Array) -> Array:
        whole, side = beside(best_params, spec, method, lane.kept)
        return jnp.argmax(logits(whole, batch(rows), None, side=side), 1)

    out |= {"best_step": best["step"], "answers": jax.lax.map(answers, lane.test)}
    if method.kind in ("chosen", "grown"):
        ((_, node),) = nodes(best["params"], spec)
        out["weights"] = node["weight"]
    return out
