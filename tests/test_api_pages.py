"""Every public name has its place on the API pages, and every field of a state says what it is."""

import pathlib
import re
import types

import pytest

import jaxopt_lab as jol

griffe = pytest.importorskip("griffe")

ROOT = pathlib.Path(__file__).parents[1]
PAGES = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
DOCUMENTED = set(re.findall(r"^::: ([\w.]+)", PAGES, re.MULTILINE))


@pytest.fixture(scope="module")
def package():
    extension = griffe.load_extensions(ROOT / "docs" / "extensions" / "docstrings.py")
    return griffe.load("jaxopt_lab", extensions=extension, search_paths=[ROOT])


@pytest.mark.parametrize("name", jol.__all__)
def test_a_public_name_is_on_a_page(name):
    value = getattr(jol, name)
    if isinstance(value, types.ModuleType):
        assert any(module.startswith(value.__name__) for module in DOCUMENTED)
    else:
        home = value.__module__
        assert home in DOCUMENTED or f"{home}.{value.__name__}" in DOCUMENTED


def test_pages_name_what_exists(package):
    for path in DOCUMENTED:
        assert package[path.removeprefix("jaxopt_lab.")] is not None


def test_fields_of_states_and_options_are_explained(package):
    found = 0
    for path in DOCUMENTED:
        module = package[path.removeprefix("jaxopt_lab.")]
        for name, kind in module.members.items():
            options = path == "jaxopt_lab.optim.options" and not name.startswith("_")
            if kind.is_alias or not kind.is_class or not (name.endswith("State") or options):
                continue
            for field in kind.attributes.values():
                text = field.docstring.value if field.docstring else ""
                assert len(text) > 5, field.path
                found += 1
    assert found > 60
