"""Replay of methods that run Adam in eigenbases of Kronecker factors: SOAP and DyKAF.

One compiled scan serves all comparisons of a case: after each step, the state may be overwritten
by what is stored. With the first bases alone that is the free run, with nothing the run without
injection, and with everything wherever something is stored it is a series of single steps.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.optim.eigenbasis_transform import EigenbasisAdamState
from jaxopt_lab.optim.mode_factors import ModeSoapState
from tests.golden.harness import Case, Check, NotUnderstood, Result
from tests.golden.trajectory import find_states
from tests.reference.soap import merged, rotate, rotate_back

Values = dict[str, Any]  # names of the stored arrays -> arrays; one dict a parameter

SIDECAR = {
    *("method", "source", "factor_update", "dtype", "precision_note", "torch", "T", "seed"),
    *("hyperparameters", "hyperparameter_notes", "spec_options", "lr_schedule", "note", "params"),
    "how_to_compare",
}
HYPERPARAMETERS = {
    *("lr", "betas", "shampoo_beta", "eps", "weight_decay", "precondition_frequency"),
    *("max_precond_dim", "merge_dims", "precondition_1d", "normalize_grads", "data_format"),
    "correct_bias",
}
OPTIONS = {"f", "b", "skip_first_step"}
ARRAY = re.compile(r"param_init|grads|params|exp_avg|exp_avg_sq|l|r|factor\d|Q\d|Q\d_steps")
# The sidecars of the two dtypes name these for single steps.
ONE_STEP_TOLERANCE = {"float64": 1e-11, "float32": 1e-4}
# A column of the Q of X is compared where the diagonal of its R is above this share of the largest
# (the column is then determined to about the reciprocal times the rounding), to this tolerance.
COLUMN_SHARE = {"float64": 1e-4, "float32": 3e-2}
COLUMN_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


class Recipe(NamedTuple):
    """How a user builds the optimizer of a case."""

    factory: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]  # static
    numbers: Mapping[str, float]  # traced, so that cases share a compiled scan


class Run(NamedTuple):
    params: dict[str, np.ndarray]  # (T, *shape)
    states: dict[str, Values]  # (T, ...)


def check_understood(case: Case, method: str, hyperparameters: set[str], options: set[str]) -> None:
    """Raise `NotUnderstood` for anything in sidecar or arrays that the replay would ignore."""
    sidecar, h, o = case.sidecar, case.sidecar["hyperparameters"], case.sidecar["spec_options"]
    for what, found, known in (
        ("sidecar entries", sidecar, SIDECAR),
        ("hyperparameters", h, HYPERPARAMETERS | hyperparameters),
        ("spec_options", o, OPTIONS | options),
    ):
        if set(found) != known:
            raise NotUnderstood(f"{what}: {', '.join(sorted(set(found) ^ known))}")
    b = h["betas"][1] if h["shampoo_beta"] < 0 else h["shampoo_beta"]
    for name, found, wanted in (
        ("method", sidecar["method"], method),
        ("f", o["f"], h["precondition_frequency"]),
        ("b", o["b"], b),
        ("skip_first_step", o["skip_first_step"], True),
    ):
        if found != wanted:
            raise NotUnderstood(f"{name} is {found!r}, expected {wanted!r}")
    if sidecar["dtype"] not in ONE_STEP_TOLERANCE:
        raise NotUnderstood(f"dtype {sidecar['dtype']}")
    four_axes = any(len(info["shape"]) == 4 for info in sidecar["params"].values())
    if h["data_format"] != "channels_first" and four_axes:
        raise NotUnderstood(f"data_format {h['data_format']}")
    for name in case.arrays:
        p, _, array = name.rpartition("/")
        if name != "state_steps" and not (p in sidecar["params"] and ARRAY.fullmatch(array)):
            raise NotUnderstood(f"unknown array {name}")


def common_options(case: Case, orthogonalizer: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The options of a recipe that both methods have: static ones and numbers."""
    h = case.sidecar["hyperparameters"]
    options = {
        "factor_decay": case.sidecar["spec_options"]["b"],  # 1 changes the rule
        "max_precond_dim": h["max_precond_dim"],
        "merge_dims": h["merge_dims"],
        "precondition_1d": h["precondition_1d"],
        "normalize_grads": h["normalize_grads"],
        "correct_bias": h["correct_bias"],
        "skip_first_step": True,
        "decay_after_step": True,
        "on_uncovered": "modes",
        "orthogonalizer": orthogonalizer,
    }
    numbers = {
        "b1": h["betas"][0],
        "b2": h["betas"][1],
        "eps": h["eps"],
        "weight_decay": h["weight_decay"],
        "precondition_frequency": h["precondition_frequency"],
    }
    return options, numbers


def compare(case: Case, recipe: Callable[[Case, str], Recipe]) -> list[Result]:
    """All comparisons of one case; `recipe` takes the orthogonaliser."""
    label = f"{case.family}/{case.name}"
    with jax.enable_x64(case.sidecar["dtype"] == "float64"):
        stored = _Stored(case)
        checks = _one_step(case, stored, recipe(case, "householder"))
        infos = case.sidecar["params"]
        free = [p for p, info in infos.items() if info["free_run_ok"]]
        if free:
            checks += _free_run(case, stored, recipe(case, "householder"), free, states=True)
        closed = [p for p, info in infos.items() if info["no_injection_ok"]]
        if closed:
            run = _run_case(case, stored, recipe(case, "householder"), inject=None)
            for p in closed:
                tolerance = case.sidecar["params"][p]["no_injection_tol"]
                wanted = case.arrays[f"{p}/params"]
                checks.append(
                    Check.of(f"{p}/params, no injection", run.params[p], wanted, tolerance)
                )
        results = [Result(label, tuple(checks), "" if free else "single steps only")]
        if free:
            panels = _free_run(case, stored, recipe(case, "panels"), free, states=False)
            results.append(Result(f"{label}[panels]", tuple(panels)))
    return results


class _Stored:
    """The stored trajectory, spread over all T steps."""

    def __init__(self, case: Case):
        sidecar = case.sidecar
        self.dtype = np.dtype(sidecar["dtype"])
        self.length = sidecar["T"]
        self.steps = np.asarray(case.arrays["state_steps"])
        self.b1 = sidecar["hyperparameters"]["betas"][0]
        self.in_basis = sidecar["method"] == "soap"
        limit = sidecar["hyperparameters"]["max_precond_dim"]
        merging = sidecar["hyperparameters"]["merge_dims"]
        self.shapes = {
            p: merged(tuple(info["shape"]), limit) if merging else tuple(info["shape"])
            for p, info in sidecar["params"].items()
        }
        self.arrays = {p: self._of(case, p) for p in sidecar["params"]}
        self.values = {p: self._spread(p) for p in sidecar["params"]}

    def _of(self, case: Case, p: str) -> Values:
        prefix = f"{p}/"
        arrays = {k.removeprefix(prefix): v for k, v in case.arrays.items() if k.startswith(prefix)}
        shape = tuple(case.sidecar["params"][p]["shape"])
        for name in ("param_init", "grads", "params"):
            if name not in arrays:
                raise NotUnderstood(f"array {prefix}{name} is missing")
        if arrays["grads"].shape != (self.length, *shape):
            raise NotUnderstood(f"{prefix}grads has shape {arrays['grads'].shape}")
        return arrays

    def bases(self, p: str, t: int) -> list[np.ndarray | None]:
        """The bases in force after step t (from 1), one entry an axis."""
        bases = []
        for k in range(len(self.shapes[p])):
            if f"Q{k}" not in self.arrays[p]:
                bases.append(None)
                continue
            index = np.searchsorted(self.arrays[p][f"Q{k}_steps"], t, side="right") - 1
            bases.append(self.arrays[p][f"Q{k}"][index])
        return bases

    def momentum(self, p: str) -> np.ndarray:
        """(T, *merged shape) the first moment in the basis of the parameters."""
        grads = np.asarray(self.arrays[p]["grads"], np.float64)
        out = np.zeros((self.length, *self.shapes[p]))
        for t in range(1, self.length):
            out[t] = self.b1 * out[t - 1] + (1 - self.b1) * grads[t].reshape(self.shapes[p])
        return out

    def _spread(self, p: str) -> Values:
        """Arrays with T rows, meaningful after the stored steps; bases after every step."""
        arrays, at = self.arrays[p], self.steps - 1
        values = {}
        for name in arrays:
            if re.fullmatch(r"exp_avg_sq|l|r|factor\d", name):
                values[name] = np.zeros((self.length, *arrays[name].shape[1:]), self.dtype)
                values[name][at] = arrays[name]
        bases = [self.bases(p, t) for t in range(1, self.length + 1)]
        for k, q in enumerate(bases[0]):
            if q is not None:
                values[f"Q{k}"] = np.stack([row[k] for row in bases]).astype(self.dtype)
        shape = arrays["grads"].shape
        rotated = map(rotate, self.momentum(p), bases)
        values["mu"] = np.stack(list(rotated)).reshape(shape).astype(self.dtype)
        if self.in_basis:  # stored as such
            values["mu"][at] = arrays["exp_avg"]
        return values


def _run_case(case: Case, stored: _Stored, recipe: Recipe, *, inject: str | None) -> Run:
    """Run with nothing overwritten (None), "bases" after step 1, or "everything" stored."""
    h, T = case.sidecar["hyperparameters"], stored.length
    rates = case.sidecar["lr_schedule"] or [h["lr"]] * T
    if len(rates) != T:
        raise NotUnderstood(f"lr_schedule has {len(rates)} entries for {T} steps")
    steps = np.arange(1, T + 1)
    all_of_it = np.isin(steps, stored.steps) & (inject == "everything")
    flags = {"all": all_of_it, "bases": all_of_it | ((steps == 1) & (inject is not None))}

    def tree(name: str) -> dict[str, jax.Array]:
        return {p: jnp.asarray(a[name], stored.dtype) for p, a in stored.arrays.items()}

    options, numbers = dict(recipe.options), dict(recipe.numbers)
    if stored.dtype == np.float32:
        # 1 - beta is formed in double precision and then rounded, as in the released code.
        options, numbers = options | numbers, {}
    out = _compiled()(
        recipe.factory,
        tuple(sorted(options.items())),
        numbers,
        jnp.asarray(rates, stored.dtype),
        tree("param_init"),
        tree("grads"),
        tree("params"),
        stored.values,
        flags,
    )
    return Run(*jax.tree.map(np.asarray, out))


@functools.cache
def _compiled() -> Callable:
    # Compiled for a few milliseconds of work.
    return jax.jit(
        _scan,
        static_argnums=(0, 1),
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )


def _scan(factory, options, numbers, rates, params, grads, stored_params, stored, flags):
    tx = optax.with_extra_args_support(
        factory(lambda count: rates[count], **dict(options), **numbers)
    )

    def step(carry, given):
        grad, other_params, other, flag = given
        updates, state = tx.update(grad, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        found = read(state)
        if {p: set(v) for p, v in found.items()} != {p: set(v) for p, v in other.items()}:
            raise ValueError(f"state of other parts: {_difference(found, other)}")
        mixed = {
            p: {
                name: jnp.where(flag["bases" if name[0] == "Q" else "all"], other[p][name], x)
                for name, x in values.items()
            }
            for p, values in found.items()
        }
        kept = jax.tree.map(lambda a, b: jnp.where(flag["all"], a, b), other_params, params)
        return (kept, write(state, mixed)), (params, found)

    given = (grads, stored_params, stored, flags)
    return jax.lax.scan(step, (params, tx.init(params)), given)[1]


def _difference(found: dict[str, Values], wanted: dict[str, Values]) -> str:
    names = {p: sorted(set(found.get(p, ())) ^ set(v)) for p, v in wanted.items()}
    return ", ".join(f"{p}: {' '.join(v)}" for p, v in names.items() if v)


_KINDS = (EigenbasisAdamState, ModeSoapState)
# Field of our state -> name of the stored array.
_FIELDS = {
    EigenbasisAdamState: {
        **{"mu": "mu", "nu": "exp_avg_sq", "row_nu": "l", "column_nu": "r"},
        **{"row_factor": "factor0", "column_factor": "factor1"},
        **{"row_basis": "Q0", "column_basis": "Q1"},
    },
    ModeSoapState: {"mu": "mu", "nu": "exp_avg_sq", "factors": "factor", "bases": "Q"},
}


def _absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def read(state: Any) -> dict[str, Values]:
    """What an optimizer state holds of each parameter, by the names of the stored arrays."""
    found: dict[str, Values] = {}
    for kind in _KINDS:
        for node in find_states(state, kind):
            for field, name in _FIELDS[kind].items():
                tree = getattr(node, field)
                for p, x in {} if _absent(tree) else tree.items():
                    values = found.setdefault(p, {}) if not _absent(x) else {}
                    parts = {f"{name}{k}": y for k, y in enumerate(x)} if type(x) is tuple else {}
                    values |= {k: y for k, y in (parts or {name: x}).items() if not _absent(y)}
    return found


def write(state: Any, values: dict[str, Values]) -> Any:
    """The state with these values in place of its own."""

    def replace(node: Any) -> Any:
        if not isinstance(node, _KINDS):
            return node
        new = {}
        for field, name in _FIELDS[type(node)].items():
            tree = getattr(node, field)
            if _absent(tree):
                continue

            def pick(p: str, x: Any, name: str = name) -> Any:
                if type(x) is tuple:
                    return tuple(pick(p, y, f"{name}{k}") for k, y in enumerate(x))
                return x if _absent(x) else values[p][name]

            new[field] = {p: pick(p, x) for p, x in tree.items()}
        return node._replace(**new)

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, _KINDS))


def _relative(what: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> Check:
    """Relative to the largest entry."""
    size = np.abs(np.asarray(wanted, np.float64)).max(initial=0.0) or 1.0
    return Check.of(what, np.asarray(got, np.float64) / size, wanted / size, tolerance)


def _free_run(
    case: Case, stored: _Stored, recipe: Recipe, names: list[str], *, states: bool
) -> list[Check]:
    run = _run_case(case, stored, recipe, inject="bases")
    exact = ONE_STEP_TOLERANCE[case.sidecar["dtype"]]
    checks = []
    for p in names:
        tolerance = case.sidecar["params"][p]["free_run_tol"]
        checks.append(Check.of(f"{p}/params", run.params[p], stored.arrays[p]["params"], tolerance))
        for t in stored.steps if states else ():
            got = {name: x[t - 1] for name, x in run.states[p].items()}
            for name in (name for name in got if re.fullmatch(r"exp_avg_sq|l|r|factor\d", name)):
                wanted = stored.values[p][name][t - 1]
                # No basis enters a factor.
                limit = exact if name.startswith("factor") else max(exact, tolerance)
                checks.append(_relative(f"{p}/{name} after {t}", got[name], wanted, limit))
            bases = [got.get(f"Q{k}") for k in range(len(stored.shapes[p]))]
            momentum = rotate_back(got["mu"].reshape(stored.shapes[p]), bases)
            wanted = stored.momentum(p)[t - 1]
            checks.append(_relative(f"{p}/momentum after {t}", momentum, wanted, exact))
    return checks


def _one_step(case: Case, stored: _Stored, recipe: Recipe) -> list[Check]:
    run = _run_case(case, stored, recipe, inject="everything")
    tolerance = ONE_STEP_TOLERANCE[case.sidecar["dtype"]]
    checks = []
    for p, arrays in stored.arrays.items():
        for t in (t for t in stored.steps if t - 1 in stored.steps):
            wanted = arrays["params"][t - 1]
            checks.append(Check.of(f"{p}/params step {t}", run.params[p][t - 1], wanted, tolerance))
            got = {name: x[t - 1] for name, x in run.states[p].items()}
            for name in (name for name in got if re.fullmatch(r"exp_avg_sq|l|r|factor\d", name)):
                wanted = stored.values[p][name][t - 1]
                checks.append(_relative(f"{p}/{name} step {t}", got[name], wanted, tolerance))
            checks += _compare_bases(case, stored, p, int(t), got)
    if not checks:
        raise NotUnderstood("no two consecutive stored steps")
    return checks


def _compare_bases(case: Case, stored: _Stored, p: str, t: int, got: Values) -> list[Check]:
    """Orthogonal, and where the step refreshed them the Q of (factor @ sorted old basis)."""
    dtype = case.sidecar["dtype"]
    tolerance = ONE_STEP_TOLERANCE[dtype]
    checks = []
    for k, (old, new) in enumerate(zip(stored.bases(p, t - 1), stored.bases(p, t), strict=True)):
        if old is None or new is None:
            continue
        q = np.asarray(got[f"Q{k}"], np.float64)
        what = f"{p}/Q{k} step {t}"
        checks.append(Check.of(f"{what}, orthogonality", q.T @ q, np.eye(len(q)), tolerance))
        if new is old or np.array_equal(new, old):
            checks.append(Check.of(what, q, old, 0.0))
            continue
        factor = np.asarray(stored.values[p][f"factor{k}"][t - 1], np.float64)
        order = np.argsort(-np.einsum("ij,ik,kj->j", old, factor, old), kind="stable")
        image = factor @ old[:, order]
        triangle = q.T @ image
        lower = np.tril(triangle, -1)
        checks.append(_relative(f"{what}, triangle", triangle - lower, triangle, tolerance))
        diagonal = np.abs(np.diag(new.T @ image))
        well = np.logical_and.accumulate(diagonal > COLUMN_SHARE[dtype] * diagonal.max())
        overlap = np.abs(new.T.astype(np.float64) @ q)[:, well]
        eye = np.eye(len(q))[:, well]
        checks.append(Check.of(f"{what}, columns", overlap, eye, COLUMN_TOLERANCE[dtype]))
    return checks
