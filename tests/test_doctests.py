"""The examples in the docstrings of every package that needs no corpus, and those of the guide."""

import doctest
import importlib
import pathlib
import re

import pytest

import jaxopt_lab

ROOT = pathlib.Path(jaxopt_lab.__file__).parent
PACKAGES = (
    *("core", "optim", "parity", "schedules", "diagnostics", "report", "models", "sweep", "train"),
    *("bench", "dynamics", "lora", "tasks", "zeroth_order"),
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


GUIDE = ROOT.parent / "docs" / "guide"
PAGES = sorted(path.name for path in GUIDE.glob("*.md") if ">>>" in path.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_guide(page):
    # The fences would be read as output.
    text = re.sub(r"^ *```.*$", "", (GUIDE / page).read_text(), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    results = doctest.DocTestRunner().run(examples)
    assert results.attempted and not results.failed
