"""Replay of the factor steps that were checked by brute force on the full Fisher matrix.

Single steps of both integrators, and streams of gradients with the errors of several
approximations after every step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.kronecker import INTEGRATORS, nearest_kronecker, rearrange
from jaxopt_lab.core.spectral import eigenbasis
from jaxopt_lab.diagnostics.fisher import FullFisher
from tests.golden.harness import Case, Check, NotUnderstood, Result

OURS = {"ksl": "ksl", "bug": "parallel"}
COLUMNS = ["ksl", "bug", "best", "shampoo", "soap_full_V", "dykaf_full_V", "kfac_like_norm"]
# The first rows of this column rest on the null space of factors that are still rank-deficient.
ILL_POSED = {"dykaf_full_V": (1, 2, 3)}


def replay(case: Case) -> list[Result]:
    """One result for the single steps, one for each stream."""
    tolerance = case.sidecar["tolerance"]
    if not case.sidecar["ill_posed"].startswith("err_dykaf_full_V rows t = 1, 2, 3 "):
        raise NotUnderstood(f"ill-posed rows: {case.sidecar['ill_posed']}")
    label = f"{case.family}/{case.name}"
    with jax.enable_x64(True):
        results = [Result(f"{label}[single]", tuple(_single_steps(case, tolerance)))]
        for info in case.sidecar["streams_info"]:
            checks = _stream(case, info, tolerance)
            results.append(Result(f"{label}[stream{info['stream']}]", tuple(checks)))
    return results


def _single_steps(case: Case, tolerance: float) -> list[Check]:
    checks = []
    for info in case.sidecar["single"]:
        prefix = f"case{info['case']}/"
        arrays = (jnp.asarray(case.arrays[prefix + name]) for name in ("L", "R", "g"))
        got, errors = jax.device_get(_step(*arrays, *_weights(info["beta"])))
        checks += [
            Check.of(prefix + name, value, case.arrays[prefix + name], tolerance)
            for name, value in got.items()
        ]
        checks += [
            Check.of(f"{prefix}error_{name}", value, info[f"error_{name}"], tolerance)
            for name, value in errors.items()
        ]
    return checks


@jax.jit
def _step(left, right, grad, decay, weight):
    """The target, what every method makes of it, and the errors."""
    fisher = decay * jnp.kron(left, right) + weight * jnp.outer(grad, grad)
    matrix = rearrange(fisher, *grad.shape)
    pairs = {
        name: INTEGRATORS[ours](left, right, grad, decay=decay, weight=weight)
        for name, ours in OURS.items()
    }
    pairs["best"] = _full(fisher, grad.shape).best_kronecker()
    got = {"F_target": fisher, "A_target": matrix}
    for name, pair in pairs.items():
        got |= {f"L_{name}": pair[0], f"R_{name}": pair[1]}
    errors = {name: jnp.linalg.norm(matrix - jnp.outer(*pair)) for name, pair in pairs.items()}
    return got, errors


def _stream(case: Case, info: dict, tolerance: float) -> list[Check]:
    prefix = f"stream{info['stream']}/"
    grads = jnp.asarray(case.arrays[prefix + "grads"])
    decay, weight = _weights(info["beta"])
    factors, errors = jax.device_get(_run(grads, decay, weight))
    checks = []
    for name in COLUMNS:
        wanted = case.arrays[f"{prefix}err_{name}"]
        rows = np.setdiff1d(np.arange(len(wanted)), np.array(ILL_POSED.get(name, ()), int) - 1)
        # Relative to max(1, value), as the sidecar asks.
        size = np.maximum(1, np.abs(wanted[rows]))
        got = errors[name][rows] / size
        checks.append(Check.of(f"{prefix}err_{name}", got, wanted[rows] / size, tolerance))
    for key in case.arrays:
        if key.startswith(f"{prefix}t"):
            _, step, array = key.split("/")
            side, name = array.split("_")
            got = factors[name]["LR".index(side)][int(step.removeprefix("t")) - 1]
            checks.append(Check.of(key, got, case.arrays[key], tolerance))
    return checks


@jax.jit
def _run(grads, decay, weight):
    """Factors and errors after every gradient of a stream."""
    m, n = grads.shape[1:]

    def advance(state, grad, old, new):
        fisher, gram, pairs = state
        fisher = old * fisher + new * jnp.outer(grad, grad)
        gram = old * gram[0] + new * grad @ grad.T, old * gram[1] + new * grad.T @ grad
        return fisher, gram, pairs

    def errors(state):
        matrix, gram, pairs = state
        fisher = _full(matrix, (m, n))
        normed = gram[0] / jnp.trace(gram[0]), gram[1]
        pairs = pairs | {"best": fisher.best_kronecker(), "shampoo": gram, "kfac_like_norm": normed}
        columns = _each(fisher.kronecker_errors, pairs)
        gram_and_ksl = {"soap_full_V": gram, "dykaf_full_V": pairs["ksl"]}
        return columns | _each(lambda *pair: _full_v(fisher, *map(eigenbasis, pair)), gram_and_ksl)

    def step(state, grad):
        fisher, gram, pairs = advance(state, grad, decay, weight)
        pairs = {
            name: INTEGRATORS[OURS[name]](*pair, grad, decay=decay, weight=weight)
            for name, pair in pairs.items()
        }
        state = fisher, gram, pairs
        return state, state

    # The first gradient has weight one, and the start is not stepped with it again.
    zeros = jnp.zeros((m * n, m * n)), (jnp.zeros((m, m)), jnp.zeros((n, n)))
    pair = nearest_kronecker(grads[0])
    first = advance((*zeros, dict.fromkeys(OURS, pair)), grads[0], 0.0, 1.0)
    _, rest = jax.lax.scan(step, first, grads[1:])
    states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)
    return states[2], jax.lax.map(errors, states)


def _each(errors, pairs):
    """Both errors of every pair, evaluated together: one program for all is compiled faster."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs.values())
    found = jax.vmap(errors)(*stacked)
    rows = jnp.stack([found.relative, found.rescaled], axis=1)
    return {name: rows[i] for i, name in enumerate(pairs)}


def _full_v(fisher, left_basis, right_basis):
    diagonal = fisher.diagonal(left_basis, right_basis)
    return fisher.eigenbasis_errors(diagonal, left_basis, right_basis)


def _full(matrix, shape):
    return FullFisher(matrix.reshape(*shape, *shape))


def _weights(beta: float) -> tuple[float, float]:
    return beta, 1.0 if beta == 1 else 1 - beta
