"""The examples in the docstrings of every package that needs no corpus."""

import doctest
import importlib
import pathlib

import pytest

import jaxopt_lab

ROOT = pathlib.Path(jaxopt_lab.__file__).parent
PACKAGES = (
    *("core", "optim", "parity", "schedules", "diagnostics", "report", "models", "sweep", "train"),
    *("bench", "dynamics"),
)
MODULES = sorted(
    ".".join(("jaxopt_lab", *path.relative_to(ROOT).with_suffix("").parts))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed
