"""The run of the tests itself: programs are released, limits hold, a lost worker ends it."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests import programs

ROOT = pathlib.Path(__file__).parents[1]


def loaded():
    return len(jax.devices()[0].client.live_executables())


def test_release_drops_programs_and_their_functions_go_on():
    kept = [jax.jit(lambda x, i=i: jnp.sin(x) * i) for i in range(20)]
    programs.release()
    before = loaded()
    wanted = [float(f(1.0)) for f in kept]
    assert loaded() >= before + 20
    most = programs.memory_maps()
    programs.release()
    assert loaded() == before
    if most:
        assert programs.memory_maps() <= most - 20
    assert [float(f(1.0)) for f in kept] == wanted


@pytest.mark.skipif(not programs.memory_maps(), reason="maps are listed on Linux only")
def test_more_maps_than_the_limit_are_refused_with_the_name_of_the_test():
    record = programs.Record(limit=programs.memory_maps() - 1)
    with pytest.raises(programs.TooManyMaps, match=f"^some test: .* limit is {record.limit}"):
        record.measure("some test")
    record = programs.Record()
    record.measure("some test")
    assert 0 < record.maps <= record.limit and record.maps_after == "some test"


def run(directory, *options, **tests):
    """Pytest with the options of this repository on files of its own."""
    for name, source in tests.items():
        (directory / f"test_{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", f"--rootdir={directory}", *options, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


KILLED = "import os, signal\ndef test_killed(): os.kill(os.getpid(), signal.SIGSEGV)\n"


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_worker_fails_the_run_and_names_its_test(tmp_path, lost):
    files = {f"lost{i}": KILLED + "def test_after(): pass\n" for i in range(lost)}
    done = run(tmp_path, **files, fine="def test_fine(): pass\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"worker 'gw\d' crashed while running '.*::test_killed'", done.stdout)
    assert "in test_killed" in done.stderr  # where it was, from faulthandler


def test_a_worker_stuck_outside_of_python_is_ended(tmp_path):
    # No signal handler of Python runs meanwhile, as in a hung compilation.
    stuck = """
        import signal, time
        def test_stuck():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(50)
    """
    source = "\n".join(line.removeprefix("        ") for line in stuck.splitlines())
    done = run(tmp_path, "-o", "timeout=1", "-o", "faulthandler_timeout=3", stuck=source)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"worker 'gw\d' crashed while running '.*::test_stuck'", done.stdout)
