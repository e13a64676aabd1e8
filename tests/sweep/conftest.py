from tests.train.conftest import compile_quickly  # noqa: F401  (a fixture)
