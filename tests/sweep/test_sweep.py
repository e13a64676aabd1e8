import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab import data
from jaxopt_lab.sweep import (
    Program,
    Run,
    StepCost,
    Task,
    Tuned,
    cost,
    lanes_that_fit,
    measure_step,
    tune,
)  # fmt: skip
from tests.sweep.tasks import STEPS, TASK, batches

RATES = (3e-2, 3e-1, 3.0)
TWO_STEPS = jol.NewtonSchulz(steps=2)
SETTINGS = {"sweep_seed": 0, "seeds": (1, 2)}


def lion_muon(rate):
    return jol.lion_muon(
        lambda count: rate * (1 - count / STEPS),
        period=2,
        newton_schulz=TWO_STEPS,
        # By their names both matrices would be AdamW's.
        matrix_axes={"table": MuonDimensionNumbers(), "head": MuonDimensionNumbers(), "bias": None},
    )


@pytest.fixture(scope="module")
def sequential():
    return tune(TASK, lion_muon, RATES, **SETTINGS)


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def vectorized(progress):
    return tune(
        TASK, lion_muon, RATES, lanes=2, on_progress=lambda *a: progress.append(a), **SETTINGS
    )


def test_one_run_is_the_loop_that_one_would_write():
    task = replace(TASK, steps=4)
    curves = Program(task, optax.sgd, 1, vectorized=False).train([Run(0.3, 5)])
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: TASK.loss(*args)[0]))
    params = TASK.init_params(jax.random.key(5))
    for step in range(task.steps):
        batch = jax.tree.map(lambda x: x[0], batches(5, step, step + 1))
        loss, grads = value_and_grad(params, batch)
        np.testing.assert_allclose(curves.train[0, step], loss, rtol=1e-5)
        grads = jax.device_get(grads)
        norm = math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        scale = 0.3 * min(1.0, TASK.clip / norm)
        params = {name: np.asarray(params[name]) - scale * g for name, g in grads.items()}
    held_out = [value_and_grad(params, {"tokens": x})[0] for x in TASK.held_out["tokens"]]
    np.testing.assert_allclose(curves.held_out[0, -1], np.mean(held_out), rtol=1e-5)
    assert curves.held_out.shape == (1, 2) and task.evaluated_steps() == [3, 4]


def test_vmapped_runs_equal_runs_one_after_the_other(sequential, vectorized):
    # Three rates in lanes of two: the second group is filled up and its last lane dropped.
    assert vectorized.runs_at_once == 2 and sequential.runs_at_once == 1
    np.testing.assert_allclose(vectorized.sweep_losses, sequential.sweep_losses, rtol=2e-5)
    assert vectorized.best == sequential.best
    np.testing.assert_allclose(vectorized.held_out, sequential.held_out, rtol=2e-5)
    np.testing.assert_allclose(vectorized.train_losses, sequential.train_losses, rtol=2e-5)
    assert len(set(vectorized.sweep_losses)) == 3 and vectorized.held_out.shape == (2, 2)
    assert vectorized.held_out[0, 0] != vectorized.held_out[1, 0]


def test_progress_counts_the_steps_of_all_runs(progress, vectorized):
    assert [done for _, done, _, _ in progress] == [6, 12, 15, 18, 24, 30]
    assert {total for _, _, total, _ in progress} == {30}
    assert [stage for stage, *_ in progress] == ["sweep"] * 4 + ["seeds"] * 2
    assert progress[-1][3] == pytest.approx(vectorized.held_out[:, -1].min())


def test_counters_stay_unbatched_and_the_periodic_branch_a_branch():
    program = Program(TASK, lion_muon, 3)
    lion, adamw = (program.state_axes.opt_state.inner_states[n] for n in ("lion_muon", "adamw"))
    assert lion.inner_state[0].count is None and adamw.inner_state[0].count is None
    assert lion.inner_state[0].mu["head"] == 0 and program.state_axes.params["head"] == 0
    seeds = np.arange(3)
    state = jax.eval_shape(program.begin, np.ones(3, np.float32), seeds)
    tokens = np.stack([batches(seed, 0, 2)["tokens"] for seed in seeds])
    arguments = (np.ones(3, np.float32), state, {"tokens": tokens}, TASK.held_out)
    text = str(jax.make_jaxpr(program.advance)(*arguments))
    assert text.count("cond[") == 1
    assert lion.inner_state[0].mu["table"] == 0


def test_the_standard_error_of_a_run_is_that_of_its_documents():
    """A loss that tells the nats of its targets, and targets of three documents, one masked."""
    documents = np.asarray([[[0, 0, 1], [1, 2, 2]]], np.int32)
    mask = np.asarray([[[1, 1, 1], [1, 1, 0]]], np.float32)
    nats = np.asarray([[0.5, 1.0, 2.0], [1.5, 4.0, 0.0]])

    def loss(params, batch, key):
        told = {"nats": jnp.asarray(nats, jnp.float32)} if "documents" in batch else {}
        return params["w"] ** 2 + nats.sum() / 5, 5.0, told

    task = Task(
        init_params=lambda key: {"w": jax.random.normal(key)},
        loss=loss,
        batches=lambda seed, start, stop: {"x": np.full((stop - start, 2), seed)},
        held_out={"documents": documents, "mask": mask},
        steps=2, evaluate_every=1, tokens_per_step=1,
    )  # fmt: skip
    curves = Program(task, optax.sgd, 2).train([Run(0.1, 0), Run(0.1, 1)])
    wanted = data.standard_error(np.asarray([1.5, 3.5, 4.0]), np.asarray([2, 2, 1]))
    np.testing.assert_allclose(curves.error, [wanted, wanted], rtol=1e-6)
    assert curves.held_out[0, -1] != curves.held_out[1, -1]
    fixed = Program(replace(task, init_seed=5), optax.sgd, 2).train([Run(0.1, 0), Run(0.1, 1)])
    assert fixed.held_out[0, -1] == fixed.held_out[1, -1]


def test_the_order_of_the_text_has_a_seed_of_its_own():
    asked = []

    def noted(seed, start, stop):
        asked.append(seed)
        return batches(seed, start, stop)

    runs = [Run(0.3, 5), Run(0.3, 6)]
    free = Program(TASK, optax.sgd, 2).train(runs)
    fixed = Program(replace(TASK, batches=noted, data_seed=7), optax.sgd, 2).train(runs)
    assert set(asked[1:]) == {7} and np.ptp(fixed.train[:, 0]) > 0  # weights differ as before
    assert (free.train != fixed.train).all()


class Seen(NamedTuple):
    steps: jax.Array
    large: jax.Array


def count_large_gradients():
    """A counter that starts the same in every lane and comes to depend on it."""

    def init(params):
        return Seen(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        large = (jnp.abs(grads["head"]).max() > 0.03).astype(jnp.int32)
        return grads, Seen(state.steps + 1, state.large + large)

    return optax.GradientTransformation(init, update)


def test_a_leaf_that_comes_to_depend_on_its_lane_is_batched():
    def build(rate):
        return optax.chain(count_large_gradients(), optax.sgd(rate))

    axes = Program(TASK, build, 2).state_axes.opt_state[0]
    assert axes.steps is None and axes.large == 0


def test_a_diverged_rate_is_reported_and_never_chosen():
    def build(rate):
        return optax.stateless(lambda g, p: jax.tree.map(lambda g: -g * rate / (rate < 1), g))

    tuned = tune(TASK, build, (0.1, 0.5, 2.0), **SETTINGS)
    assert math.isnan(tuned.sweep_losses[2]) and np.isfinite(tuned.sweep_losses[:2]).all()
    assert tuned.best in (0, 1) and np.isfinite(tuned.held_out).all()
    everywhere = tune(TASK, build, (2.0, 3.0), **SETTINGS)
    assert everywhere.best is None and everywhere.held_out.shape == (0, 2)
    assert everywhere.best_rate is None and everywhere.rim is None
    for result in (tuned, everywhere):
        text = json.dumps(result.to_json(), allow_nan=False)
        assert json.loads(text)["sweep_losses"][-1] is None
        again = Tuned.from_json(json.loads(text))
        np.testing.assert_equal(again.held_out, result.held_out)
        assert json.dumps(again.to_json()) == text


def test_a_group_without_a_finite_run_stops_early():
    calls = []
    task = replace(TASK, batches=lambda *args: calls.append(args) or batches(*args))
    program = Program(task, lambda rate: optax.sgd(rate * jnp.nan), 1, vectorized=False)
    curves = program.train([Run(1.0, 0)])
    assert calls == [(0, 0, 3)]
    assert np.isnan(curves.held_out).all() and np.isfinite(curves.train[0, 0])


@pytest.mark.parametrize(
    ("losses", "rim"), [((1, 2, 3), "lowest"), ((2, 1, 3), None), ((3, 2, 1), "highest")]
)
def test_the_rim_of_a_grid_is_noticed(losses, rim):
    empty = np.zeros((0, 1))
    best = int(np.argmin(losses))
    tuned = Tuned((1.0, 2.0, 3.0), losses, best, (1, 2), (1,), empty, (), (), 1, 0.0, 0.0)
    assert tuned.rim == rim and tuned.to_json()["best_cell_on_rim"] == rim


def heavy(rate):
    """Thirty products of a 128 x 128 matrix on top of a gradient of a few thousand operations."""

    def update(grads, state, params=None):
        x = jnp.full((128, 128), 1e-3) + grads["head"][0, 0]
        x = jax.lax.fori_loop(0, 30, lambda _, x: x @ x, x)
        return jax.tree.map(lambda g: -rate * g + 0 * x[0, 0], grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_the_cost_of_a_step_separates_the_optimizer():
    found = measure_step(TASK, heavy, 0.1, steps=4)
    assert found.step_seconds > found.gradient_seconds > 0
    assert 0.3 < found.optimizer_share < 1
    assert found.optimizer_seconds == found.step_seconds - found.gradient_seconds
    assert found.tokens_per_second == pytest.approx(64 / found.step_seconds)
    size = sum(x.nbytes for x in jax.tree.leaves(TASK.init_params(jax.random.key(0))))
    assert found.peak_bytes > size and found.compile_seconds > 0


def test_as_many_lanes_as_memory_has_room_for(monkeypatch):
    monkeypatch.setattr(cost, "device_memory", lambda: 1000)
    one = functools.partial(StepCost, 1.0, 0.5, 1.0, compile_seconds=0.0)
    assert lanes_that_fit(one(100), 5) == 5
    assert lanes_that_fit(one(200), 5) == 3
    assert lanes_that_fit(one(10**6), 5) == 1
    assert lanes_that_fit(one(None), 5) == 1
    monkeypatch.undo()
    assert cost.device_memory() > 2**28


BAD = {
    "no rates": (lambda: tune(TASK, optax.sgd, (), **SETTINGS), r"rates: got \[\]"),
    "rates": (lambda: tune(TASK, optax.sgd, (2.0, 1.0), **SETTINGS), "rates: got .* that increase"),
    "zero": (lambda: tune(TASK, optax.sgd, (0.0, 1.0), **SETTINGS), "expected positive numbers"),
    "inf": (lambda: tune(TASK, optax.sgd, (1.0, math.inf), **SETTINGS), "rates: got"),
    "one seed": (
        lambda: tune(TASK, optax.sgd, (1.0,), sweep_seed=0, seeds=(1,)),
        "seeds: got .* at least two different ones",
    ),
    "the sweep's seed": (
        lambda: tune(TASK, optax.sgd, (1.0,), sweep_seed=2, seeds=(1, 2)),
        "besides the sweep's 2",
    ),
    "lanes": (lambda: Program(TASK, optax.sgd, 2, vectorized=False), "lanes: got 2"),
    "runs": (
        lambda: Program(TASK, optax.sgd, 1, vectorized=False).train([]),
        "runs: got 0, expected 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_it_imports_where_only_jax_optax_jaxtyping_and_numpy_are_installed():
    code = (
        "import sys, jaxopt_lab.sweep;"
        "heavy = {'flax', 'orbax', 'grain', 'tyro', 'matplotlib', 'rich', 'tokenizers',"
        " 'safetensors', 'tensorflow_datasets'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
