"""Replay of repeated learning: recorded draws, statistics over seeds, densities, mean field."""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxopt_lab.dynamics import repeated_learning as loop
from jaxopt_lab.dynamics.loop import density_family, mean_field, mean_field_window
from tests.golden.dynamics_statistics import cells_agree, means_agree
from tests.golden.harness import Case, Check, NotUnderstood, Result

EXACT = 1e-9
# Where the reference is exactly zero.
ZERO = 1e-12
SIDECAR = {
    *("stat_keys", "cases", "defaults", "arrays", "grid", "replay", "replay_note", "density"),
    *("density_params", "density_psi", "tolerance", "rng", "mean_field", "source", "notes"),
}
DEFAULTS = {"N": 2000, "d": 10, "noise": 1.0, "window": 0.3, "T": 10, "test": 0.2, "alpha": 0.0}
DATA = {"linear": loop.linear_data, "friedman": loop.friedman_data}
# Seeds of ours. What disagrees is run again with the larger number before it counts: a thousand
# comparisons at four standard errors, some of heavy tails, are not all expected to hold.
CASE_SEEDS, GRID_SEEDS = (16, 64), (6, 16)
DENSITY_COLUMNS = "columns t, psi, normal: f(0), mass(kappa), nu2, nu4; uniform: f(0), mass(kappa)"


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    if unknown := set(case.sidecar) - SIDECAR:
        raise NotUnderstood(f"unknown sidecar entries: {', '.join(sorted(unknown))}")
    unknown = set(case.sidecar.get("defaults", {})) - set(DEFAULTS)
    if unknown:
        raise NotUnderstood(f"unknown defaults: {', '.join(sorted(unknown))}")
    label = f"{case.family}/{case.name}"
    parts = (
        *((f"replay{entry['id']}", _recorded(case, entry)) for entry in _entries(case, "replay")),
        *((name, _density(case, name)) for name in sorted(case.arrays) if name.startswith("dens_")),
        *((name, _mean_field(case, name)) for name in _mean_field_tables(case)),
        *_cases(case),
        *_grids(case),
    )
    return [Result(f"{label}/{name}", tuple(checks)) for name, checks in parts]


def _entries(case: Case, name: str) -> list[Any]:
    return case.sidecar.get(name, [])


def _default(case: Case, name: str) -> Any:
    return case.sidecar.get("defaults", {}).get(name, DEFAULTS[name])


@functools.cache
def _learner(alpha: float) -> loop.Learner:
    """The references penalise centred features as they are."""
    return loop.ridge(alpha, standardize=False)


def _recorded(case: Case, entry: dict) -> list[Check]:
    stored = {
        name.removeprefix(f"replay{entry['id']}_"): array
        for name, array in case.arrays.items()
        if name.startswith(f"replay{entry['id']}_")
    }
    draws = loop.RecordedDraws(*(stored[name] for name in ("active0", "ids", "splits", "u", "z")))
    size = stored["active0"].shape[0]
    if math.ceil(entry["n_test"] - 0.5) != entry["n_test"] or not 0 < entry["n_test"] < size:
        raise NotUnderstood(f"n_test {entry['n_test']} of {size} active items")
    played = loop.replay(
        (stored["X"], stored["y"]), _learner(entry["alpha"]), draws, usage=entry["p"],
        adherence=entry["s"], setup=entry["setup"], rule=entry["rule"], refit_every=entry["T"],
        # Any share that rounds up to the number.
        held_out=(entry["n_test"] - 0.5) / size,
    )  # fmt: skip
    got = {
        "coef": np.column_stack(played.params),
        "m": played.scale,
        "residuals": played.residuals,
        "y_active": played.active_targets,
        "labels": played.labels,
    }
    return [_close(name, value, stored[name], 0.0) for name, value in got.items()]


def _close(what: str, got: Any, wanted: np.ndarray, absolute: float) -> Check:
    """Relative to the largest value of the array, where they change sign, else to each value."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    scale = np.abs(wanted) + absolute / EXACT
    if not absolute:
        scale = max(np.abs(wanted).max(initial=0.0), 1e-3)
    return Check.of(what, got / scale, wanted / scale, EXACT)


def _density(case: Case, name: str) -> list[Check]:
    if not case.sidecar.get("density", "").startswith(DENSITY_COLUMNS):
        raise NotUnderstood(f"density {case.sidecar.get('density')!r}")
    parameters = case.sidecar["density_params"]
    half, sigma, kappa = (parameters[key] for key in ("half", "sigma", "kappa"))
    starts = {
        "normal": (density_family.normal_density(sigma), (-14 * sigma, 14 * sigma)),
        "uniform": (density_family.uniform_density(half), (-half, half)),
    }
    table = case.arrays[name]
    psi = _psi(case.sidecar["density_psi"][name.removeprefix("dens_")], table[:, 0])
    checks = [_close("psi", psi, table[:, 1], ZERO)]
    for number, (kind, (density, support)) in enumerate(starts.items()):
        rows = (
            density_family.family_statistics(density, p, support=support, kappa=kappa)
            for p in table[:, 1]
        )
        got = np.array([(row.center, row.mass, *row.moments) for row in rows])
        checks.append(_close(kind, got, table[:, 2 + 4 * number : 6 + 4 * number], ZERO))
    return checks


def _psi(formula: str, times: np.ndarray) -> np.ndarray:
    found = re.fullmatch(r"psi=(?:t|([0-9.]+)\^t)", formula)
    if found is None:
        raise NotUnderstood(f"density_psi {formula!r}")
    return times if found[1] is None else float(found[1]) ** times


def _mean_field_tables(case: Case) -> list[str]:
    axes = {"mf_tau", "mf_s", "mf_window_t", "mf_window_ps"}
    return [name for name in sorted(case.arrays) if name.startswith("mf_") and name not in axes]


def _mean_field(case: Case, name: str) -> list[Check]:
    arrays, start = case.arrays, mean_field.MEAN_ABSOLUTE_NORMAL
    with jax.enable_x64(True):
        if name in ("mf_window_mae", "mf_window_var"):
            rule = "mae" if name == "mf_window_mae" else "var"
            usage, adherence = arrays["mf_window_ps"].T
            window = round(_default(case, "window") * _default(case, "N"))
            path = mean_field_window.window_scale(
                int(arrays["mf_window_t"].max()), window=window, usage=usage,
                gain=mean_field.gain(adherence, rule), start=start if rule == "mae" else 1.0,
            )  # fmt: skip
            got = np.asarray(path)[arrays["mf_window_t"]].T
        elif name.startswith("mf_sampling_"):
            kind, _, rule = name.removeprefix("mf_sampling_").partition("_")
            rule = rule.removesuffix("rule") or "mae"
            if kind not in ("mae", "var") or rule not in ("mae", "var"):
                raise NotUnderstood(f"array {name}")
            scale = mean_field.sampling_scale(
                arrays["mf_tau"], adherence=arrays["mf_s"][:, None], rule=rule
            )
            got = scale.mae if kind == "mae" else scale.variance
        else:
            raise NotUnderstood(f"array {name}")
        return [_close(name, got, arrays[name], ZERO)]


def _cases(case: Case) -> Iterator[tuple[str, list[Check]]]:
    """Cases that differ in p and s alone are one program."""
    groups: dict[tuple, list[dict]] = {}
    for entry in _entries(case, "cases"):
        key = (entry["setup"], entry["data"], entry["rule"], tuple(entry["steps"]))
        groups.setdefault(key, []).append(entry)
    found: dict[int, list[Check]] = {}
    for (setup, data, rule, steps), entries in groups.items():
        settings = {"setup": setup, "rule": rule, "steps": max(steps)}
        for seeds in CASE_SEEDS:
            usage, adherence = (np.array([entry[x] for entry in entries]) for x in ("p", "s"))
            record = _run(case, data, seeds, usage, adherence, steps, settings)
            for number, entry in enumerate(entries):
                mine = jax.tree.map(lambda x: x[number], record.statistics)  # noqa: B023
                rows = np.searchsorted(record.step, steps)
                found[entry["case"]] = means_agree(case, entry, mine, rows)
            entries = [e for e in entries if not all(x.passed for x in found[e["case"]])]
            if not entries:
                break
    for entry in _entries(case, "cases"):
        yield f"case{entry['case']}", found[entry["case"]]


def _grids(case: Case) -> Iterator[tuple[str, list[Check]]]:
    grid = case.sidecar.get("grid", {})
    for setup in ("window", "sampling"):
        name = f"grid_{setup}"
        if name not in case.arrays:
            continue
        usage, adherence = case.arrays["grid_p"], case.arrays["grid_s"][:, None]
        settings = {"setup": setup, "rule": grid["rule"], "steps": grid["step"]}
        checks = []
        for seeds in GRID_SEEDS:
            record = _run(
                case, grid["data"], seeds, usage, adherence, (0, grid["step"]), settings, grid
            )
            checks = [cells_agree(record.statistics.dev[..., -1], case.arrays[name], grid)]
            if checks[0].passed:
                break
        yield name, checks


def _run(
    case: Case, data: str, seeds: int, usage: np.ndarray, adherence: np.ndarray,
    steps: tuple[int, ...], settings: dict, own: dict | None = None,
) -> loop.LoopRecord:  # fmt: skip
    """Runs with fresh data in every seed, recorded at the given steps at least."""
    value = {name: (own or {}).get(name, _default(case, name)) for name in DEFAULTS}
    last = max(steps)
    if data not in DATA or any(step % value["T"] and step != last for step in steps):
        raise NotUnderstood(f"data {data!r}, steps {steps} of rounds of {value['T']}")
    rounds = [step // value["T"] for step in steps if step != last]
    make = functools.partial(
        DATA[data], num_items=value["N"], num_features=value["d"], noise=value["noise"]
    )
    return loop.run_many(
        jax.random.split(jax.random.key(seeds), seeds), make, _learner(value["alpha"]),
        usage=usage, adherence=adherence, refit_every=value["T"], held_out=value["test"],
        window=value["window"], record_every=math.gcd(*rounds) or -(-last // value["T"]) or 1,
        **settings,
    )  # fmt: skip
