import pytest

from tests import compiled_programs as programs


def test_compiled_programs_need_no_more_than_they_did():
    stored = programs.stored().get(programs.version())
    if stored is None:
        pytest.skip(f"nothing is stored for JAX {programs.version()}")
    lines = programs.compared(programs.measured(), stored)
    grew = [line for line in lines if line.startswith("!")]
    told = "python -m tests.compiled_programs --update stores it, if that was meant"
    assert not grew, "\n".join([*lines, told])
