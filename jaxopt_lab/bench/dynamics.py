"""Times the two laboratories of learning dynamics on the sizes that their papers use."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab.bench.conditions import device_name, versions
from jaxopt_lab.dynamics.landscape.ensemble import run_ensemble
from jaxopt_lab.dynamics.landscape.systems import mlp
from jaxopt_lab.dynamics.loop.data import linear_data
from jaxopt_lab.dynamics.loop.learners import ridge
from jaxopt_lab.dynamics.loop.run import run_many
from jaxopt_lab.report.tables import format_table

_ROUNDS = 3
# Seconds in which a full-size case must end, compiling apart; on other devices none is set.
_LIMITS = {"loop": {"cpu": 30.0}, "ensemble": {"cpu": 60.0, "gpu": 5.0}}
_SIZES = {"loop": (64, 10_000), "ensemble": (1_000, 500)}
_BATCH_SIZE, _SAMPLES = 64, 2048


@dataclass(frozen=True)
class DynamicsRow:
    """One case."""

    case: str
    replicas: int
    steps: int
    first_seconds: float
    """The first call, tracing and compiling included."""
    seconds: float
    """Median of the later calls."""
    limit_seconds: float | None
    """What `seconds` must stay below; None where no limit is set for the device or the size."""

    @property
    def rate(self) -> float:
        """Steps of all replicas per second."""
        return self.replicas * self.steps / self.seconds

    @property
    def holds(self) -> bool | None:
        """Whether the limit is kept; None without one."""
        return None if self.limit_seconds is None else self.seconds < self.limit_seconds


@dataclass(frozen=True)
class DynamicsReport:
    """Result of `run_dynamics`."""

    device: str
    versions: dict[str, str]
    rows: list[DynamicsRow]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [
            dataclasses.asdict(row) | {"replica_steps_per_second": row.rate, "holds": row.holds}
            for row in self.rows
        ]
        return {"device": self.device, "versions": self.versions, "rows": rows}

    def __str__(self) -> str:
        """A table with the conditions above it."""
        headers = [
            "case",
            "replicas",
            "steps",
            "first s",
            "s",
            "replica-steps/s",
            "limit s",
            "holds",
        ]
        rows = [
            [
                row.case, row.replicas, row.steps, row.first_seconds, row.seconds,
                f"{row.rate:,.0f}", row.limit_seconds, row.holds,
            ]
            for row in self.rows
        ]  # fmt: skip
        return f"{self.device}, jax {self.versions['jax']}\n\n{format_table(headers, rows)}"


def run_dynamics(
    only: str | None = None,
    *,
    sizes: dict[str, tuple[int, int]] | None = None,
    rounds: int = _ROUNDS,
    on_progress: Callable[[str], None] = lambda text: None,
) -> DynamicsReport:
    """Times repeated learning ("loop") and the ensemble of SGD runs ("ensemble"), in float64.

    "loop": sampling update of linear data, 2 000 items, an ordinary least-squares refit every ten
    steps, 64 seeds of 10 000 steps. "ensemble": 1 000 replicas of 500 SGD steps of the MLP-386 on
    random images, batches of 64 from 2 048, projected on all its directions.
    Both are spread over all devices.

    Args:
      only: Name of the one case wanted; None runs both.
      sizes: Replicas (or seeds) and steps by case, instead of the full ones; they have no limit.
      rounds: Calls that are timed after the first.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown case or fewer than one round.
    """
    sizes = _SIZES if sizes is None else sizes
    if only is not None and only not in _CASES:
        raise ValueError(f"only: {only!r} is not one of {', '.join(_CASES)}")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected at least 1")
    rows = []
    for case in _CASES if only is None else (only,):
        replicas, steps = sizes[case]
        run = _CASES[case](replicas, steps)
        seconds: list[float] = []
        for number in range(rounds + 1):
            stage = f"round {number} of {rounds}" if number else "compiling"
            on_progress(f"{case}: {replicas:,} x {steps:,} steps, {stage}")
            start = time.perf_counter()
            run(number)
            seconds.append(time.perf_counter() - start)
        full = sizes[case] == _SIZES[case]
        limit = _LIMITS[case].get(jax.default_backend()) if full else None
        median = float(np.median(seconds[1:]))
        rows.append(DynamicsRow(case, replicas, steps, seconds[0], median, limit))
    return DynamicsReport(device_name(), versions("jax", "jaxlib", "jaxopt-lab"), rows)


def _ensemble(replicas: int, steps: int) -> Callable[[int], Any]:
    random = np.random.default_rng(0)
    images, labels = random.random((_SAMPLES, 28, 28)), random.integers(0, 10, _SAMPLES)
    system = mlp(images, labels)
    with jax.enable_x64(True):
        params = jax.device_get(system.init(jax.random.key(0)))
    directions = np.linalg.qr(random.normal(size=(system.parameters,) * 2))[0]

    def run(seed: int) -> Any:
        return run_ensemble(
            jax.random.key(seed), system.loss, params, system.data, directions=directions,
            learning_rate=0.05, batch_size=_BATCH_SIZE, steps=steps, replicas=replicas,
            record_every=max(d for d in range(1, steps + 1) if steps % d == 0 and d <= 25),
            sharding=_all_devices(),
        )  # fmt: skip

    return run


def _loop(replicas: int, steps: int) -> Callable[[int], Any]:
    learner = ridge(0.0)

    def run(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), replicas)
        record = run_many(
            keys, linear_data, learner, usage=1.0, adherence=3.0, steps=steps,
            sharding=_all_devices(),
        )  # fmt: skip
        return jax.block_until_ready(record.statistics)

    return run


def _all_devices() -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("runs",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("runs"))


_CASES: dict[str, Callable[[int, int], Callable[[int], Any]]] = {
    "loop": _loop,
    "ensemble": _ensemble,
}
