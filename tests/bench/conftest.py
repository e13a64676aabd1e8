import pytest

from jaxopt_lab.bench import floors, shapes


@pytest.fixture
def toy(monkeypatch):
    """A model whose steps take well under a millisecond, and ceilings to match."""
    monkeypatch.setitem(shapes.SHAPES, "toy", shapes.DecoderShape(64, 16, 2, 16))
    monkeypatch.setattr(floors, "_CPU_SIZES", (1 << 16, 32))
    return "toy"
