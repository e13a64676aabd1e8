"""What a run measures of itself, without waiting for the device."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

_PROCESS = Path("/proc/self/stat")
Item = TypeVar("Item")

PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.05,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
}
"""Dense bfloat16 products with float32 sums, TFLOP/s of one device as JAX counts devices, from the
makers' data sheets; by the beginning of `device_kind`."""


class Peak(NamedTuple):
    """What the model's FLOPs are compared with."""

    tflops: float  # of one device
    source: str


def peak_of(device_kind: str, stated: float | None = None) -> Peak | None:
    """The peak of a device: what the user states, else the data sheet's, or None.

    >>> peak_of("NVIDIA H100 80GB HBM3").tflops, peak_of("TPU v5 lite").tflops
    (989.4, 197.0)
    >>> peak_of("cpu") is None, peak_of("cpu", 0.1).source
    (True, 'stated')
    """
    if stated is not None:
        return Peak(stated, "stated")
    words = device_kind.split()
    # A slice of a device has a share of its peak that its name does not tell.
    if "MIG" in words:
        return None
    for length in range(len(words), 1, -1):
        beginning = " ".join(words[:length])
        # The A100's form factor is joined to its name: A100-SXM4-80GB, A100 80GB PCIe.
        for name in (beginning, beginning.partition("-")[0]):
            if name in PEAK_TFLOPS:
                return Peak(PEAK_TFLOPS[name], "data sheet, dense bfloat16")
    return None


class Meter:
    """Times the steps of a loop that reads the metrics of each step after it dispatched the next.

    Such a read returns when its step has been computed, so the time between two of them is that of
    a step, as long as the device has the next one to go on with; nothing is synchronised for the
    measurement. It contains whatever the step waited for: data, hooks, and copies for a checkpoint
    that is written beside training. Evaluations and saves themselves are left out (`pause`).

    Args:
      clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Starts nothing yet."""
        self._clock = clock
        self._since: float | None = None
        self._waited = 0.0
        self._all_seconds, self._all_waited = 0.0, 0.0

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time of all steps in which the loop waited for a batch; None before any."""
        return self._all_waited / self._all_seconds if self._all_seconds else None

    def begin(self) -> None:
        """A step begins: its time counts from here, unless one before it is still being timed."""
        if self._since is None:
            self._since, self._waited = self._clock(), 0.0

    def pause(self) -> None:
        """Something else than steps follows."""
        self._since = None

    def next_of(self, batches: Iterator[Item]) -> Item:
        """The next batch; the wait for it is counted."""
        before = self._clock()
        batch = next(batches)
        self._waited += self._clock() - before
        return batch

    def step_done(self) -> dict[str, float]:
        """Call when the metrics of a step have been read.

        Returns:
          `step_seconds`; `data_wait_seconds`, the part of them in which the loop waited for the
          batch that comes next; and where the devices count it `peak_memory_bytes`: the most that
          any device of this process has held so far, evaluations included.
        """
        now, since, waited = self._clock(), self._since, self._waited
        self._since, self._waited = now, 0.0
        if since is None:
            return peak_memory()
        self._all_seconds += now - since
        self._all_waited += waited
        return {"step_seconds": now - since, "data_wait_seconds": waited, **peak_memory()}


class StartClock:
    """What the time from the start of a command to its first step went to.

    Args:
      began: When it began, in seconds of the clock; now by default.
      clock: Seconds, monotonic.

    >>> clock = StartClock(0.0, iter([1.5, 4.0]).__next__)
    >>> clock.lap("devices")
    >>> clock.lap("compile")
    >>> print(clock)
    4.0 s: devices 1.5, compile 2.5
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.monotonic):
        """Starts the first lap."""
        self._clock, self._last = clock, clock() if began is None else began
        self.seconds: dict[str, float] = {}

    @classmethod
    def of_process(cls, first: str) -> "StartClock":
        """A clock that began with the process, whose time so far is the lap `first`."""
        clock = cls(time.monotonic() - _process_age())
        clock.lap(first)
        return clock

    def lap(self, name: str) -> None:
        """The time since the last call, or since the beginning, went to this."""
        now = self._clock()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        """The sum and its parts."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def _process_age() -> float:
    """Seconds since this process began; 0 where the kernel does not tell."""
    try:
        ticks = int(_PROCESS.read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return 0.0
    return max(age, 0.0)


def peak_memory() -> dict[str, float]:
    """The most that any device of this process has held so far, where the devices count it."""
    found: list[Any] = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}
