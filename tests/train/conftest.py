import jax
import pytest

from tests.train.tiny_run import write_text


@pytest.fixture(scope="package", autouse=True)
def _compile_once(tmp_path_factory):
    """The same small programs are built by many runs here; compiling them again proves nothing."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small corpus, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_text(tmp_path_factory.mktemp("text"))
