"""Optax's contributed-optimizer tests, as they ship in the installed package, on our factories."""

import pathlib
import re
import sys
import types
import unittest

import optax.contrib

from tests.contract.optimizers import OPTIMIZERS


def _optax_suite() -> type[unittest.TestCase]:
    """The test class with our optimizers in place of Optax's.

    The class reads its tables while it is being made, so the source is changed before it runs.
    """
    path = pathlib.Path(optax.contrib.__file__).parent / "_common_test.py"
    rows = [{"opt_name": name, "opt_kwargs": e.kwargs} for name, e in OPTIMIZERS.items()]
    for row in rows:
        row["wrapper_name"] = row["wrapper_kwargs"] = None
    source = path.read_text()
    source, replaced = re.subn(
        r"^_MAIN_OPTIMIZERS_UNDER_TEST = tuple\(.*\)$",
        "_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = tuple(_OURS)",
        source,
        flags=re.MULTILINE,
    )
    assert replaced == 1, "Optax changed the layout of its contributed-optimizer tests"
    module = types.ModuleType("optax_contract")
    module.__dict__["_OURS"] = rows
    sys.modules[module.__name__] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    module.__dict__["_get_opt_factory"] = lambda name: OPTIMIZERS[name].factory
    return module.__dict__["ContribTest"]


ContribTest = _optax_suite()


def test_every_optimizer_is_covered():
    rounds = [name for name in dir(ContribTest) if name.startswith("test_optimizers_accept_extra")]
    assert len(rounds) == 2 * len(OPTIMIZERS)  # wrapped and bare
