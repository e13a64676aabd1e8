"""Replay of the DyKAF family through the public API."""

import jax
import optax

import jaxopt_lab as jol
from tests.golden import kronecker_bruteforce
from tests.golden.eigenbasis import Recipe, check_understood, common_options, compare
from tests.golden.harness import Case, NotUnderstood, Result

HYPERPARAMETERS = {"init", "adam_rank_one"}
OPTIONS = {
    *("integrator", "init", "kron_init_scale", "one_sided"),
    *("rank1_second_moment", "rank1_eps_in_denominator"),
}


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    if "stream0/grads" in case.arrays:
        return kronecker_bruteforce.replay(case)
    check_understood(case, "dykaf", HYPERPARAMETERS, OPTIONS)
    h, o = case.sidecar["hyperparameters"], case.sidecar["spec_options"]
    for name, other in (("init", "init"), ("adam_rank_one", "rank1_second_moment")):
        if h[name] != o[other]:
            raise NotUnderstood(f"{name} is {h[name]!r}, but {other} is {o[other]!r}")
    return compare(case, _recipe)


def _recipe(case: Case, orthogonalizer: str) -> Recipe:
    options, numbers = common_options(case, orthogonalizer)
    chosen = {name: case.sidecar["spec_options"][name] for name in OPTIONS}
    shapes = [info["shape"] for info in case.sidecar["params"].values()]
    bare = any(len(s) == 2 and min(s) > options["max_precond_dim"] for s in shapes)
    factory = _rank_one_without_factors if bare and chosen["rank1_second_moment"] else jol.dykaf
    return Recipe(factory, options | chosen, numbers)


def _rank_one_without_factors(learning_rate, **options):
    """DyKAF, also for matrices without a factor, which `dykaf` gives to AdamW."""
    whole = jol.dykaf(learning_rate, **options)
    limit = options["max_precond_dim"]
    others = ("decay_after_step", "on_uncovered", "precondition_1d", "merge_dims")
    bare = jol.scale_by_dykaf(
        **{name: value for name, value in options.items() if name not in others},
        decay_rate=learning_rate,
    )
    return optax.partition(
        {"whole": whole, "bare": optax.chain(bare, optax.scale_by_learning_rate(learning_rate))},
        lambda params: jax.tree.map(
            lambda x: "bare" if x.ndim == 2 and min(x.shape) > limit else "whole", params
        ),
    )
