"""Compiled programs of a test process: their release, and a limit on the memory maps they take.

A compiled CPU program takes tens of memory maps, and Linux grants a process 65 530
(`vm.max_map_count`). JAX keeps every program it has compiled; at the kernel's limit XLA does not
report an error, the process dies of a segmentation fault in the middle of a compilation.
"""

import gc
import pathlib
import sys

MAPS_LIMIT = 20_000

_MAPS = pathlib.Path("/proc/self/maps")


class TooManyMaps(Exception):
    """A test process holds more memory maps than it may."""


def memory_maps() -> int:
    """Number of memory maps of this process; 0 where the system does not list them."""
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0


def threads() -> int:
    """Number of threads of this process; 0 where the system does not list them."""
    tasks = pathlib.Path("/proc/self/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.exists() else 0


def release() -> None:
    """Drop every compiled program that nothing but JAX's own caches holds.

    Functions made by `jax.jit` stay usable, also those that a test module keeps in a
    `functools.cache`: their next call compiles again. Results of `.lower(...).compile()` live as
    long as what refers to them.
    """
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()  # programs sit in reference cycles with the closures they were traced from


class Record:
    """The most maps and threads seen in one process, and the test after which they were seen."""

    def __init__(self, limit: int = MAPS_LIMIT):
        self.limit = limit
        self.maps, self.maps_after = 0, ""
        self.threads, self.threads_after = 0, ""

    def measure(self, test: str) -> None:
        """Look at this process after `test`, and raise `TooManyMaps` above the limit."""
        maps, alive = memory_maps(), threads()
        if maps > self.maps:
            self.maps, self.maps_after = maps, test
        if alive > self.threads:
            self.threads, self.threads_after = alive, test
        if maps > self.limit:
            raise TooManyMaps(
                f"{test}: the process holds {maps} memory maps, the limit is {self.limit}. Compile "
                "fewer programs, share them, or call `tests.programs.release` between them."
            )
