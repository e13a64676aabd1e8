"""Adapters on disk: peft's layout in both directions, and what must be refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.flax import load_file, save_file

from jaxopt_lab import lora, models
from tests.lora.test_side import logits, made, parameters
from tests.models.decoders import GPT2_BIASED, GQA, LLAMA

PREFIX = "base_model.model.model.layers"


def opened(config, directory, params=None):
    params = parameters(config) if params is None else params
    names = models.matrix_names(config)
    return lora.load(directory, params, models.matrix_axes(config), names)


OPTIONS = {
    "all": {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"o_proj": 1.0}},
    "some, bfloat16": {"target": ("q_proj", "v_proj"), "dtype": "bfloat16", "rslora": True},
    "dora": {"dora": True, "layers": (1,)},
    "whole": {"full": ("final_norm", "head"), "bias": "lora_only", "target": ("o_proj",)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_written_and_read(kind, tmp_path):
    config = dataclasses.replace(GQA)
    adapters, spec = made(config, **{"dtype": "float32", **OPTIONS[kind]})
    adapters = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == "float64" else x, adapters
    )
    lora.save(tmp_path / "adapter", adapters, spec, base=parameters(config))
    got, found = opened(config, tmp_path / "adapter")
    assert jax.tree.structure(got) == jax.tree.structure(adapters)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(adapters), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [e[:5] for e in found.adapters] == [e[:5] for e in spec.adapters]
    np.testing.assert_allclose([e.scale for e in found.adapters], [e.scale for e in spec.adapters])
    assert found.full == spec.full
    params = parameters(config)
    for path in spec.full:  # what is trained whole comes back, and is used
        merged = lora.merge(params, got, found)
        node, wanted = merged, adapters
        for name in path:
            node, wanted = node[name], wanted[name]
        np.testing.assert_array_equal(node, wanted)


def test_layout(tmp_path):
    adapters, spec = made(LLAMA, dtype="float32", target=("v_proj", "down_proj"))
    lora.save(tmp_path, adapters, spec)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 8
    v = adapters["layers"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}.1.self_attn.v_proj.lora_A.weight"], v["a"][1].T
    )
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}.1.self_attn.v_proj.lora_B.weight"], v["b"][1].T
    )
    assert tensors[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"].shape == (2, 24)
    assert tensors[f"{PREFIX}.0.mlp.down_proj.lora_B.weight"].shape == (16, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert "model.layers.1.self_attn.v_proj" in config["target_modules"]


def test_weights_are_folded(tmp_path):
    adapters, spec = made(LLAMA, dtype="float32", weights=True)
    lora.save(tmp_path, adapters, spec)
    got, found = opened(LLAMA, tmp_path)
    params = parameters(LLAMA)
    np.testing.assert_allclose(
        logits(LLAMA, params, lora.side(got, found)),
        logits(LLAMA, params, lora.side(adapters, spec)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_pruned_and_grown_adapter(tmp_path):
    adapters, spec = made(LLAMA, dtype="float32", weights=True)
    tx = lora.weight_lora_plus(1e-3)
    adapters, spec, _ = lora.select_and_grow(
        adapters, spec, tx, tx.init(adapters), jax.random.key(0)
    )
    lora.save(tmp_path / "grown", adapters, spec)
    got, found = opened(LLAMA, tmp_path / "grown")
    assert [(e.kept, e.rank) for e in found.adapters] == [(e.kept, e.rank) for e in spec.adapters]
    np.testing.assert_allclose([e.scale for e in found.adapters], [e.scale for e in spec.adapters])
    again = lora.spec_from_json(json.loads(json.dumps(lora.spec_to_json(spec))))
    assert again == spec and hash(again) == hash(spec)
    del got


def changed(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{PREFIX}.0.mlp.down_proj.lora_B.weight"),
            "no tensor .*down_proj.lora_B",
        ),
        (lambda t: t.update({"lm_head.weight": jnp.ones(3)}), "got lm_head.weight, wanted lora_A"),
        (
            lambda t: t.update(
                {
                    f"{PREFIX}.7.mlp.down_proj.lora_{s}.weight": t[
                        f"{PREFIX}.0.mlp.down_proj.lora_{s}.weight"
                    ]
                    for s in "AB"
                }
            ),
            r"'model.layers.7.mlp.down_proj' matches nothing; there are",
        ),
        (
            lambda t: t.update(
                {k: x.T for k, x in t.items() if k == f"{PREFIX}.0.mlp.down_proj.lora_A.weight"}
            ),
            r"got shape \(24, 2\), wanted \(2, 24\); it seems to be transposed",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path, change, message):
    adapters, spec = made(LLAMA, dtype="float32")
    lora.save(tmp_path, adapters, spec)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        opened(LLAMA, tmp_path)


def test_other_refusals(tmp_path):
    adapters, spec = made(LLAMA, dtype="float32")
    params = parameters(LLAMA)
    lora.save(tmp_path / "a", adapters, spec, base=params)
    with pytest.raises(FileExistsError, match="already exists"):
        lora.save(tmp_path / "a", adapters, spec)
    other = jax.tree.map(lambda x: x + 1e-3, params)
    with pytest.raises(ValueError, match="belongs to other base weights"):
        opened(LLAMA, tmp_path / "a", other)
    with pytest.raises(FileNotFoundError):
        opened(LLAMA, tmp_path / "b")
    three = dataclasses.replace(GPT2_BIASED, fused_qkv_as="three")
    fused, fused_spec = made(three, dtype="float32")
    with pytest.raises(ValueError, match="several matrices are one module transformer.h.0.attn"):
        lora.save(tmp_path / "c", fused, fused_spec)
    assert not (tmp_path / "c").exists()
    one = dataclasses.replace(GPT2_BIASED, fused_qkv_as="one")
    lora.save(tmp_path / "d", *made(one, dtype="float32"))
    opened(one, tmp_path / "d")


def test_a_run_goes_on_across_a_pruning():
    # A checkpoint of adapters and state, restored across a pruning, goes on bitwise.
    import flax.serialization

    adapters, spec = made(LLAMA, dtype="float32", weights=True, target=("q_proj",))
    tx = lora.weight_lora(1e-2, keep=1, freeze_after=2)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state, t):
        grads = jax.tree.map(lambda x: jnp.cos(x + t), adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for t in range(2):
        adapters, state = step(adapters, state, t)
    adapters, spec, state = lora.prune(adapters, spec, tx, state)
    stored = flax.serialization.to_bytes({"adapters": adapters, "state": state})
    written = json.dumps(lora.spec_to_json(spec))

    restored_spec = lora.spec_from_json(json.loads(written))
    blank = lora.init(jax.random.key(9), restored_spec, parameters(LLAMA))
    fresh = {"adapters": blank, "state": tx.init(blank)}
    restored = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(fresh, stored))
    for t in range(2, 4):
        adapters, state = step(adapters, state, t)
        again = step(restored["adapters"], restored["state"], t)
        restored = dict(zip(("adapters", "state"), again, strict=True))
    both = jax.tree.leaves((adapters, state)), jax.tree.leaves(tuple(restored.values()))
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)


FIXTURE = pathlib.Path(__file__).parent / "data" / "peft"


def test_a_directory_that_peft_wrote(tmp_path):
    config, params = models.load_huggingface(FIXTURE / "base")
    adapters, spec = opened(config, FIXTURE / "adapter", params)
    recorded = np.load(FIXTURE / "logits.npz")
    got = models.apply(
        config, params, jnp.asarray(recorded["tokens"]), side=lora.side(adapters, spec)
    )
    np.testing.assert_allclose(got, recorded["logits"], rtol=1e-4, atol=1e-5)
    # And back: what we write is what peft had written.
    lora.save(tmp_path / "again", adapters, spec)
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    theirs = load_file(FIXTURE / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
