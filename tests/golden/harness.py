"""Find cases, replay each through its family's module, report one line per comparison."""

import importlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Family (name of the folder that holds the case) -> module with `replay(case) -> list[Result]`.
FAMILIES = {
    "adaptive_warmup": "tests.golden.adaptive_warmup",
    "dykaf": "tests.golden.dykaf",
    "dynamics": "tests.golden.dynamics",
    "lion_muon": "tests.golden.lion_muon",
    "lorsum": "tests.golden.lorsum",
    "shampoo": "tests.golden.shampoo",
    "soap": "tests.golden.soap",
    "weight_lora": "tests.golden.weight_lora",
    "zo": "tests.golden.zo",
}


class NotUnderstood(Exception):
    """The case asks for something that the replay does not know; never a silent pass."""


class Case(NamedTuple):
    family: str
    name: str
    sidecar: Mapping
    arrays: Mapping[str, np.ndarray]


class Check(NamedTuple):
    """One comparison: `error` is the largest absolute (or scaled, see `what`) difference."""

    what: str
    error: float
    tolerance: float
    passed: bool

    @classmethod
    def of(cls, what: str, got, wanted, tolerance: float, *, relative: bool = False) -> "Check":
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if got.shape != wanted.shape:
            return cls(f"{what}: shape {got.shape}, expected {wanted.shape}", np.inf, 0.0, False)
        if not np.array_equal(np.isnan(got), np.isnan(wanted)):
            return cls(f"{what}: NaN in different places", np.inf, tolerance, False)
        difference = np.abs(got - wanted)
        if relative:
            difference = difference / np.maximum(np.abs(wanted), np.finfo(np.float64).tiny)
        error = float(np.nanmax(difference, initial=0.0))
        return cls(what, error, tolerance, error <= tolerance)

    @property
    def severity(self) -> tuple[bool, float]:
        return not self.passed, self.error / self.tolerance if self.tolerance else self.error


@dataclass(frozen=True)
class Result:
    """The comparisons behind one printed line."""

    label: str
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        if not self.checks:
            return f"{self.label}  nan  nan  {verdict}  {self.note or 'nothing was compared'}"
        worst = max(self.checks, key=lambda check: check.severity)
        why = "" if self.passed else f"  {worst.what}"
        note = f"  ({self.note})" if self.note else ""
        return f"{self.label}  {worst.error:.2e}  {worst.tolerance:.0e}  {verdict}{why}{note}"


def replay_directory(
    directory: Path, only: str = "", report: Callable[[str], None] = print
) -> bool:
    """Replay the family `only`, or every case whose `family/name` contains it; True if all pass."""
    found = list(find_cases(directory))
    is_family = any(family == only for family, _ in found)
    lines = failed = cases = 0
    for family, stem in found:
        if family != only if is_family else only not in f"{family}/{stem.name}":
            continue
        cases += 1
        for result in replay_case(family, stem):
            report(str(result))
            lines += 1
            failed += not result.passed
    if not cases:
        report(f"no case below {directory}" + (f" matches {only!r}" if only else ""))
    report(f"{cases} cases, {lines} comparisons, {failed} failed")
    return cases > 0 and failed == 0


def find_cases(directory: Path) -> Iterator[tuple[str, Path]]:
    """(family, path without suffix) of every case, also of those that lack one of their files."""
    files = (p for p in directory.resolve().rglob("*") if p.suffix in (".npz", ".json"))
    for stem in sorted({path.with_name(path.name.removesuffix(path.suffix)) for path in files}):
        yield stem.parent.name, stem


def replay_case(family: str, stem: Path) -> list[Result]:
    """Replay one case; whatever goes wrong becomes a failed result with the reason."""
    label = f"{family}/{stem.name}"
    try:
        if family not in FAMILIES:
            raise NotUnderstood(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        case = _load(family, stem)
        return importlib.import_module(FAMILIES[family]).replay(case)
    except NotUnderstood as reason:
        return [Result(label, (), f"not understood: {reason}")]
    except Exception as error:  # noqa: BLE001  (one broken case must not hide the others)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [Result(label, (), reason[:300])]


def _load(family: str, stem: Path) -> Case:
    sidecar_path, arrays_path = (stem.with_name(stem.name + suffix) for suffix in (".json", ".npz"))
    for path in (sidecar_path, arrays_path):
        if not path.is_file():
            raise NotUnderstood(f"{path.name} is missing")
    try:
        sidecar = json.loads(sidecar_path.read_text())
        with arrays_path.open("rb") as file, np.load(file) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise NotUnderstood(f"unreadable: {error}") from error
    return Case(family, stem.name, sidecar, arrays)
