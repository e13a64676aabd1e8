"""How far a reader has to travel: files entered and calls across files in one traced update.

    python -m tests.readability

prints two tables: for one update of each `scale_by_*` on two matrices, at defaults, the files
entered below `optim/` and below `jaxopt_lab/`, and the calls from a function in one of these files
into another file; and the lines of `optim`, `schedules`, `parity` and `core`. Optax's Muon stands
beside them.

A call counts where the innermost function of the library that is running is in another file than
the one that is called; what lies between them (`jax.tree.map`, `lax.cond`) does not matter.
Comprehensions and returns count nothing, so the number is that of Python 3.11 and 3.13 alike.
"""

import concurrent.futures
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import jaxopt_lab as jol

PACKAGE = pathlib.Path(jol.__file__).parent
COUNTED = ("optim", "schedules", "parity", "core")


class Travel(NamedTuple):
    """What one traced update enters."""

    optim_files: int
    files: int
    changes: int


def travel(tx: optax.GradientTransformationExtraArgs, root: pathlib.Path = PACKAGE) -> Travel:
    """Trace one update on two matrices of one shape and count.

    Run it in a process of its own: what JAX has cached is not traced again.
    """
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones((8, 6))}
    state = tx.init(params)
    home = f"{root}/"
    running: list[str] = []
    entered: set[str] = set()
    changes = 0

    def profile(frame, event: str, _argument) -> None:
        nonlocal changes
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(home):
            return
        # Frames of comprehensions exist in Python 3.11 only; a generator is resumed many times.
        if frame.f_code.co_name.endswith(("comp>", "genexpr>")):
            return
        if event == "call":
            changes += bool(running) and running[-1] != path
            running.append(path)
            entered.add(path)
        elif running:
            running.pop()

    sys.setprofile(profile)
    try:
        jax.make_jaxpr(tx.update)(params, state, params)
    finally:
        sys.setprofile(None)
    below = sum(path.startswith(f"{root / 'optim'}/") for path in entered)
    return Travel(below, len(entered), changes)


def _optax_muon() -> Travel:
    layout = optax.contrib.MuonDimensionNumbers()
    tx = optax.contrib.scale_by_muon(weight_dimension_numbers={"a": layout, "b": layout})
    return travel(tx, pathlib.Path(optax.__file__).parent)


MEASURED: dict[str, Callable[[], Travel]] = {
    "scale_by_lion_muon": lambda: travel(jol.scale_by_lion_muon()),
    "scale_by_soap": lambda: travel(jol.scale_by_soap()),
    "scale_by_dykaf": lambda: travel(jol.scale_by_dykaf()),
    "scale_by_shampoo": lambda: travel(jol.scale_by_shampoo()),
    "optax's Muon": _optax_muon,
}


def measure() -> dict[str, Travel]:
    """Every method at its defaults, each in a process that has traced no other."""
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as processes:
        return dict(zip(MEASURED, processes.map(_measured, MEASURED), strict=True))


def _measured(name: str) -> Travel:
    return MEASURED[name]()


def lines() -> dict[str, int]:
    """Lines of the Python files of each package, as `wc -l` counts them."""
    return {
        name: sum(path.read_bytes().count(b"\n") for path in (PACKAGE / name).rglob("*.py"))
        for name in COUNTED
    }


def main() -> None:
    """Print the tables, or with `--json` one object."""
    found, length = measure(), lines()
    if "--json" in sys.argv[1:]:
        travels = {name: row._asdict() for name, row in found.items()}
        print(json.dumps({"travel": travels, "lines": length}))
        return
    print(f"{'one update of':20} {'optim/':>8} {'files':>8} {'changes':>8}")
    for name, row in found.items():
        print(f"{name:20} {row.optim_files:8} {row.files:8} {row.changes:8}")
    print()
    for name, number in length.items():
        print(f"{name:20} {number:8}")
    print(f"{'together':20} {sum(length.values()):8}")


if __name__ == "__main__":
    main()
