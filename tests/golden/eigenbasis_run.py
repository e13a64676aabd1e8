"""Runs of SOAP and DyKAF over a stored trajectory.

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

from jaxopt_lab.optim.kronecker.tensors import TensorSoapState
from jaxopt_lab.optim.kronecker.transform import EigenbasisAdamState
from tests.golden.harness import Case, NotUnderstood
from tests.golden.trajectory import find_states
from tests.quick_compile import OPTIONS
from tests.reference.soap import merged, rotate

Values = dict[str, Any]  # names of the stored arrays -> arrays; one dict a parameter

# Eigenvalue estimates of float32 that differ by less than this share of the largest may come in
# either order; the sidecars name such pairs up to 7e-7.
TIE = 8e-7


class Recipe(NamedTuple):
    """How a user builds the optimizer of a case."""

    factory: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]  # static
    numbers: Mapping[str, float]  # traced, so that cases share a compiled scan


class Run(NamedTuple):
    params: dict[str, np.ndarray]  # (T, *shape)
    states: dict[str, Values]  # (T, ...)


class Stored:
    """The stored trajectory, spread over all T steps."""

    def __init__(self, case: Case, dtype: Any):
        sidecar = case.sidecar
        self.dtype = np.dtype(dtype)
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
        self.end = dict.fromkeys(self.shapes, self.length)  # steps that are compared
        self.note = ""

    def stop_at_ties(self, run: Run) -> None:
        """Compare no further than a refresh at which two columns nearly tie for their order.

        In float32 either order is right, and the second moment follows it; the sidecar then asks
        for float64 arithmetic, which is compared to the end.
        """
        for p in self.shapes:
            for t in range(2, self.length + 1):
                for k, q in enumerate(self.bases(p, t - 1)):
                    if q is None or np.array_equal(q, self.bases(p, t)[k]):
                        continue
                    factor = np.asarray(run.states[p][f"factor{k}"][t - 1], np.float64)
                    values = np.sort(np.einsum("ij,ik,kj->j", q, factor, q, dtype=np.float64))
                    if np.diff(values).min(initial=np.inf) < TIE * values[-1]:
                        self.end[p] = min(self.end[p], t - 1)
        short = [f"{p} until step {end}" for p, end in self.end.items() if end < self.length]
        self.note = ", ".join(short)

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


def run_case(case: Case, stored: Stored, recipe: Recipe, *, inject: str | None) -> Run:
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
    return jax.jit(_scan, static_argnums=(0, 1), compiler_options=OPTIONS)


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


_KINDS = (EigenbasisAdamState, TensorSoapState)
# Field of our state -> name of the stored array.
_FIELDS = {
    EigenbasisAdamState: {
        **{"mu": "mu", "nu": "exp_avg_sq", "row_nu": "l", "column_nu": "r"},
        **{"row_factor": "factor0", "column_factor": "factor1"},
        **{"row_basis": "Q0", "column_basis": "Q1"},
    },
    TensorSoapState: {"mu": "mu", "nu": "exp_avg_sq", "factors": "factor", "bases": "Q"},
}


def _absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _by_parameter(node: Any) -> dict[str, Values]:
    """The arrays of one state, a dict a parameter, by the names of the stored arrays."""
    found: dict[str, Values] = {}
    for field, name in _FIELDS[type(node)].items():
        trees = getattr(node, field)
        # Of tensors there is one tree an axis.
        named = [(name, trees)]
        if type(trees) is tuple:
            named = [(f"{name}{k}", tree) for k, tree in enumerate(trees)]
        for whole, tree in named:
            for p, x in {} if _absent(tree) else tree.items():
                if not _absent(x):
                    found.setdefault(p, {})[whole] = x
    return found


def read(state: Any) -> dict[str, Values]:
    """What an optimizer state holds of each parameter, by the names of the stored arrays."""
    found: dict[str, Values] = {}
    for kind in _KINDS:
        for node in find_states(state, kind):
            for p, values in _by_parameter(node).items():
                found.setdefault(p, {}).update(values)
    return found


def write(state: Any, values: dict[str, Values]) -> Any:
    """The state with these values in place of its own."""

    def filled(name: str, tree: Any) -> Any:
        if _absent(tree):
            return tree
        return {p: x if _absent(x) else values[p][name] for p, x in tree.items()}

    def replace(node: Any) -> Any:
        if not isinstance(node, _KINDS):
            return node
        new = {}
        for field, name in _FIELDS[type(node)].items():
            trees = getattr(node, field)
            if type(trees) is tuple:
                new[field] = tuple(filled(f"{name}{k}", tree) for k, tree in enumerate(trees))
            else:
                new[field] = filled(name, trees)
        return node._replace(**new)

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, _KINDS))
