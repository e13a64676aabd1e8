"""Rehearses training on a pod without one: compiles the programs, each in a process of its own."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxopt_lab.bench.methods import method
from jaxopt_lab.bench.pod_programs import (
    COMPILES,
    LORA,
    MODELS,
    PROBE,
    TRACES,
    ZEROTH_ORDER,
    Case,
)
from jaxopt_lab.bench.pod_time import CHIPS, Time, step_time
from jaxopt_lab.report.tables import format_table

DEFAULT_MODELS = ("gpt2-720m", "llama-7b")
DEFAULT_METHODS = ("adamw", "lion_muon_p2", "soap_f10", "dykaf_f10")
DEFAULT_TARGETS = ("v5e:8x8", "v5e:16x16", "cpu:512")
# Sequences a chip, and what is recomputed. Where it is not said: eight, and nothing.
_ROWS = {"llama-7b": (1, "full")}
_GROUPS = 4
_SECONDS_BETWEEN_LINES = 30
_GIB = 2**30


@dataclass(frozen=True)
class PodRow:
    """One program, or why there is none."""

    case: Case
    found: Mapping[str, Any] | None
    """What was compiled, as `pod_programs.compile_case` returns it."""
    failure: str | None = None

    @property
    def period(self) -> int:
        """Steps after which the cost of a step repeats."""
        name = self.case.method
        return 1 if name in (LORA, ZEROTH_ORDER) else method(name).period

    def mean(self, of: Callable[[Mapping[str, Any]], float]) -> float:
        """Over the steps of a period, one of which does more."""
        assert self.found is not None
        more, ordinary = of(self.found["periodic"]), of(self.found["ordinary"])
        return (more + (self.period - 1) * ordinary) / self.period

    @property
    def time(self) -> Time | None:
        """Least time of a step on average; None for a CPU, or where nothing was compiled."""
        if not self.compiled or self.case.target.startswith("cpu"):
            return None
        assert self.found is not None
        return step_time(self.found, self.case.target, self.mean)

    @property
    def compiled(self) -> bool:
        """Whether there is a program, and not its trace alone."""
        return self.found is not None and "temp_bytes" in self.found


@dataclass(frozen=True)
class PodReport:
    """Result of `run_pod`."""

    rows: tuple[PodRow, ...]

    @property
    def failed(self) -> bool:
        """Whether a program was not compiled."""
        return any(row.failure is not None for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "rows": [
                dataclasses.asdict(row) | {"time": row.time and row.time._asdict()}
                for row in self.rows
            ]
        }

    def __str__(self) -> str:
        """A table, with what was not compiled below it."""
        headers = [
            "model", "method", "on", "arguments GiB", "evenly GiB", "TFLOP", "temp GiB",
            "sent GB", "collectives", "at least ms", "compute", "HBM", "link", "compile s", "CPU s",
        ]  # fmt: skip
        rows = [_cells(row) for row in self.rows if row.found is not None]
        failed = [f"{row.case.name}: {row.failure}" for row in self.rows if row.failure]
        return "\n\n".join([*([format_table(headers, rows)] if rows else []), *failed])


def _cells(row: PodRow) -> list[Any]:
    found, took, case = row.found, row.time, row.case
    assert found is not None
    of_program: list[Any] = [None] * 9
    if row.compiled:
        kinds = found["ordinary"]["collectives"]
        sent = row.mean(lambda step: sum(kind["sent"] for kind in step["collectives"].values()))
        times = (None,) * 4
        if took is not None:
            times = (took.at_least, took.compute, took.memory, took.link)
        of_program = [
            round(found["temp_bytes"] / _GIB, 2),
            round(sent / 1e9, 2),
            ", ".join(f"{each['count']:.0f} {kind}" for kind, each in kinds.items()),
            *(None if x is None else round(1e3 * x, 1) for x in times),
            round(found["compile_s"]),
            round(found["cpu_s"]),
        ]
    return [
        case.model,
        case.method,
        case.target,
        round(found["argument_bytes"] / _GIB, 3),
        round(found["state_bytes"] / math.prod(case.mesh.values()) / _GIB, 3),
        round(row.mean(lambda step: step["flops"]) / 1e12, 1),
        *of_program,
    ]


def run_pod(
    names: Sequence[str] = DEFAULT_MODELS,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    targets: Sequence[str] = DEFAULT_TARGETS,
    mesh: Mapping[str, int] | None = None,
    batch_per_device: int | None = None,
    context: int | None = None,
    remat: str | None = None,
    results: Path = Path("pod"),
    libtpu: Path | None = None,
    compiles: bool = True,
    on_progress: Callable[[str], None] = lambda text: None,
) -> PodReport:
    """Compiles training steps for chips that are not there, and predicts their time.

    Layers are scanned, products take bfloat16, gradients are clipped and steps guarded, as
    `pretrain` has it. Every program is compiled in a process of its own, one after the other; what
    it needs is kept in `results` beside its text, and taken from there the next time.

    Args:
      names: Of the models: "llama-7b" or a named decoder.
      methods: As `bench.methods.method` knows them; "lora" for adapters beside a frozen base,
        "mezo" for probes on groups of chips.
      targets: Topologies such as v5e:8x8, or cpu:512 for simulated devices.
      mesh: Size of each axis among data, fsdp, tensor and probe; None: all chips along fsdp, in
        four groups of probes for "mezo".
      batch_per_device: Sequences a chip; None: 8, or 1 at 7B.
      context: Tokens a sequence; None: the model's.
      remat: What the backward pass recomputes; None: nothing, or whole layers at 7B.
      results: Directory, made where there is none.
      libtpu: Directory with the TPU compiler; None: where it is installed.
      compiles: False traces the steps alone, which takes seconds: arguments and products.
      on_progress: Called with a line of text every half minute.

    Raises:
      ValueError: For a name that is unknown, a mesh that does not have as many devices as a target,
        or a TPU compiler that is not there.
    """
    cases = [
        _case(name, each, target, mesh, batch_per_device, context, remat)
        for name in names
        for target in targets
        for each in methods
    ]
    library = None
    if compiles and any(not case.target.startswith("cpu") for case in cases):
        library = find_libtpu(libtpu)
    results.mkdir(parents=True, exist_ok=True)
    work = COMPILES if compiles else TRACES
    return PodReport(tuple(_row(case, results, library, work, on_progress) for case in cases))


def _case(
    name: str,
    chosen: str,
    target: str,
    mesh: Mapping[str, int] | None,
    batch_per_device: int | None,
    context: int | None,
    remat: str | None,
) -> Case:
    if name not in MODELS:
        raise ValueError(f"model: {name!r} is not one of {', '.join(MODELS)}")
    if chosen not in (LORA, ZEROTH_ORDER):
        method(chosen)
    if batch_per_device is not None and batch_per_device < 1:
        raise ValueError(f"batch_per_device: got {batch_per_device}, wanted at least 1")
    chips = chips_of(target)
    rows, recomputed = _ROWS.get(name, (8, "none"))
    if mesh is None:
        probes = {PROBE: _GROUPS} if chosen == ZEROTH_ORDER else {}
        mesh = {**probes, "data": 1, "fsdp": chips // math.prod(probes.values())}
    known = {"data", "fsdp", "tensor"} | ({PROBE} if chosen == ZEROTH_ORDER else set())
    if unknown := mesh.keys() - known:
        raise ValueError(f"mesh: {sorted(unknown)} not among {', '.join(sorted(known))}")
    if math.prod(mesh.values()) != chips:
        text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ValueError(
            f"mesh: {text} has {math.prod(mesh.values())} devices, {target} has {chips} chips"
        )
    if chosen == ZEROTH_ORDER and PROBE not in mesh:
        raise ValueError(f"mesh: {dict(mesh)} has no axis {PROBE!r}, which {chosen} needs")
    config = dataclasses.replace(
        MODELS[name], context=context or MODELS[name].context, remat=remat or recomputed
    )
    return Case(
        model=name,
        method=chosen,
        target=target,
        mesh=dict(mesh),
        batch_per_device=rows if batch_per_device is None else batch_per_device,
        context=config.context,
        remat=config.remat,
    )


def chips_of(target: str) -> int:
    """Chips of a target.

    >>> chips_of("v5e:8x8"), chips_of("cpu:512")
    (64, 512)

    Raises:
      ValueError: If it is none.
    """
    kind, _, shape = target.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return int(shape)
    if kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return math.prod(map(int, shape.split("x")))
    raise ValueError(
        f"target: {target!r} is no topology; wanted, say, v5e:8x8, v5p:4x4x4, v6e:16x16 or cpu:512"
    )


def find_libtpu(directory: Path | None = None) -> Path:
    """The library of the TPU compiler.

    Args:
      directory: Where `pip install --target` has put it; None: where Python finds it.

    Raises:
      ValueError: If it is not there; says how to get it.
    """
    if directory is not None:
        found = directory / "libtpu" / "libtpu.so"
    else:
        spec = importlib.util.find_spec("libtpu")
        places = spec.submodule_search_locations if spec is not None else None
        found = Path(next(iter(places)), "libtpu.so") if places else None
    if found is None or not found.is_file():
        given = "is not installed" if directory is None else f"is not in {directory}"
        raise ValueError(
            f"libtpu, the TPU compiler, {given}: pip install --no-deps --target libtpu "
            f"'{wanted_libtpu()}', and give --libtpu libtpu"
        )
    return found.absolute()


def wanted_libtpu() -> str:
    """What jax asks for where it runs on TPUs."""
    wanted = importlib.metadata.requires("jax") or []
    return next((x.partition(";")[0].strip() for x in wanted if x.startswith("libtpu")), "libtpu")


def _row(
    case: Case,
    results: Path,
    library: Path | None,
    work: str,
    on_progress: Callable[[str], None],
) -> PodRow:
    path = results / f"{case.name}.{'json' if work == COMPILES else 'trace.json'}"
    if path.exists():
        on_progress(f"{case.name}: taken from {path}")
    else:
        code = _run(case, path, library, work, on_progress)
        if code or not path.exists():
            return PodRow(case, None, _reason(code, path.with_suffix(".log")))
    return PodRow(case, json.loads(path.read_text(encoding="utf-8")))


def _run(
    case: Case,
    path: Path,
    library: Path | None,
    work: str,
    on_progress: Callable[[str], None],
) -> int:
    """The exit status of the process that compiles or traces."""
    command = [sys.executable, "-m", "jaxopt_lab.bench.pod_programs"]
    command += [json.dumps(dataclasses.asdict(case)), str(path), work]
    start = time.monotonic()
    on_progress(f"{case.name}: started")
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=_environment(library), stdout=log, stderr=log)
        try:
            while True:
                try:
                    return process.wait(_SECONDS_BETWEEN_LINES)
                except subprocess.TimeoutExpired:
                    on_progress(f"{case.name}: {time.monotonic() - start:.0f} s")
        finally:
            process.kill()
            process.wait()


def _environment(library: Path | None) -> dict[str, str]:
    """What stands in the environment before jax starts."""
    environment = dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",  # no TPU is looked for
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the time to compile is measured
    }
    if library is not None:
        environment |= {
            "TPU_LIBRARY_PATH": str(library),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-256",
            "TPU_WORKER_HOSTNAMES": "localhost",
            # The library keeps others from a chip by a lock, which compiling does not need.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return environment


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"ended by signal {-code}; 9 is what too little memory gives"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"{lines[-1] if lines else f'exit status {code}'} (all of it in {log})"
