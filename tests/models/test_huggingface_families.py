"""Decoders of other families: logits that transformers recorded, and what is refused by name."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxopt_lab.models import export_huggingface, load_huggingface
from tests.models.decoders import largest_difference, logits

RECORDED = pathlib.Path(__file__).parent / "data" / "decoders"
FAMILIES = ("gpt2", "llama", "llama3", "smollm", "mistral", "qwen2", "qwen3")
WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tmp_path):
    """Copies a family to change; fields that are None are taken out."""

    def copy(family, change=lambda tensors: tensors, **fields):
        path = shutil.copytree(RECORDED / family, tmp_path / family)
        config = json.loads((path / "config.json").read_text()) | fields
        kept = {name: value for name, value in config.items() if value != "absent"}
        (path / "config.json").write_text(json.dumps(kept))
        if (path / WEIGHTS).exists():
            save_file(change(dict(load_file(path / WEIGHTS))), path / WEIGHTS)
        return path

    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    config, params = load_huggingface(RECORDED / family)
    recorded = np.load(RECORDED / family / "logits.npz")
    found = logits(config, params, recorded["tokens"].astype(np.int32))
    np.testing.assert_allclose(found, recorded["logits"], rtol=0, atol=1e-5)
    export_huggingface(config, params, tmp_path)
    for ours in (True, False):  # read from our section and from their fields
        fields = json.loads((tmp_path / "config.json").read_text())
        fields = fields if ours else {k: v for k, v in fields.items() if k != "jaxopt_lab"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        again, loaded = load_huggingface(tmp_path)
        assert dataclasses.replace(again, hidden=config.hidden) == config
        assert largest_difference(loaded, params) == 0


def test_one_error_lists_all_tensors(copied):
    def change(tensors):
        tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.bool_)  # a mask, which is left alone
        tensors["transformer.h.0.attn.c_attn.weight"] = np.ascontiguousarray(
            tensors["transformer.h.0.attn.c_attn.weight"].T
        )
        tensors["transformer.h.1.ln_1.bias"] = np.zeros(8, np.int8)
        tensors["transformer.h.1.attn.q_norm.weight"] = np.ones(4, np.float32)
        del tensors["transformer.wpe.weight"]
        return tensors

    with pytest.raises(ValueError) as error:
        load_huggingface(copied("gpt2", change))
    for part in (
        "missing: transformer.wpe.weight (16, 8);",
        "unknown: transformer.h.1.attn.q_norm.weight (4,);",
        "transformer.h.0.attn.c_attn.weight (24, 8) float16 instead of (8, 24) in floats",
        "transformer.h.1.ln_1.bias (8,) int8 instead of (8,) in floats",
    ):
        assert part in str(error.value)
    assert "attn.bias" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: got False, wanted True"),
        ("gpt2", {"quantization_config": {"bits": 8}}, "quantization_config: got"),
        ("gpt2", {"n_head": "absent"}, "config.json: no n_head"),
        ("llama", {"logit_scale": 2.0}, "unknown logit_scale = 2.0; remove"),
        ("llama", {"mlp_bias": False}, "mlp_bias: got False, wanted True"),
        ("llama3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("mistral", {"sliding_window": 8}, "sliding_window: got 8, wanted None"),
        ("mistral", {"sliding_window": "absent"}, "config.json: no sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: got True, wanted False"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "got sliding_attention, wanted full"),
        ("qwen3", {"model_type": "llama"}, "unknown: .*k_norm.weight"),
        ("smollm", {"model_type": "qwen2"}, "missing: .*k_proj.bias .4,"),
    ],
)
def test_refused_configurations(copied, family, fields, message):
    with pytest.raises(ValueError, match=message):
        load_huggingface(copied(family, **fields))


def test_a_head_beside_a_tied_embedding_repeats_it(copied):
    def change(tensors):
        table = tensors["model.embed_tokens.weight"]
        return tensors | {"lm_head.weight": table + np.float16(shift)}

    shift = 0
    path = copied("smollm", change)
    load_huggingface(path)
    shift = 1
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head.weight: differs from the embedding"):
        load_huggingface(path)


def test_shards_are_those_of_the_index(copied):
    path = copied("qwen3")
    first, *_, last = sorted(path.glob("model-*.safetensors"))
    shutil.copy(first, path / "model-extra.safetensors")
    with pytest.raises(ValueError, match=r"model-extra.safetensors not in model.safetensors.index"):
        load_huggingface(path)
    (path / "model-extra.safetensors").unlink()
    name, *_ = tensors = load_file(last)
    save_file({k: v for k, v in tensors.items() if k != name}, last)
    with pytest.raises(ValueError, match=rf"{last.name}: has other tensors .*: {name}$"):
        load_huggingface(path)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {last.name}, which"):
        load_huggingface(path)


def test_fields_that_were_changed_beside_ours(tmp_path):
    config, params = load_huggingface(RECORDED / "qwen3")
    export_huggingface(config, params, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_theta": 7.0}))
    with pytest.raises(ValueError, match="rope_theta: got 7.0, but the section jaxopt_lab says"):
        load_huggingface(tmp_path)
    fields["jaxopt_lab"]["window"] = 3
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="jaxopt_lab: .* unexpected keyword argument 'window'"):
        load_huggingface(tmp_path)
