"""`python -m tests.devices`: the mesh tests on the GPUs, TPUs or CPU devices that are present.

Parity of one step with one device for every optimizer on data, fsdp and tensor meshes, Auto and
Explicit; zero-order probes and adapters on several devices, with their speed; a run resumed on
another mesh; a run stopped by SIGTERM. Prints a table, and exits with 1 if something failed. On a
CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes devices.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Two processes share the devices for a moment; neither may take all memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Decompositions for many CPU devices wait for each other where threads are few.
os.environ.setdefault("PJRT_NPROC", str(max(32, os.cpu_count() or 1)))

from jaxopt_lab.report.tables import format_table
from tests.devices import runs

Row = tuple[str, str, str, str]  # what, where, result, detail


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.devices", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the name of a row, say soap or fsdp")
    options = parser.parse_args(arguments)
    rows = []
    start = time.perf_counter()
    for row in _rows(options.only):
        rows.append(row)
        sys.stderr.write(f"{time.perf_counter() - start:7.1f} s  {'  '.join(row)}\n")
    failed = sum(row[2] != "ok" for row in rows)
    print(format_table(["test", "mesh", "result", ""], rows))
    print(f"\n{_devices()}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed or not rows else 0


def _rows(only: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        if only in "SIGTERM":  # before this process takes the devices
            yield _run("SIGTERM", "all on data", runs.sigterm, _new(base, "sigterm"))
        import jax

        from tests.devices import forward, parity  # ask for the devices

        devices = jax.device_count()
        os.environ["JAXOPT_LAB_CACHE"] = str(base / "cache")
        for name, (first, second) in runs.resumes(devices).items():
            if only in f"resume {name}":
                place = _new(base, name.replace(" ", "-"))
                yield _run("resume", name, runs.resume_on_another_mesh, place, first, second)
        for name, test in forward.KINDS.items():
            if only in name:
                yield _run(name, f"{devices}, Auto", lambda test: _spread(test(devices)), test)
        for optimizer in parity.OPTIMIZERS:
            for axis in parity.SPECS:
                for kind in parity.KINDS:
                    if only in f"{optimizer} {axis} {kind.name}":
                        yield _run(
                            optimizer,
                            f"{axis} {devices}, {kind.name}",
                            lambda *case: _parity(parity.parity(*case, devices)),
                            optimizer,
                            axis,
                            kind,
                        )


def _parity(result: Any) -> str:
    text = f"{result.difference:.1e}, at most {result.limit:.0e}"
    return f"={text}" if result.passed else text


def _spread(result: Any) -> str:
    text = (
        f"{result.difference:.1e}, at most {result.limit:.0e}; {1e6 * result.megabytes:,.0f} bytes "
        f"travel; {result.speed:.2f} times the work a second"
    )
    return f"={text}" if result.passed else text


def _run(name: str, where: str, test: Callable[..., str], *arguments: Any) -> Row:
    """A row from a test that returns its problem; after '=' comes a remark on a success."""
    try:
        problem = test(*arguments)
    except Exception as error:  # the others still run
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    passed = not problem or problem.startswith("=")
    return name, where, "ok" if passed else "FAILED", problem.removeprefix("=")


def _new(base: Path, name: str) -> Path:
    (base / name).mkdir()
    return base / name


def _devices() -> str:
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


if __name__ == "__main__":
    sys.exit(main())
