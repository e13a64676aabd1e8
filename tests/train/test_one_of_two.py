"""Two processes, one of which fails or is stopped where the other is not: both end, and say why."""

import itertools
import shutil
import signal
from dataclasses import replace

import pytest

from jaxopt_lab.data import prepare
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.io import digests
from jaxopt_lab.train.run import pretrain
from tests.train.test_agreement import ended
from tests.train.test_processes import start_two
from tests.train.tiny_run import losses_of, tiny_config, write_text

# The command, with something changed in one of the processes.
CHANGED = """
import importlib, os, signal, sys, time
from jaxopt_lab.train.io import stored
from jaxopt_lab.train.loop import Loop

load, save = stored.load, Loop.save

def fail(*arguments, **options):
    raise OSError(28, "No space left on device", "somewhere")

async def fail_later(*arguments, **options):
    fail()

def signalled(loop, step, state):
    save(loop, step, state)
    if step == loop._config.steps:
        os.kill(os.getpid(), signal.SIGTERM)

def fail_to_read_6(path, target, **options):
    found = load(path, target, **options)
    if path.name == "6":
        raise ValueError("cannot be read here")
    return found

def wait(*arguments, **options):
    print("it waits", file=sys.stderr, flush=True)
    time.sleep(600)

def change(module, name, replacement):
    home = importlib.import_module(module)
    *path, name = name.split(".")
    for step in path:
        home = getattr(home, step)
    setattr(home, name, replacement)

if int(sys.argv[sys.argv.index("--distributed.process-id") + 1]) == {number}:
    {change}
from jaxopt_lab import cli
sys.exit(cli.main())
"""


def changed(number, change):
    return ("-c", CHANGED.format(number=number, change=change), "pretrain")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = tiny_config(
            write_text(tmp_path_factory.mktemp("text")), None, steps=6, optimizer=AdamWConfig(),
            mesh=MeshConfig(2), eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
            checkpoint=CheckpointConfig(every_steps=3, keep_newest=5),
        )  # fmt: skip
        prepare(config.corpus, config.tokenizer, validation_fraction=config.validation_fraction)
        yield config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run of one process, with checkpoints after three and six steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(replace(config, run_directory=str(run)))
    return run


@pytest.fixture
def settings(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    return str(path)


SAVING = "orbax.checkpoint.experimental.v1._src.saving.execution"
FAILURES = {
    "digests": 'change("jaxopt_lab.train.io.digests", "seal", fail)',
    "files": f'change("{SAVING}", "_SaveResponse._finalize_save", fail_later)',
    # The part in which the loop waits, before and after the processes have met in it.
    "start": f'change("{SAVING}", "_run_blocking_save", fail_later)',
    "arrays": f'change("{SAVING}", "_SaveResponse.create", fail)',
}


@pytest.mark.parametrize(
    ("where", "number"),
    [("files", 1), ("start", 1), *(
        pytest.param(where, number, marks=pytest.mark.slow)
        for where, number in itertools.product(FAILURES, (0, 1))
        if (where, number) not in (("files", 1), ("start", 1))
    )],
)  # fmt: skip
def test_a_save_that_fails_on_one_ends_both(settings, tmp_path, where, number):
    processes = start_two(settings, tmp_path / "run", program=changed(number, FAILURES[where]))
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [1, 1], "\n".join(outputs)
    for output in outputs:
        # A function of orbax that is replaced leaves a coroutine, of which Python warns at the end.
        last = [line for line in output.splitlines() if "was never awaited" not in line][-1]
        assert "checkpoint 3 could not be written" in last and f"process {number}: " in last


def test_a_checkpoint_that_one_cannot_read_is_passed_over_by_both(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    program = changed(1, 'change("jaxopt_lab.train.io.stored", "load", fail_to_read_6)')
    processes = start_two(None, run, "--resume", program=program)
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "checkpoint 6 is damaged (cannot be read here)" in outputs[0]
    assert "resuming after step 3 of 6" in outputs[0]
    assert losses_of(run).keys() == losses_of(finished).keys()


@pytest.mark.slow
def test_damage_under_new_digests_is_passed_over_by_both(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for file in (run / "checkpoints/6/state").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    digests.seal(run / "checkpoints/6", 6, None)
    processes = start_two(None, run, "--resume")
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "checkpoint 6 is damaged" in outputs[0] and "resuming after step 3" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_during_the_last_save_ends_both_in_the_same_way(settings, tmp_path, number):
    program = changed(number, 'change("jaxopt_lab.train.loop", "Loop.save", signalled)')
    processes = start_two(settings, tmp_path / "run", program=program)
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "stopped and saved; continue with" in outputs[0]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_that_others_wait_for_ends_both(settings, tmp_path, number):
    program = changed(0, 'change("jaxopt_lab.train.text", "data.prepare", wait)')
    processes = start_two(settings, tmp_path / "run", program=program)
    for line in processes[0].stdout:
        if line == "it waits\n":
            processes[0].send_signal(number)
    outputs = ended(processes)
    code = 0 if number == signal.SIGTERM else 130
    assert [process.returncode for process in processes] == [code, code], "\n".join(outputs)
    said = "stopped by process 0: SIGTERM" if not code else "error: interrupted"
    assert outputs[1].splitlines()[-1] == f"jaxopt-lab: {said}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_resume_that_only_one_was_told_is_refused_on_both(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    processes = start_two(str(run / "config.json"), run, of_second=("--resume",))
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [2, 2], "\n".join(outputs)
    named = "resume: got True, on process 1, expected False, which process 0 has"
    assert all(named in output for output in outputs)
