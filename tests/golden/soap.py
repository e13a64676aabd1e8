"""Replay of the SOAP family, with the quirks of its released code."""

from jaxopt_lab.parity.soap import soap
from tests.golden.eigenbasis import Recipe, check_understood, common_options, compare
from tests.golden.harness import Case, Result


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    check_understood(case, "soap", set(), set())
    return compare(case, _recipe)


def _recipe(case: Case, orthogonalizer: str) -> Recipe:
    return Recipe(soap, *common_options(case, orthogonalizer))
