"""BERT directories: hidden states that transformers recorded, names of every age, refusals."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxopt_lab.data import WordPiece
from jaxopt_lab.data.cache import cache_root
from jaxopt_lab.models import encoder, load_bert, parameter_count
from tests.models.decoders import largest_difference
from tests.models.encoders import hidden, wide

RECORDED = pathlib.Path(__file__).parent / "data" / "bert"


@pytest.fixture
def directory(tmp_path):
    """A copy to change, and its tensors."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    return tmp_path, dict(load_file(tmp_path / "model.safetensors"))


def rewrite(path, tensors=None, **fields):
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **fields}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


def test_hidden_states_are_those_of_transformers():
    config, params = load_bert(RECORDED)
    recorded = np.load(RECORDED / "hidden.npz")
    there = recorded["mask"]
    found = hidden(config, params, dict(recorded))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[there], recorded["float32"][there], rtol=0, atol=1e-5)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, "float64"), params)
        found = hidden(wide(config), params, dict(recorded))
        np.testing.assert_allclose(found[there], recorded["float64"][there], rtol=0, atol=1e-13)


def test_fields_of_the_configuration():
    config, params = load_bert(RECORDED)
    assert (config.dropout, config.attention_dropout, config.pooling) == (0.1, 0.2, "mean")
    assert (config.norm_eps, config.activation, config.classes) == (1e-12, "gelu", None)
    assert parameter_count(config) == sum(x.size for x in jax.tree.leaves(params))


def test_names_of_other_versions(directory):
    path, tensors = directory
    _, wanted = load_bert(path)
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
        if not name.startswith("pooler.")
    }
    old["bert.embeddings.position_ids"] = np.arange(12, dtype=np.int64)[None]
    old["cls.predictions.bias"] = np.zeros(48, np.float32)
    rewrite(path, old, hidden_act="gelu_new")
    config, found = load_bert(path)
    assert largest_difference(found, wanted) == 0 and config.activation == "gelu_tanh"


def test_half_precision_files(directory):
    path, tensors = directory
    _, wanted = load_bert(path)
    rewrite(path, {name: value.astype(np.float16) for name, value in tensors.items()})
    _, found = load_bert(path)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert 0 < largest_difference(found, wanted) < 2e-3


def test_pooling_of_a_sentence_encoder(directory):
    path, _ = directory
    (path / "1_Pooling").mkdir()
    file = path / "1_Pooling" / "config.json"
    modes = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": False}
    file.write_text(json.dumps({**modes, "pooling_mode_cls_token": True}))
    assert load_bert(path)[0].pooling == "cls"
    file.write_text(json.dumps({**modes, "pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="got pooling_mode_max_tokens, wanted one of"):
        load_bert(path)


def test_one_error_lists_all_tensors(directory):
    path, tensors = directory
    gone, bent = "encoder.layer.1.output.dense.bias", "encoder.layer.0.attention.self.key.weight"
    tensors.pop(gone)
    tensors[bent] = tensors[bent][:, :8].copy()
    tensors["classifier.weight"] = np.zeros((2, 16), np.float32)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(16, np.int32)
    rewrite(path, tensors)
    with pytest.raises(ValueError) as error:
        load_bert(path)
    for part in (
        rf"missing: {gone} (16,);",
        r"unknown: classifier.weight (2, 16);",
        rf"{bent} (16, 8) float32 instead of (16, 16) in floats",
        r"embeddings.LayerNorm.bias (16,) int32 instead of (16,) in floats",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 50}, r"word_embeddings.weight \(48, 16\) float32 instead of \(50, 16\)"),
        ({"max_position_embeddings": 8}, r"position_embeddings.weight \(12, 16\) .* \(8, 16\)"),
        ({"type_vocab_size": 1}, r"token_type_embeddings.weight \(2, 16\) .* \(1, 16\)"),
        ({"num_hidden_layers": 2}, "unknown: encoder.layer.2.attention"),
        ({"num_attention_heads": 3}, "heads: got 3, wanted a divisor"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu', wanted 'gelu' or"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: got 'quick_gelu'"),
        ({"model_type": "roberta"}, "model_type: got 'roberta', wanted 'bert'"),
        ({"model_type": None}, "model_type: got None"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got"),
        ({"is_decoder": True}, "is_decoder: got True, wanted False"),
        ({"hidden_size": None, "vocab_size": None}, "config.json: no vocab_size, hidden_size"),
    ],
)
def test_refused_configurations(directory, fields, message):
    rewrite(directory[0], **fields)
    with pytest.raises(ValueError, match=message):
        load_bert(directory[0])


def test_a_missing_file(directory):
    (directory[0] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_bert(directory[0])


@pytest.mark.slow
def test_real_sentences():
    """all-MiniLM-L6-v2: cosines that transformers 5.24 computed in float64."""
    found = sorted((cache_root(None) / "packages").glob("minilm-*"))
    if not found:
        pytest.skip("no all-MiniLM-L6-v2 here; run `jaxopt-lab data fetch minilm`")
    config, params = load_bert(found[-1])
    assert (parameter_count(config), config.pooling) == (22_565_376, "mean")
    rows = WordPiece.load(found[-1]).encode(
        [
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "The girl is carrying a baby.",
            "The film was a wonderful, moving surprise!",
        ],
        length=16,
    )
    with jax.enable_x64(True):
        wide_params = jax.tree.map(lambda x: jnp.asarray(x, "float64"), params)
        for c, p in ((config, params), (wide(config), wide_params)):
            x = encoder.hidden(c, p, rows.tokens, rows.mask)
            x = encoder.pooled(x, rows.mask, c.pooling)
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
            wanted = [[0.7553, -0.1050, -0.1192], [-0.0610, -0.0694], [0.0887]]
            cosines = np.asarray(x @ x.T)
            for i, row in enumerate(wanted):
                np.testing.assert_allclose(cosines[i, i + 1 :], row, atol=1e-4)
