"""Replay of the DyKAF family, with the quirks of its released code."""

from jaxopt_lab.parity.dykaf import dykaf
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
    chosen = {name: case.sidecar["spec_options"][name] for name in OPTIONS}
    basis = {
        "init": chosen.pop("init"),
        "second_moment": "rank_one" if chosen.pop("rank1_second_moment") else "full",
    }
    options, numbers = common_options(case, orthogonalizer, **basis)
    return Recipe(dykaf, options | chosen, numbers)
