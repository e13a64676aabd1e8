"""SOAP and DyKAF where no trajectory is stored: replayed against the NumPy references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.parity.dykaf import dykaf as parity_dykaf
from jaxopt_lab.parity.soap import soap as parity_soap
from tests.golden.eigenbasis import compare, eigenbasis
from tests.golden.eigenbasis_run import Recipe
from tests.golden.harness import Case
from tests.optim.runs import fast_jit
from tests.reference.dykaf import dykaf
from tests.reference.soap import merged, rotate, soap

STEPS = 9
MATRICES = {"wide": (4, 6), "square": (5, 5)}
SHAPES = {"square": (5, 5), "tensor": (2, 2, 6)}
NUMBERS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "precondition_frequency": 3}


def trajectory(method, rng, shape, options, limit, merging):
    """Arrays of one parameter in the form of the stored ones."""
    w, grads = rng.normal(size=shape), rng.normal(size=(STEPS, *shape))
    n = NUMBERS
    steps = method(
        w,
        grads,
        rates=0.02,
        b1=n["b1"],
        b2=n["b2"],
        eps=n["eps"],
        decay=n["weight_decay"],
        frequency=n["precondition_frequency"],
        max_precond_dim=limit,
        merge_dims=merging,
        **options,
    )
    arrays = {"param_init": w, "grads": grads, "params": np.stack([s.params for s in steps])}
    if isinstance(steps[0].second, tuple):
        for name, values in zip("lr", zip(*(s.second for s in steps), strict=True), strict=True):
            arrays[name] = np.stack(values)
    else:
        arrays["exp_avg_sq"] = np.stack([s.second for s in steps])
    inner = merged(shape, limit) if merging else shape
    arrays["exp_avg"] = np.stack(
        [rotate(s.momentum.reshape(inner), s.bases).reshape(shape) for s in steps]
    )
    for k, first in enumerate(steps[0].bases):
        if first is not None:
            arrays[f"factor{k}"] = np.stack([s.factors[k] for s in steps])
            arrays[f"Q{k}"] = np.stack([s.bases[k] for s in steps])
            arrays[f"Q{k}_steps"] = np.arange(1, STEPS + 1)
    return arrays


def case_of(method, shapes, options, *, limit=100, merging=False, tolerance=1e-8):
    rng = np.random.default_rng(3)
    arrays = {"state_steps": np.arange(1, STEPS + 1)}
    for p, shape in shapes.items():
        found = trajectory(method, rng, shape, options, limit, merging)
        arrays |= {f"{p}/{name}": x for name, x in found.items()}
    hyperparameters = {
        **{"lr": 0.02, "betas": [NUMBERS["b1"], NUMBERS["b2"]]},
        **{"max_precond_dim": limit, "merge_dims": merging},
    }
    infos = {
        p: {
            "shape": list(shape),
            "free_run_ok": True,
            "free_run_tol": tolerance,
            "no_injection_ok": False,
        }
        for p, shape in shapes.items()
    }
    sidecar = {
        **{"method": method.__name__, "dtype": "float64", "T": STEPS, "lr_schedule": None},
        **{"hyperparameters": hyperparameters, "params": infos},
    }
    return Case(method.__name__, "reference", sidecar, arrays)


# Reference, shapes, options of the reference, options of ours, and how the case is stored.
CASES = {
    "dykaf defaults": (dykaf, MATRICES, {}, {}, {}),
    "dykaf rank one": (dykaf, SHAPES, {"rank_one": True}, {"second_moment": "rank_one"}, {}),
    "dykaf sum": (dykaf, SHAPES, {"factor_decay": 1.0}, {"factor_decay": 1.0}, {}),
    "dykaf one side": (dykaf, {"wide": (4, 6), "tall": (6, 4)}, {}, {}, {"limit": 5}),
    "dykaf merging": (dykaf, SHAPES, {"rank_one": True}, {"second_moment": "rank_one"},
                      {"limit": 6, "merging": True}),
    "soap factored": (soap, MATRICES, {"second_moment": "factored"},
                      {"second_moment": "factored"}, {}),
    "soap one-sided": (soap, {"wide": (4, 6), "tall": (6, 4), "square": (5, 5)},
                       {"one_sided": True}, {"one_sided": True}, {}),
    "soap sum, merging into a vector": (soap, {"small": (1, 3), "large": (3, 5)},
                                        {"factor_decay": 1.0}, {"factor_decay": 1.0},
                                        {"limit": 6, "merging": True}),
    "soap decoupled": (soap, {"wide": (4, 6)}, {"decay_after_step": False},
                       {"decay_after_step": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    method, shapes, theirs, ours, stored = CASES[name]
    case = case_of(method, shapes, theirs, **stored)
    factory = {"soap": parity_soap, "dykaf": parity_dykaf}[method.__name__]
    limit, merging = stored.get("limit", 100), stored.get("merging", False)
    basis = {k: v for k, v in ours.items() if k in ("second_moment", "one_sided")}
    options = {k: v for k, v in ours.items() if k not in basis} | {"merge_dims": merging}

    def recipe(case, orthogonalizer):
        kept = eigenbasis(orthogonalizer, max_precond_dim=limit, **basis)
        return Recipe(factory, options | {"eigenbasis": kept}, NUMBERS)

    for result in compare(case, recipe, also_panels=False):
        assert result.passed, str(result)


def moved(tx, grads):
    """Parameters after each gradient, from zero."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    params = jnp.zeros(grads.shape[1:])
    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


def test_a_zero_gradient_is_no_start():
    """DyKAF ignores a matrix until its gradient is not zero, as if nothing had happened before."""
    grads = np.random.default_rng(0).normal(size=(6, 4, 4))
    late = np.concatenate([np.zeros((2, 4, 4)), grads])
    with jax.enable_x64(True):
        # Refreshes follow the shared counter, so none is made here.
        tx = parity_dykaf(
            0.1,
            weight_decay=0.1,
            precondition_frequency=100,
            eigenbasis=eigenbasis("householder"),
        )
        run = fast_jit(functools.partial(moved, tx))
        at_once, later = (np.asarray(run(jnp.asarray(g))) for g in (grads, late))
    np.testing.assert_array_equal(later[:2], 0)
    np.testing.assert_allclose(later[2:], at_once, rtol=0, atol=1e-12)
    assert np.abs(at_once[-1]).max() > 0.05
