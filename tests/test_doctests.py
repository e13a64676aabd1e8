"""The examples in the docstrings of every room that needs no corpus."""

import doctest
import importlib
import pathlib

import pytest

import jaxopt_lab

ROOT = pathlib.Path(jaxopt_lab.__file__).parent
ROOMS = (
    *("core", "optim", "schedules", "diagnostics", "report", "models", "sweep", "train", "bench"),
    *("dynamics", "dynamics/landscape", "dynamics/loop", "train/io"),
)
MODULES = sorted(
    ".".join(("jaxopt_lab", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ROOMS
    for path in (ROOT / room).glob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed
