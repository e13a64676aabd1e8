"""Replay of the SOAP family through the public API."""

import jaxopt_lab as jol
from tests.golden.eigenbasis import Recipe, check_understood, common_options, compare
from tests.golden.harness import Case, Result


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    check_understood(case, "soap", set(), set())
    return compare(case, _recipe)


def _recipe(case: Case, orthogonalizer: str) -> Recipe:
    return Recipe(jol.soap, *common_options(case, orthogonalizer))
