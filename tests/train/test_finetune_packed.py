"""Adapters beside weights that stay packed: a run, what it leaves, and what is refused."""

import jax
import numpy as np
import pytest

from jaxopt_lab import lora, models
from jaxopt_lab.core.packed import is_packed
from jaxopt_lab.train import ConfigError, finetune, load_params
from jaxopt_lab.train.base import read_base
from jaxopt_lab.train.machine import check_memory, smallest_bytes
from jaxopt_lab.train.trainable import frozen_in
from tests.models import gguf_files
from tests.train.tiny_finetune import finetune_config, write_base

CONFIG = models.DecoderConfig(
    vocab_size=260, width=32, depth=2, heads=2, kv_heads=1, hidden=32, context=64
)
LORA = "--packed --trainable lora --trainable.rank 2 --trainable.target v_proj down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "gguf"
    directory.mkdir()
    gguf_files.write(directory / "model.gguf", "Q4_1", "Q8_0", config=CONFIG)
    return str(directory)


@pytest.mark.parametrize(
    ("flags", "copies"),
    [
        ("--trainable full", 2.0),
        ("--trainable full --optimizer mezo", 1.0),
        ("--trainable head", 1.0),
        ("--trainable dora", 1.0),
        ("--trainable lora --model.compute-dtype bfloat16", None),
        (LORA, None),
    ],
)
def test_what_is_frozen_is_counted_once_as_it_is_held(base, text, flags, copies, monkeypatch):
    config = finetune_config(base, text, "unused", flags)
    _, params = models.load_gguf(f"{base}/model.gguf", packed=config.packed)
    if copies is None and not config.packed:
        params = frozen_in("bfloat16", params)
    held = round((copies or 1) * sum(x.nbytes for x in jax.tree.leaves(params)))
    needed = smallest_bytes(config, rows=4, parts=1)
    assert needed["weights"] == held
    available = sum(needed.values())
    monkeypatch.setattr("jaxopt_lab.train.machine.memory_bytes", lambda: available)
    assert check_memory(config) is None
    monkeypatch.setattr("jaxopt_lab.train.machine.memory_bytes", lambda: available - 1)
    with pytest.raises(ConfigError, match=f"at least .*{held:,} bytes.* for weights"):
        check_memory(config)


@pytest.mark.slow  # compiles a run
def test_a_run_beside_packed_weights(base, text, tmp_path):
    flags = [LORA, "--tokenizer.kind bytes --steps 3 --optimizer.learning-rate 0.1"]
    config = finetune_config(base, text, tmp_path / "run", *flags)
    packed = read_base(config, config.model).params
    assert sum(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))) == 7  # and the table
    summary = finetune(config).summary
    assert summary["trainable_share"] < 0.1
    # Merging gives numbers: those of the weights unpacked with the same adapter.
    _, floats = models.load_gguf(f"{base}/model.gguf")
    _, merged, _ = load_params(tmp_path / "run", step="best")
    names = (models.matrix_axes(CONFIG), models.matrix_names(CONFIG))
    adapters, spec = lora.load(tmp_path / "run" / "adapter", floats, *names)
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(floats, adapters, spec))
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), merged, floats)
    assert sum(jax.tree.leaves(moved)) == 2 and moved["layers"]["mlp"]["down"]["kernel"]


@pytest.mark.parametrize("what", ["full", "head"])
def test_packed_weights_cannot_move(what, base, text, tmp_path):
    config = finetune_config(base, text, tmp_path / "run", "--packed", f"--trainable {what}")
    with pytest.raises(ConfigError, match="packed weights cannot be trained: .* --no-packed"):
        finetune(config)


def test_other_directories_have_nothing_packed(text, tmp_path):
    config = finetune_config(write_base(tmp_path), text, tmp_path / "run", "--packed")
    with pytest.raises(ConfigError, match="expected a --model in a GGUF file"):
        finetune(config)
