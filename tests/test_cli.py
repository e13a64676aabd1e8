import os
import platform
import subprocess
import sys

import pytest

from jaxopt_lab import cli, verbs
from jaxopt_lab.data import Mixture, PythonSource, TextFiles
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.optimizers import AdamWConfig, LionMuonConfig
from jaxopt_lab.train.config.run import PretrainConfig, from_preset
from jaxopt_lab.train.config.schedules import WsdConfig
from jaxopt_lab.train.config.serialize import to_json


def parsed(text):
    return parse_config(text.split(), "pretrain")


def test_no_flags_are_the_defaults():
    assert parsed("") == PretrainConfig() == from_preset("tiny")


def test_named_choices_and_nested_flags():
    config = parsed(
        "--optimizer lion-muon --optimizer.period 5 --schedule wsd --schedule.decay-fraction 0.3 "
        "--model tiny --model.depth 6 --corpus text-files --corpus.paths a/*.txt b.md "
        "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 1 --dry-run --profile 4:3 --clip None "
        "--checkpoint.every-minutes 5 --optimizer.learning_rate=0.5"
    )
    assert config.optimizer == LionMuonConfig(period=5, learning_rate=0.5, b2=0.95)
    assert config.schedule == WsdConfig(decay_fraction=0.3)
    assert config.model.depth == 6 and config.corpus == TextFiles(("a/*.txt", "b.md"))
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (2, 2, 1)
    assert config.dry_run and config.profile == "4:3" and config.clip is None
    assert config.checkpoint.every_minutes == 5.0


def test_order_of_names_and_flags_does_not_matter():
    a = parsed("--optimizer.b1 0.8 --optimizer adamw")
    assert a.optimizer == AdamWConfig(1e-3, b1=0.8)


def test_presets_bring_their_tokenizer():
    config = parsed("--model gpt2-124m")
    assert config.preset == "gpt2-124m" and config.tokenizer.vocab_size == 50304


def test_rates_follow_the_preset_until_they_are_given():
    assert parsed("--model gpt2-124m").optimizer == LionMuonConfig(1e-3, sign_lr_ratio=1 / 60)
    assert parsed("--optimizer adamw --model gpt2-124m").optimizer == AdamWConfig(5e-4)
    given = parsed("--model gpt2-124m --optimizer.learning-rate 0.5")
    assert given.optimizer.learning_rate == 0.5
    assert from_preset("gpt2-124m").optimizer == LionMuonConfig(1e-3, sign_lr_ratio=1 / 60)


def test_short_forms():
    config = parsed("--precision bfloat16 --document-mask --diagnostics norms")
    assert config.model.compute_dtype == "bfloat16" and config.model.document_mask
    assert config.diagnostics.record == ("norms",)


def test_switches_and_settings_without_a_value():
    config = parsed("--model.no-tied --no-tensorboard")
    assert not config.model.tied and not config.tensorboard
    config = parsed("--dry-run --clip None --corpus.roots a b --steps 3 --steps 4")
    assert config.dry_run and config.clip is None and config.steps == 4
    assert config.corpus == PythonSource(("a", "b"))


def test_never_spectral():
    assert parsed("--optimizer.period inf").optimizer == LionMuonConfig(period="inf", b2=0.95)


def test_a_mixture_on_the_command_line():
    config = parsed(
        "--corpus mixture --corpus.parts python-source:stdlib,/src text-files:n/*.md "
        "--corpus.weights 3 1 --steps 7"
    )
    parts = (PythonSource(("stdlib", "/src")), TextFiles(("n/*.md",)))
    assert config.corpus == Mixture(parts, (3.0, 1.0)) and config.steps == 7


def test_a_file_gives_the_defaults_and_flags_change_them(tmp_path):
    path = tmp_path / "config.json"
    saved = parsed("--optimizer adamw --optimizer.b1 0.7 --steps 9 --model.width 128")
    path.write_text(to_json(saved))
    assert parsed(f"--config {path}") == saved
    changed = parsed(f"--config {path} --steps 10 --optimizer adamw")
    assert changed.steps == 10 and changed.optimizer == AdamWConfig(1e-3, b1=0.7)
    assert parsed(f"--config {path} --optimizer lion-muon").optimizer == LionMuonConfig(b2=0.95)


BAD = {
    "--optimizer nope": "optimizer: got 'nope', expected one of lion-muon",
    "--model nope": "model: got 'nope', expected one of tiny",
    "--schedule nope": "schedule: got 'nope', expected one of cosine",
    "--corpus nope": "corpus: got 'nope', expected one of python-source",
    "--optimizer.period 0": "optimizer.period: got 0, expected at least 1",
    "--optimizer.period -2": "optimizer.period",
    "--optimizer.period 1.5": "optimizer.period",
    "--optimizer.learning-rate nan": "optimizer.learning_rate: got nan",
    "--optimizer adamw --optimizer.period 3": "--optimizer.period",
    "--distributed.heartbeat-timeout-seconds 0": "distributed.heartbeat_timeout_seconds: got 0",
    "--steps 0": "steps: got 0",
    "--optimizer adamw --diagnostics norms": "diagnostics.record: got ('norms',), expected an "
    "optimizer of the LionMuon family, not AdamWConfig",
    "--diagnostics.every 0": "diagnostics.every: got 0",
    "--diagnostics.residues -1": "diagnostics.residues: got (-1,)",
    "--diagnostics nope": "--diagnostics.record",
    "--steps many": "--steps",
    "--model.width 7": "heads: got 4, wanted a divisor of width = 7",
    "--mesh.data 64": "mesh: got 'data 64",
    "--batch-size 7 --mesh.data 2": "batch_size: got 7, expected a multiple",
    "--no-such-flag": "--no-such-flag",
    "--eval.evry 3": "--eval.evry: got '3', but there is no such setting; did you mean every?",
    "steps 3": "arguments: got 'steps', expected a flag",
    "--steps 3 4": "--steps: expected one value, got 3 4",
    "--steps=": "--steps: got '', expected int",
    "--mesh 3": "--mesh: got '3', expected flags of its settings",
    "--clip none": "--clip: got 'none', expected float or None",
    "--no-steps": "--no-steps",
    "--dry-run yes": "--dry-run: got 'yes', expected no value here",
    "--resume runs/a": "--resume: got 'runs/a', expected no value here",
    "--config.x 3": "--config.x",
    "--optimizer": "--optimizer: expected a value",
    "--resume": "run_directory",
    "--config /no/such/file.json": "config: got '/no/such/file.json'",
    "--corpus mixture --corpus.parts web:x": "corpus.parts: got 'web:x'",
    "--corpus mixture": "corpus: ",
    "--corpus text-files --corpus.paths /no/such/*.txt": "corpus: ",
    "--corpus text-files": "corpus: ",
    "--corpus mixture --corpus.parts text-files:a --corpus.weights ab": "corpus.weights: got 'ab'",
    "--optimizer.ns-steps 0": "optimizer.ns_steps: got 0, expected at least 1 and at most 100",
    "--optimizer.sign-lr-ratio -1": "optimizer.sign_lr_ratio: got -1.0",
    "--optimizer adamw --optimizer.eps -1": "optimizer.eps: got -1.0, expected at least 0",
    "--optimizer signum --optimizer.momentum 1": "optimizer.momentum: got 1.0",
    "--model.context 1": "model.context: got 1, expected at least 2",
    "--model.param-dtype float64": "model: param_dtype: got float64",
    "--model.tied nan": "--model.tied: got 'nan'",
    "--clip inf": "clip: got inf, expected a finite number",
    "--z-loss 1e400": "z_loss: got inf, expected a finite number",
    "--seed 1180591620717411303424": "seed: got 1180591620717411303424, expected at least 0",
    "--distributed.num-processes 0": "distributed.num_processes: got 0",
    "--steps 1000000000000": "steps: got 1000000000000, expected at most 2147483647",
    "--batch-size 1000000000": "batch_size: got 1000000000, expected less: a device needs at least",
    "--model.vocab-size 1000000000": "model.vocab_size: got 1000000000, expected less: a device",
    "--model.width 10000000": "model.width: got 10000000, expected less: a device needs at least",
    "--model.depth 1000000000": "model.depth: got 1000000000, expected less: a device needs",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", *arguments.split()]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in err if "error:" in line]
    assert len(errors) == 1 and errors == err[-1:]
    assert errors[0].startswith("jaxopt-lab: error: ") and BAD[arguments] in errors[0]


def test_unknown_verbs(capsys):
    assert cli.main(["fly"]) == 2
    assert "unknown verb 'fly', expected one of pretrain" in capsys.readouterr().err


def test_help_of_pretrain_lists_choices_and_documents_fields(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for word in ("lion-muon", "optax-muon", "wsd", "gpt2-720m", "text-files", "--mesh.fsdp",
                 "Optimizer steps", "A spectral step every so many steps"):  # fmt: skip
        assert word in out
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--optimizer", "adamw", "--help"])
    out = capsys.readouterr().out
    assert "--optimizer.eps" in out and "--optimizer.period" not in out


def test_describe_prints_the_routing_table(capsys):
    assert cli.main(["describe", "--model.depth", "2"]) == 0
    out = capsys.readouterr().out
    assert "lion_muon" in out and "adamw" in out and "2x256x3x256" in out


def test_the_cpu_runtime_gets_threads_enough_for_concurrent_decompositions(monkeypatch, capsys):
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert cli.main(["data"]) == 2
    assert os.environ["PJRT_NPROC"] == "3"
    monkeypatch.delenv("PJRT_NPROC")
    assert cli.main(["data"]) == 2
    assert int(os.environ["PJRT_NPROC"]) >= 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again_without_page_faults():
    # A process of its own: the allocator belongs to all of this one. Another thread, as XLA's are.
    program = """
import resource, threading
from jaxopt_lab import verbs
verbs.keep_freed_memory()
size = 2**26  # not folded into a constant
def fill():
    for _ in range(4):
        b"x" * size
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
run()
before = faults()
run()
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) < 1000, done  # 65536 without


def test_plot_of_nothing_is_an_error(capsys, tmp_path):
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err


def test_data_needs_a_subcommand(capsys):
    assert cli.main(["data"]) == 2
    assert "data list" in capsys.readouterr().err


def test_the_overview_lists_verbs_and_imports_no_heavy_room():
    code = (
        "import sys; from jaxopt_lab.cli import main; code = main(['--help']);"
        "heavy = {'flax', 'orbax', 'grain', 'tyro', 'matplotlib', 'rich', 'tokenizers'};"
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pretrain" in result.stdout and "bench" in result.stdout
    assert result.stdout.strip().endswith("[]")


def test_a_reader_that_has_gone_is_no_failure():
    code = "import sys; from jaxopt_lab.cli import main; sys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (result.returncode, result.stderr) == (141, "")


def test_another_broken_pipe_is_no_closed_output(monkeypatch, capfd):
    def fails(*arguments):
        raise BrokenPipeError("a worker process")

    monkeypatch.setattr(verbs, "_run", fails)
    with pytest.raises(BrokenPipeError, match="a worker process"):
        cli.main([])
