"""Replay of SGD's moments: directions, finite sums, coupled directions, phases, flows, weak steps.

Each section of the sidecar becomes one line. Exact arrays are compared to 1e-9; the stored Monte
Carlo and a small one of our own must agree with them within 4 standard errors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.dynamics.landscape.batches import Sampling
from tests.golden.harness import Case, Check, NotUnderstood, Result

EXACT, VANISHING = 1e-9, 1e-13
FLOW = 1e-6
STANDARD_ERRORS = 4.0
OWN_REPLICAS = (2048, 8192, 65536)
# The stored exponents are Monte Carlo estimates, said to be good to about 0.006.
LYAPUNOV = 0.025
# Values beyond this are stored as nan.
LARGEST = 1e250

NOTES = {"F_note", "tolerance", "note", "notes", "source"}
STARTS = {"off", "crit"}


class Arrays:
    """The arrays of a case, with a record of those that nothing has asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays, self.unused = arrays, set(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise NotUnderstood(f"array {name} is missing")
        self.unused.discard(name)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays


def replay(case: Case) -> list[Result]:
    """All comparisons of one case, one result for each section."""
    unknown = set(case.sidecar) - set(SECTIONS) - NOTES
    if unknown:
        raise NotUnderstood(f"unknown sidecar entries: {', '.join(sorted(unknown))}")
    arrays = Arrays(case.arrays)
    results = []
    with jax.enable_x64(True):
        for name, section in SECTIONS.items():
            if name in case.sidecar:
                label = f"{case.family}/{case.name}[{name}]"
                results.append(Result(label, tuple(section(case.sidecar[name], arrays))))
    if arrays.unused:
        raise NotUnderstood(f"unknown arrays: {', '.join(sorted(arrays.unused))}")
    return results


def directions(section: Mapping[str, Any], arrays: Arrays) -> list[Check]:
    """Single directions: recursion and closed forms, exact and truncated."""
    rows = section["rows"]
    names = {"learning_rate": "eta", "curvature": "lam", "curvature_variance": "Gamma"}
    numbers = {ours: np.array([float(r[stored]) for r in rows]) for ours, stored in names.items()}
    d, start, mean, drift, c = (
        np.array([float(row.get(name, 0)) for row in rows])
        for name in ("d", "P0", "mu0", "gbar", "c")
    )
    checks = [close("rho", 1 + sgd.growth_excess(**numbers), [row["rho"] for row in rows])]
    for key, truncated in (("stationary", False), ("stationary_trunc", True)):
        got = sgd.stationary_variance(**numbers, gradient_variance=d, truncated=truncated)
        wanted = [np.inf if row[key] is None else row[key] for row in rows]
        checks.append(close(key, got, wanted))
    wanted = np.array([row.get("gauss_lyapunov_mc", np.nan) for row in rows], float)
    got = np.where(np.isnan(wanted), np.nan, sgd.gaussian_lyapunov(**numbers))
    checks.append(Check.of("gauss_lyapunov_mc", got, wanted, LYAPUNOV))

    steps = max(len(arrays[f"A{row['id']}_var"]) for row in rows) - 1
    at = jnp.arange(steps + 1)[:, None]
    for suffix, truncated in (("var", False), ("var_trunc", True)):
        path = sgd.direction_moments(
            **numbers,
            steps=steps,
            gradient_variance=d,
            correlation=c,
            drift=drift,
            mean=mean,
            variance=start,
            truncated=truncated,
        )
        closed = sgd.variance_at(
            at, **numbers, gradient_variance=d, mean=mean, variance=start, truncated=truncated
        )
        for i, row in enumerate(rows):
            name = f"A{row['id']}_{suffix}"
            checks.append(close_below_largest(name, path.variance[:, i], arrays[name]))
            if not (row.get("gbar", 0) or row.get("c", 0) and row.get("mu0", 0)):
                what = f"{name} in closed form"
                checks.append(close_below_largest(what, closed[:, i], arrays[name]))
    closed_mean = sgd.mean_at(
        at,
        learning_rate=numbers["learning_rate"],
        curvature=numbers["curvature"],
        drift=drift,
        mean=mean,
    )
    for i, row in enumerate(rows):
        name = f"A{row['id']}_mean"
        checks.append(close_below_largest(name, path.mean[:, i], arrays[name]))
        checks.append(
            close_below_largest(f"{name} in closed form", closed_mean[:, i], arrays[name])
        )
    return checks


def finite_sums(section: Mapping[str, Any], arrays: Arrays) -> list[Check]:
    """A finite sum of quadratics: exact moments, stored and own Monte Carlo, replay of a path."""
    problem = sgd.finite_sum(arrays["B_H"], arrays["B_g"])
    checks = []
    if "lam" in section:
        got = jnp.linalg.eigvalsh(problem.hessians.mean(0))
        checks.append(close("lam", got, np.sort(section["lam"])))
    if "B_replay_w" in arrays:
        stored = arrays["B_replay_w"]
        rate = section.get("replay_eta", section["eta"])
        path = sgd.simulate(problem, jnp.asarray(stored[0]), arrays["B_replay_idx"], rate)
        checks.append(close("B_replay_w", path, stored))
    unused_start = arrays["B_mu0"] if "B_mu0" in arrays else None
    for case in section["cases"]:
        if case["start"] not in STARTS:
            raise NotUnderstood(f"start {case['start']!r}, known: {', '.join(sorted(STARTS))}")
        start = np.zeros(len(problem.gradients[0])) if case["start"] == "crit" else unused_start
        checks += finite_sum_case(problem, section, case, arrays, start)
    return checks


def finite_sum_case(problem, section, case, arrays: Arrays, start) -> list[Check]:
    prefix = f"B{case['k']}"
    options = {"learning_rate": section["eta"], "batch_size": case["B"]}
    mean, covariance = arrays[f"{prefix}_mean"], arrays[f"{prefix}_cov"]
    exact = sgd.moments(
        problem, **options, replace=case["replace"], steps=len(mean) - 1, mean=start
    )
    radius = sgd.second_moment_radius(problem, **options, replace=case["replace"])
    checks = [
        close(f"{prefix}_mean", exact.mean, mean),
        close(f"{prefix}_cov", exact.covariance, covariance),
        close(f"{prefix} spectral_radius", radius, case["spectral_radius"]),
    ]
    at = np.array(section["mc_steps"], int)
    for what, ours in (("mean", exact.mean), ("cov", exact.covariance)):
        stored, error = arrays[f"{prefix}_mc_{what}"], arrays[f"{prefix}_mc_{what}_se"]
        z = standard_errors(stored, ours[at], error)
        checks.append(Check(f"{prefix}_mc_{what} (s.e.)", z, STANDARD_ERRORS, z < STANDARD_ERRORS))
        if f"max_{what}_z" in case and error.all():
            checks.append(close(f"{prefix} max_{what}_z", z, case[f"max_{what}_z"], FLOW))
    sampling = "with_replacement" if case["replace"] else "without_replacement"
    z = own_monte_carlo(problem, exact, at, start, sampling, options)
    checks.append(Check(f"{prefix} own runs (s.e.)", z, STANDARD_ERRORS, z < STANDARD_ERRORS))
    return checks


def own_monte_carlo(problem, exact, at, start, sampling: Sampling, options) -> float:
    """Largest deviation of a small ensemble from the exact moments, in standard errors.

    Among some hundred entries one beyond 4 is not so rare, and curvature noise makes heavy tails:
    a larger sample decides.
    """
    z = np.inf
    for attempt, replicas in enumerate(OWN_REPLICAS):
        runs = sgd.sample_ensemble(
            jax.random.key(attempt),
            problem,
            **options,
            steps=len(exact.mean) - 1,
            replicas=replicas,
            sampling=sampling,
            start=start,
        )[:, at]
        deviations = runs - runs.mean(0)
        products = deviations[..., :, None] * deviations[..., None, :]
        error = 1 / np.sqrt(len(runs))
        z = max(
            standard_errors(runs.mean(0), exact.mean[at], runs.std(0) * error),
            standard_errors(products.mean(0), exact.covariance[at], products.std(0) * error),
        )
        if z < STANDARD_ERRORS:
            break
    return z


def coupled(section: Mapping[str, Any], arrays: Arrays) -> list[Check]:
    """Directions that feed each other."""
    numbers = {
        "learning_rate": section["eta"],
        "curvature": jnp.asarray(arrays["C_lam"]),
        "curvature_variance": jnp.asarray(arrays["C_Gamma"]),
    }
    stored, d = arrays["C_var"], jnp.asarray(arrays["C_d"])
    steps = len(stored) - 1
    path = sgd.coupled_variances(**numbers, gradient_variance=d, steps=steps)
    full = sgd.coupled_covariance(**numbers, gradient_covariance=jnp.diag(d), steps=steps)
    return [
        close("C_var", path.variance, stored),
        close("C_var as matrices", full.covariance, stored[:, :, None] * np.eye(len(d))),
        close("spectral_radius", sgd.coupled_radius(**numbers), section["spectral_radius"]),
    ]


def phases(section: Mapping[str, Any], arrays: Arrays) -> list[Check]:
    """The phase diagram; points on a bound, where rounding decides, are left out of the verdict."""
    eta, gamma, lam = arrays["D_eta"], arrays["D_Gamma"], section["lam"]
    table = sgd.phase_table(eta, gamma, curvature=lam)
    checks = [close("D_rho", table.growth, arrays["D_rho"])]
    for name, got, truncated in (
        ("D_disc_stable", table.stable, False),
        ("D_trunc_stable", table.langevin_stable, True),
    ):
        excess = sgd.growth_excess(eta[:, None], lam, gamma[None], truncated=truncated)
        clear = np.abs(excess) > VANISHING
        checks.append(Check.of(name, got & clear, arrays[name] & clear, 0.0))
    return checks


def flows(section: Mapping[str, Any], arrays: Arrays) -> list[Check]:
    """One Euler step against the standard and the corrected flow."""
    eta, points = arrays["E_eta"], jnp.asarray(arrays["E_points"])

    def gradient(w):
        return section["a"] * w + section["cubic"] * w**2 + section["quartic"] * w**3

    @jax.jit
    def errors(rate):
        step = points - rate * gradient(points)
        drifts = gradient, sgd.corrected_gradient(gradient, rate)
        return jnp.stack([jnp.abs(step - sgd.flow(g, points, rate)).mean() for g in drifts])

    got = jnp.stack([errors(rate) for rate in eta])
    slopes = np.polyfit(np.log(eta), np.log(got), 1)[0]
    return [
        close("E_err", got, arrays["E_err"], FLOW),
        close("slopes", slopes, section["slopes"], FLOW),
    ]


def weak_steps(_: Any, arrays: Arrays) -> list[Check]:
    """Powers of w after one step: exact, raw and centred second order."""
    problem = sgd.finite_sum(arrays["F_h"], arrays["F_g"])
    points, probabilities = jnp.asarray(arrays["F_w"])[:, None], jnp.asarray(arrays["F_prob"])
    stored = arrays["F_table"]

    @jax.jit
    @jax.vmap
    def table(eta):
        laws = points, probabilities, problem
        powers = range(1, stored.shape[1] + 1)
        steps = [sgd.weak_step(lambda w, k=k: w[0] ** k, *laws, learning_rate=eta) for k in powers]
        return jnp.array(steps)

    return [close("F_table", table(jnp.asarray(arrays["F_eta"])), stored)]


SECTIONS: dict[str, Callable[[Any, Arrays], list[Check]]] = {
    "A": directions,
    "B": finite_sums,
    "C": coupled,
    "D": phases,
    "E": flows,
    "F": weak_steps,
}


def close(what: str, got, wanted, tolerance: float = EXACT) -> Check:
    """Relative difference, with `VANISHING` as the absolute one where the exact value is 0."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        return Check.of(what, got, wanted, tolerance)
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        scaled = np.abs(got - wanted) / (np.abs(wanted) + VANISHING / EXACT)
    error = float(np.max(np.where(same, 0.0, scaled), initial=0.0))
    return Check(what, error, tolerance, error <= tolerance)


def close_below_largest(what: str, got, stored) -> Check:
    """`close`, with nan for our values of a magnitude that is stored as nan."""
    got = np.asarray(got, np.float64)[: len(stored)]
    large = np.isnan(stored) & ~(np.abs(got) < LARGEST * (1 - EXACT))
    return close(what, np.where(large, np.nan, got), stored)


def standard_errors(got, wanted, error) -> float:
    """The largest difference in standard errors; rounding alone counts for nothing."""
    difference = np.abs(np.asarray(got) - np.asarray(wanted))
    rounding = VANISHING + EXACT * np.abs(np.asarray(wanted))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference <= rounding, 0.0, difference / np.asarray(error))
    return float(np.max(z, initial=0.0))
