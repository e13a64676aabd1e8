"""Runs that tune a given model: what moves, what is kept, what a resumed run shares with one that
was never stopped, and what is refused."""

import contextlib
import functools
import json
import os
import pathlib
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxopt_lab import lora, models
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.tasks import Task
from jaxopt_lab.train import ConfigError, export_run, finetune, load_params
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.base import digest, read_base
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.optimizer_base import ModelInfo
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.config.trainable import HeadConfig
from jaxopt_lab.train.dist import mesh as meshes
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.io.run_directory import read_config
from jaxopt_lab.train.io.stored import checkpoint_path, read_item, read_leaves
from jaxopt_lab.train.program import build_program, compile_step
from jaxopt_lab.train.step import SIGNALS
from jaxopt_lab.train.trainable import part
from tests.train.tiny_finetune import MODEL, finetune_config, write_base
from tests.train.tiny_run import Killed

BERT = pathlib.Path(__file__).parents[1] / "models" / "data" / "bert"
LORA = "--trainable lora --trainable.rank 2 --trainable.target q_proj v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model"))


def losses_of(directory):
    return {row["step"]: row["loss"] for row in read_metrics(directory) if "loss" in row}


def stored_leaves(directory, step):
    return read_item(checkpoint_path(directory, step), "leaves")


def checkpoint(config, step):
    """What moves, with its optimizer state, and what stands beside them."""
    stored = read_item(checkpoint_path(config.run_directory, step), "data")
    spec = lora.spec_from_json(stored["adapters"]) if "adapters" in stored else None
    state = build_program(config, spec=spec).step.abstract_state
    target = {"params": state.params, "opt_state": state.opt_state}
    host = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), target)
    return read_leaves(config.run_directory, step, host), stored


def stopped_and_resumed(config, at, tmp_path):
    """The same run, stopped by a signal during step `at` and started again."""

    def stop(step, state, metrics, batch):
        if step == at and os.getpid() == pid:
            os.kill(pid, signal.SIGTERM)

    pid, directory = os.getpid(), str(tmp_path / "stopped")
    first = finetune(replace(config, run_directory=directory), callbacks=[stop])
    assert first.status == "terminated"
    assert max(committed_steps(tmp_path / "stopped" / "checkpoints")) < config.steps
    flags = ["--resume", "--run-directory", directory]
    return finetune(parse_config(flags, "finetune", FinetuneConfig))


RUNS = {
    "lora": f"{LORA} --trainable.dropout 0.5 --trainable.whole final_norm",
    "weight-lora": f"{LORA} --optimizer weight-lora --optimizer.keep 1 --optimizer.freeze-after 2",
    "scaled-lorsum": f"{LORA} --optimizer scaled-lorsum --accumulation 2",
    "pissa": f"{LORA} --trainable.init pissa",
    "olora": f"{LORA} --trainable.init olora",
}
# The starts from the kernel share their path with the others, and compile for as long.
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in ("pissa", "olora") else n for n in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_bit_for_bit(name, base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "whole", RUNS[name])
    whole, again = finetune(config), stopped_and_resumed(config, 3, tmp_path)
    assert whole.status == again.status == "finished"
    losses = losses_of(whole.directory)
    assert losses == losses_of(again.directory)
    assert len(set(losses.values())) == 6  # something has moved
    told = ("trainable_parameters", "adapter_hash", "model_hash", "validation_loss", "best_step")
    assert {n: whole.summary[n] for n in told} == {n: again.summary[n] for n in told}
    kept, stored = checkpoint(replace(config, run_directory=whole.directory), 6)
    other, _ = checkpoint(replace(config, run_directory=again.directory), 6)
    jax.tree.map(np.testing.assert_array_equal, kept, other)
    assert stored["model"] == whole.summary["model_hash"]
    if name == "weight-lora":
        _check_pruned(config, whole)
    if name in ("pissa", "olora"):
        _check_base(config, whole)


def _check_base(config, result):
    """Trained beside a smaller kernel; what is left stands beside the kernel as it was read."""
    first, *_ = (r["validation_loss"] for r in read_metrics(result.directory) if r["step"] == 0)
    params = jax.tree.map(jax.numpy.asarray, read_base(config, config.model).params)
    names = models.matrix_axes(config.model), models.matrix_names(config.model)
    adapters, spec = lora.load(result.directory / "adapter", params, *names)
    assert [entry.rank for entry in spec.adapters] == [4]  # of 2
    _, merged, _ = load_params(result.directory, step="best")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, lora.merge(params, adapters, spec), merged)
    kernel = [tree["layers"]["attention"]["qkv"]["kernel"] for tree in (params, merged)]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-4
    # The first evaluation is that of the base.
    plain = replace(
        config,
        run_directory=f"{result.directory}-plain",
        steps=1,
        trainable=replace(config.trainable, init="default"),
    )
    finetune(plain)
    wanted, *_ = (r["validation_loss"] for r in read_metrics(plain.run_directory) if r["step"] == 0)
    assert first == pytest.approx(wanted, rel=1e-5)


def _check_pruned(config, result):
    """After the freeze there are fewer adapters in the program, and in what is written."""
    assert result.summary["trainable_parameters"] == 2 * 32 + 1
    (row,) = map(json.loads, (result.directory / "selection.jsonl").read_text().splitlines())
    assert row["step"] == 2 and len(row["adapters"]) == 1
    specs = [checkpoint(config, step)[1]["adapters"] for step in (2, 6)]
    assert [len(spec["adapters"][0]["kept"]) for spec in specs] == [2, 1]
    peft = json.loads((result.directory / "adapter" / "adapter_config.json").read_text())
    assert peft["target_modules"] == list(row["adapters"])


OTHER_RUNS = {
    "full": ("--trainable full", models.parameter_count(MODEL)),
    "head, lion-muon": (
        "--trainable head --trainable.modules mlp.down --optimizer lion-muon",
        16 * 24,
    ),
    "dora, lora-plus": (
        "--trainable dora --trainable.rank 2 --trainable.target o_proj --optimizer lora-plus",
        2 * 32 + 16,
    ),
    "weight-lora-plus": (
        f"{LORA} --optimizer weight-lora-plus --optimizer.every 2 --optimizer.halvings 1",
        4 * 32 + 1,
    ),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_what_moves_and_how_are_two_choices(name, base, text, tmp_path):
    flags, count = OTHER_RUNS[name]
    result = finetune(finetune_config(base, text, tmp_path / "run", flags, "--steps 4"))
    assert result.summary["trainable_parameters"] == count
    assert len(set(losses_of(result.directory).values())) == 4


def test_only_what_moves_is_written(base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "run", LORA, "--steps 3")
    summary = finetune(config).summary
    shapes = [shape for _, shape, _ in stored_leaves(tmp_path / "run", 3)]
    # Two adapters of 2 x (16 + 16) numbers, AdamW's two moments; nothing of the model.
    assert sorted(s for s in shapes if s) == sorted(3 * [[2, 16, 2], [2, 2, 16]] + [[2]])
    assert summary["trainable_parameters"] == 128
    assert summary["trainable_share"] == 128 / models.parameter_count(MODEL)
    params = jax.tree.map(jax.numpy.asarray, read_base(config, config.model).params)
    found, spec = lora.load(
        tmp_path / "run" / "adapter", params,
        models.matrix_axes(config.model), models.matrix_names(config.model),
    )  # fmt: skip
    kept, _ = checkpoint(config, summary["best_step"])
    jax.tree.map(np.testing.assert_array_equal, found, kept["params"])
    assert digest(kept["params"]) == summary["adapter_hash"]
    # The merged model, as `export` writes it and others read it.
    _, merged, _ = load_params(tmp_path / "run", step="best")
    export_run(tmp_path / "run", tmp_path / "exported", step="best")
    _, exported = models.load_huggingface(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, exported, merged)
    wanted = lora.merge(params, found, spec)
    jax.tree.map(np.testing.assert_array_equal, merged, wanted)
    assert not np.array_equal(
        merged["layers"]["attention"]["qkv"]["kernel"],
        params["layers"]["attention"]["qkv"]["kernel"],
    )


def test_no_gradient_state_or_reduction_of_what_is_frozen(base, text, tmp_path):
    """On two devices the step reduces the gradients of the adapters and nothing of the model."""
    config = finetune_config(base, text, tmp_path / "run", LORA, "--mesh.data 2")
    program = build_program(config)
    state = program.step.abstract_state
    kernels = {leaf.shape for leaf in jax.tree.leaves(state.frozen) if leaf.ndim > 1}
    moving = jax.tree.leaves((state.params, state.opt_state))
    assert kernels and not kernels & {leaf.shape for leaf in moving}
    reduced = collectives(compile_step(config, program).as_text())
    assert set(reduced) == {"all-reduce"}
    assert reduced["all-reduce"].bytes < 4 * (128 + 32)
    full = replace(config, trainable=parse_trainable("full"))
    whole = collectives(compile_step(full, build_program(full)).as_text())
    assert whole["all-reduce"].bytes > 4 * models.parameter_count(MODEL)


def test_frozen_kernels_are_held_as_they_are_multiplied(base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "run", LORA, "--precision bfloat16")
    state = build_program(config).step.abstract_state
    dtypes = jax.tree.map(lambda x: str(x.dtype), state.frozen.base)
    assert set(jax.tree.leaves([dtypes["layers"][n] for n in ("attention", "mlp")])) == {"bfloat16"}
    assert dtypes["embedding"] == {"tokens": "float32"}  # rows are gathered before the cast
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.slow  # compiles three steps
def test_steps_on_eight_devices(base, text, tmp_path):
    """Values are those of one device, and adapters bring no gather that the model does not have."""
    alone = finetune_config(base, text, tmp_path / "run", LORA)
    spread = replace(alone, mesh=replace(alone.mesh, fsdp=4, tensor=2))
    values, gathers = [], []
    for config in (alone, spread):
        program = build_program(config)
        compiled = compile_step(config, program)
        gathers.append(collectives(compiled.as_text()).get("all-gather"))
        tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, 256, "int32")
        batch = {"tokens": jax.device_put(tokens, meshes.batch_sharding(program.mesh))}
        state, losses = program.step.init(jax.random.key(1)), []
        for _ in range(3):
            state, metrics = compiled(state, batch | {SIGNALS: meshes.flags(program.mesh, (0, 0))})
            losses.append(float(metrics["loss"]))
        values.append((losses, jax.tree.map(np.asarray, state.params)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *values)
    assert values[0][0][2] < values[0][0][0]  # something has moved
    # A gradient of all parameters gathers the same kernels, for the same products. What comes on
    # top is less than the smallest kernel, of 1,024 bytes: the 128 numbers of the adapters.
    full = replace(spread, trainable=parse_trainable("full"))
    whole = collectives(compile_step(full, build_program(full)).as_text())["all-gather"]
    assert gathers[0] is None and gathers[1].bytes <= whole.bytes + 4 * 128


def parse_trainable(name):
    return parse_config(["--trainable", name], "finetune", FinetuneConfig).trainable


def test_other_weights_are_refused_by_name(base, text, tmp_path):
    other = write_base(tmp_path, seed=6)
    config = finetune_config(other, text, tmp_path / "run", LORA, "--steps 3")
    finetune(config)
    write_base(tmp_path / "new", seed=7)
    weights = "model.safetensors"
    os.replace(tmp_path / "new" / "base" / weights, tmp_path / "base" / weights)
    with pytest.raises(ConfigError, match="^model: got '[0-9a-f]{64}', but the run to resume was"):
        finetune(
            replace(
                read_config(tmp_path / "run"),
                resume=True,
                steps=6,
                run_directory=str(tmp_path / "run"),
            )
        )
    assert committed_steps(tmp_path / "run" / "checkpoints") == [3]  # it is as good as before
    with pytest.raises(ConfigError, match="^model: "):
        load_params(tmp_path / "run")


def test_a_fork_starts_from_the_adapters_of_another_run(base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "run", LORA, "--steps 3")
    finetune(config)
    flags = ["--fork-from", str(tmp_path / "run"), "--run-directory", str(tmp_path / "fork")]
    fork = parse_config([*flags, "--optimizer.learning-rate", "1e-4"], "finetune", FinetuneConfig)
    seen = []

    def look(step, state, metrics, batch):
        if not seen:
            seen.append(float(metrics["loss"]))
            raise Killed

    with pytest.raises(Killed):
        finetune(fork, callbacks=[look])
    assert fork.trainable == config.trainable
    rows = [r for r in read_metrics(tmp_path / "fork") if "validation_loss" in r]
    last = [r for r in read_metrics(tmp_path / "run") if r["step"] == 3 and "validation_loss" in r]
    assert rows[0]["validation_loss"] == last[0]["validation_loss"]


WRONG = {
    "--trainable.target q_porj": r"^trainable: LoraConfig.target: 'q_porj' matches nothing; there "
    r"are .*q_proj",
    "--trainable.rank 17": r"^trainable: .*got rank 17, wanted at most 16",
    "--optimizer weight-lora --optimizer.freeze-after 6": r"^optimizer.freeze_after: got 6, "
    r"expected less than steps = 6",
    "--trainable.init pissa --optimizer weight-lora": r"^trainable.init: got 'pissa', expected",
    "--trainable full --optimizer scaled-lorsum": r"^optimizer: got 'scaled-lorsum', .*--trainable "
    r"lora",
    "--trainable dora --optimizer lorsum": r"^optimizer: got 'lorsum'",
    "--trainable head": r"^trainable: got 'head', but the head of this model is its token embed",
    "--trainable head --trainable.modules mpl": r"^trainable.modules: got 'mpl', expected some",
    "--optimizer scaled-lorsum --schedule adaptive-warmup --schedule.target-loss 3": r"^schedule: ",
    "--model.vocab-size 200": r"^model.vocab_size: got 200, expected at least the 257 entries",
    "--model.width 32": r"^model: got .*which has other arrays",
}


@pytest.mark.parametrize("flags", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_compiled(flags, base, text, tmp_path):
    chosen = [] if "--trainable " in flags else ["--trainable lora"]
    config = finetune_config(base, text, tmp_path / "run", *chosen, flags)

    with pytest.raises(ConfigError, match=WRONG[flags]), no_compilation():
        finetune(config)
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def no_compilation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxopt_lab.train.run.compiled_step", lambda *a: pytest.fail("compiled"))
        yield


def test_absent_models_and_tasks_are_refused_with_the_command(monkeypatch, tmp_path, text, base):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"^model: minilm: .*`jaxopt-lab data fetch minilm`"):
        parse_config(["--model", "minilm"], "finetune", FinetuneConfig)
    with pytest.raises(ConfigError, match="^model: got 'nowhere', expected a directory with conf"):
        parse_config(["--model", "nowhere"], "finetune", FinetuneConfig)
    flags = ["--model", base, "--task", "movie-sentences"]
    config = parse_config(flags, "finetune", FinetuneConfig)
    with pytest.raises(ConfigError, match="^task: .*`jaxopt-lab data fetch movie-sentences`"):
        finetune(replace(config, run_directory=str(tmp_path / "run")))


def test_pair_optimizers_need_finetune(text, tmp_path):
    from jaxopt_lab.train import pretrain
    from tests.train.tiny_run import tiny_config

    config = parse_config(["--optimizer", "weight-lora"], "pretrain")
    config = replace(tiny_config(text, tmp_path / "run"), optimizer=config.optimizer)
    with pytest.raises(ConfigError, match="^optimizer: got 'weight-lora', which moves pairs"):
        pretrain(config)


def test_the_configuration_comes_back(base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "run", RUNS["weight-lora"])
    assert from_json(to_json(config), FinetuneConfig) == config
    with pytest.raises(ConfigError, match="^run_directory: got .*which is a run of finetune"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(to_json(config))
        parse_config(["--resume", "--run-directory", str(tmp_path / "run")], "pretrain")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A BERT with a vocabulary of a few words, and texts whose first word says the label."""
    directory = tmp_path_factory.mktemp("labels")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "a", "film", "plot", "cast"]
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((BERT / name).read_bytes())
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join([("bad", "good")[n % 2], *rng.choice(words[6:], 5)]), "label": n % 2}
        for n in range(300)
    ]
    rows = {row["text"]: row for row in rows}.values()
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(directory / "cache"))
        yield directory


def test_labels_are_learnt_and_tested_once(labels, tmp_path):
    flags = (
        f"--model {labels} --task labelled-files --task.train {labels / 'rows.jsonl'} --steps 40 "
        "--length 10 --batch-size 8 --mesh.data 1 --eval.every 10 --checkpoint.every-steps 10 "
        "--trainable.target up --trainable.rank 2 --optimizer.learning-rate 3e-2 --no-tensorboard"
    )
    config = parse_config(flags.split(), "finetune", FinetuneConfig)
    directory = str(tmp_path / "run")
    half = finetune(replace(config, steps=20, run_directory=directory)).summary
    again = parse_config(
        ["--resume", "--run-directory", directory, "--steps", "40"], "finetune", FinetuneConfig
    )
    summary = finetune(again).summary
    # The head and three adapters beside kernels of 16 x 24.
    assert summary["trainable_parameters"] == 3 * 2 * (16 + 24) + 2 * 16 + 2
    assert summary["model_hash"] == half["model_hash"]
    told = [summary[f"test_{n}"] for n in ("majority_accuracy", "accuracy_low", "accuracy")]
    assert told == sorted(told) and told[-1] < summary["test_accuracy_high"]
    answers = json.loads((tmp_path / "run" / "test.json").read_text())
    assert np.mean(answers["correct"]) == summary["test_accuracy"]
    assert len(answers["ids"]) == summary["test_rows"]
    rows = read_metrics(tmp_path / "run")
    losses = {r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r}
    assert summary["best_step"] == min(losses, key=losses.get) and len(losses) == 5
    assert not any(name.startswith("test") for row in rows for name in row)
    with pytest.raises(ConfigError, match="^run_directory: .*learnt labels"):
        load_params(tmp_path / "run")


def test_labels_that_a_model_cannot_read(labels, base, tmp_path):
    task = f"--task labelled-files --task.train {labels / 'rows.jsonl'}"
    for flags, message in {
        f"--model {labels} --task text-files": "^model: got .*which is an encoder",
        f"--model {labels} {task} --length 13": "^length: got 13, expected at most 12",
        f"--model {base} {task}": "^model: .*' terrible' is 9 tokens",
    }.items():
        config = parse_config(flags.split(), "finetune", FinetuneConfig)
        with pytest.raises(ConfigError, match=message), no_compilation():
            finetune(replace(config, run_directory=str(tmp_path / "run")))


def test_the_head_of_a_task_moves_with_its_bias():
    leaf = jax.ShapeDtypeStruct((2,), np.float32)
    params = {"head": {"kernel": leaf, "bias": leaf}, "norm": {"bias": leaf}}
    roles = {"head": {"kernel": "head", "bias": "bias"}, "norm": {"bias": "bias"}}
    task = Task(lambda key: params, lambda *given: given, params, {}, heads=("head",))
    trained = part(HeadConfig(), task, ModelInfo(params, params, decays=params), roles)
    assert trained.moves == {"head": {"kernel": True, "bias": True}, "norm": {"bias": False}}


def test_a_corpus_may_have_a_prompt_of_its_own():
    config = parse_config(["--task", "movie-sentences"], "finetune", FinetuneConfig)
    assert config.chosen_prompt.words == ("negative", "positive")
    given = ["--task", "movie-sentences", "--prompt.words", "bad", "good"]
    config = parse_config(given, "finetune", FinetuneConfig)
    assert config.chosen_prompt == config.prompt and config.prompt.words == ("bad", "good")
    assert parse_config([], "finetune", FinetuneConfig).chosen_prompt.words[0] == "terrible"
