import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxopt_lab.train import compilation
from jaxopt_lab.train.compilation import compiled_once


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No directory of anybody's, and every program is worth keeping."""
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    monkeypatch.delenv("JAXOPT_LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


def compile_something(number):
    return jax.jit(lambda x: x * number + 1).lower(jnp.ones(3)).compile()


def programs(directory):
    return [path for path in Path(directory).glob("*-cache")] if Path(directory).exists() else []


def within(choice, number=2.0):
    told = []
    with compiled_once(choice, told.append):
        compile_something(number)
    return told


def test_programs_are_kept_in_the_users_cache_directory_and_only_within_the_block(tmp_path):
    compile_something(1.0)  # JAX looks for its directory at the first compilation
    assert within("auto") == []
    own = tmp_path / "xdg/jaxopt-lab/programs"
    kept = programs(own)
    assert kept and own.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None
    compile_something(3.0)
    assert programs(own) == kept


def test_another_place_or_none(tmp_path):
    assert within("off") == [] and not (tmp_path / "xdg").exists()
    assert within(str(tmp_path / "mine")) == []
    assert programs(tmp_path / "mine") and not (tmp_path / "xdg").exists()


def test_what_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    within("auto")
    assert programs(tmp_path / "told") and not (tmp_path / "xdg").exists()
    within(str(tmp_path / "mine"), 5.0)
    assert programs(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "told")


def test_several_processes_keep_none_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert within("auto") == [] and not (tmp_path / "xdg").exists()


def test_several_processes_share_those_of_their_run(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def kept(number):
        with compiled_once("auto", pytest.fail, tmp_path / "run"):
            compile_something(number)
        return programs(tmp_path / "run/programs")

    first = kept(5.0)
    assert first and not (tmp_path / "xdg").exists()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kept(6.0) == first


def test_a_directory_that_cannot_be_written_is_harmless(tmp_path, monkeypatch):
    (tmp_path / "xdg").write_text("a file")
    (line,) = within("auto")
    assert line.startswith("compiled programs are not kept in ") and "Not a directory" in line
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in within(str(tmp_path / "read-only"))[0]


def test_programs_that_others_can_write_are_not_executed(tmp_path):
    own = tmp_path / "xdg/jaxopt-lab/programs"
    own.mkdir(parents=True)
    own.chmod(0o777)
    assert "others can write there" in within("auto")[0]
    assert not programs(own)


def test_the_oldest_programs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_LARGEST_BYTES", 250)
    own = tmp_path / "xdg/jaxopt-lab/programs"
    own.mkdir(parents=True, mode=0o700)
    for age in range(4):
        path = own / f"{age}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - age, time.time() - age))
    with compiled_once("auto", lambda _: None):
        pass
    assert sorted(path.name for path in own.iterdir()) == ["0-cache", "1-cache"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "large").write_bytes(bytes(1000))
    with compiled_once(str(mine), lambda _: None):
        pass
    assert (mine / "large").exists()  # of a directory that the user names nothing is removed
