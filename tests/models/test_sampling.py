import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab.models import generate, partition_specs, sampling
from jaxopt_lab.report.hlo import collectives
from tests.models.decoders import GPT2, LLAMA, logits, tokens, varied_params

KEY = jax.random.key(0)


def greedy(config, params, prompt, steps):
    """Token by token through the full forward pass on the last `context` tokens."""
    known = np.asarray(prompt)
    for _ in range(steps):
        window = known[:, -config.context :]
        padded = np.pad(window, ((0, 0), (0, config.context - window.shape[1])))
        scores = np.asarray(logits(config, params, padded))[:, window.shape[1] - 1]
        known = np.concatenate([known, scores.argmax(-1)[:, None]], axis=1)
    return known


@pytest.mark.parametrize("length", [3, 12, 17])
def test_greedy_continuation_equals_the_full_forward(length):
    params = varied_params(GPT2)
    prompt = tokens(GPT2, length=length)
    drawn = generate(GPT2, params, prompt, steps=14, temperature=0, key=KEY)
    np.testing.assert_array_equal(drawn, greedy(GPT2, params, prompt, 14))


def test_samples_follow_the_softmax():
    config = dataclasses.replace(LLAMA, vocab_size=8, depth=1)
    params = varied_params(config)
    prompt = np.tile([[1, 5, 2]], (4000, 1))
    drawn = np.asarray(generate(config, params, prompt, steps=1, temperature=0.5, key=KEY))[:, 3]
    scores = np.asarray(logits(config, params, prompt[:1]))[0, -1] / 0.5
    expected = np.exp(scores) / np.exp(scores).sum()
    frequency = np.bincount(drawn, minlength=8) / len(drawn)
    assert np.abs(frequency - expected).max() < 5 * 0.5 / len(drawn) ** 0.5
    assert np.ptp(expected) > 0.1


def test_one_prompt_without_batch_axis_and_with_document_mask():
    config = dataclasses.replace(LLAMA, document_mask=True)
    params = varied_params(config)
    prompt = tokens(config, batch=1, length=4)
    one = generate(config, params, prompt[0], steps=3, key=KEY)
    assert one.shape == (7,)
    np.testing.assert_array_equal(one, generate(LLAMA, params, prompt, steps=3, key=KEY)[0])


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_a_sharded_model_continues_as_a_whole_one_and_is_not_gathered(axis):
    config = dataclasses.replace(LLAMA, vocab_size=256, width=64, hidden=128, depth=1)
    params, prompt = varied_params(config), tokens(config, batch=1, length=5)[0]
    alone = generate(config, params, prompt, steps=6, key=KEY)
    mesh = jax.make_mesh((4,), (axis,), (AxisType.Auto,), devices=jax.devices()[:4])
    at = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(config, mesh),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    params = jax.device_put(params, at)
    np.testing.assert_array_equal(generate(config, params, prompt, steps=6, key=KEY), alone)
    program = sampling._continue.lower(config, 6, params, prompt[None], 1.0, KEY).compile()
    moved = sum(total.bytes for total in collectives(program.as_text()).values())
    assert 0 < moved < sum(x.nbytes for x in jax.tree.leaves(params)) / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": np.zeros((2, 0), int)}, r"prompt_tokens: got shape \(2, 0\)"),
        ({"steps": -1}, "steps: got -1, wanted at least 0"),
        ({"temperature": -0.5}, "temperature: got -0.5, wanted at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"prompt_tokens": np.zeros(3, int), "steps": 1, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        generate(LLAMA, {}, **arguments, key=KEY)
