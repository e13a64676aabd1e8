"""Replay of the DyKAF family through the public API."""

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
    return Recipe(jol.dykaf, options | chosen, numbers)
