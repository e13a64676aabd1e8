from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.diagnostics import Every
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train import Hook, TrainingError, pretrain
from jaxopt_lab.train.hooks import Hooks, View
from jaxopt_lab.train.io.checkpoints import committed_steps
from tests.train.tiny_run import losses_of, restored, tiny_config


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    config = tiny_config(text, tmp_path_factory.mktemp("runs") / "plain")
    return config, pretrain(config)


def weights(view):
    return {"weight_norm": optax.tree.norm(view.state.params)}


def test_hooks_see_their_steps_and_change_nothing(plain, tmp_path):
    config, result = plain
    seen = []

    def before(view):
        seen.append(("before", view.step, int(view.state.step), sorted(view.batch)))
        assert not view.metrics
        view.batch.clear()
        return {"norm_before": optax.tree.norm(view.state.params), "host": 1}

    def after(view):
        seen.append(("after", view.step, int(view.state.step)))
        assert {"loss", "grad_norm", "rate", "weight"} <= view.metrics.keys()
        view.metrics.clear()

    hooks = [Hook(weights, every=2), Hook(after, every=4), Hook(before, Every(4, (0, 1)), True)]
    pretrain(replace(config, run_directory=str(tmp_path / "run")), hooks=hooks)
    batch = ["signals", "tokens"]
    assert seen == [
        ("before", 1, 0, batch), ("before", 4, 3, batch), ("after", 4, 4), ("before", 5, 4, batch),
    ]  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows if "weight_norm" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if row.get("host") == 1] == [1, 4, 5]
    assert rows[3]["weight_norm"] == rows[4]["norm_before"] != rows[3]["norm_before"]
    assert losses_of(tmp_path / "run") == losses_of(result.directory)


FAILING = {
    "raises": (lambda view: 1 / 0, "ZeroDivisionError: division by zero"),
    "a vector": (lambda view: {"w": jnp.zeros(3)}, "'w' is .* expected a scalar"),
    "text": (lambda view: {"w": "large"}, "'w' is 'large', expected a scalar"),
    "a taken name": (lambda view: {"loss": 1.0}, "'loss' is there already"),
    "the log's name": (lambda view: {"mfu": 1.0}, "'mfu' is there already"),
    "no mapping": (lambda view: 3.0, "AttributeError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_failures_name_the_hook_and_the_step_and_end_its_calls(name):
    measure, message = FAILING[name]
    calls = []
    hooks = Hooks(
        [Hook(measure, 3, name="mine"), Hook(lambda view: calls.append(view.step))], ["mfu"]
    )
    for step in range(1, 6):
        hooks.measure(View(step, None, {"loss": jnp.zeros(())}, {}))
    with pytest.raises(TrainingError, match=f"hook mine failed at step 3: .*{message}.*; saved"):
        hooks.raise_failure("saved")
    assert calls == [1, 2]
    assert hooks.measure(View(6, None, {}, {})) == {}


def test_scalars_of_every_kind_are_taken():
    values = {
        "a": 1, "b": 2.5, "c": True, "d": np.float16(1), "e": jnp.zeros((), jnp.bfloat16),
        "f": np.asarray(3), "g": float("nan"),
    }  # fmt: skip
    hooks = Hooks([Hook(lambda view: values)], [])
    assert hooks.measure(View(1, None, {}, {})).keys() == values.keys() and not hooks.failure


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="hook weights: every: got 0, expected at least 1"):
        Hook(weights, every=0)


def test_a_hook_that_raises_loses_nothing(plain, tmp_path):
    config, result = plain

    def fragile(view):
        raise OSError("the disk of the hook is full")

    run = tmp_path / "run"
    config = replace(config, run_directory=str(run))
    wanted = r"fragile failed at step 2: OSError: the disk of the hook is full; saved after step 3"
    with pytest.raises(TrainingError, match=wanted):
        pretrain(config, hooks=[Hook(fragile, every=2)])
    assert committed_steps(run / "checkpoints") == [3]
    pretrain(replace(config, resume=True))
    assert losses_of(run) == losses_of(result.directory)
    (_, state), (_, other) = restored(config, run), restored(config, result.directory)
    np.testing.assert_array_equal(
        state.params["embedding"]["tokens"], other.params["embedding"]["tokens"]
    )


def test_the_last_step_may_fail_too(plain, tmp_path):
    config = replace(plain[0], run_directory=str(tmp_path / "run"))
    with pytest.raises(TrainingError, match="failed at step 6: ZeroDivisionError.*after step 6"):
        pretrain(config, hooks=[Hook(lambda view: 1 / 0, every=6)])
    assert committed_steps(tmp_path / "run/checkpoints") == [3, 6]
