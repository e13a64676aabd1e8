"""Encoders with a head and decoders with a prompt: rows, losses, evaluation, adapters, meshes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab import data, lora, models, tasks
from jaxopt_lab.models import DecoderConfig, EncoderConfig
from jaxopt_lab.step import accumulated, backprop
from jaxopt_lab.train.evaluation import HeldOut
from tests.data.synthetic import byte_tokenizer

CONFIG = EncoderConfig(vocab_size=64, width=32, depth=1, heads=4, context=16, classes=3)
DECODER = DecoderConfig(vocab_size=257, width=32, depth=1, heads=4, context=32)
PROMPT = tasks.Prompt("<{text}>={label}.", ("a", "b", "c"))
CLASSES = ("low", "middle", "high")
MESH = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


class Encoded(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray


class Words:
    """A tokenizer whose tokens are the numbers in a text; 1 in front, 0 for padding."""

    vocab_size = 64

    def encode(self, texts, *, length):
        rows = [([1] + [int(word) for word in text.split()])[:length] for text in texts]
        tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
        return Encoded(tokens, np.array([[i < len(r) for i in range(length)] for r in rows]))


def split_of(count, seed):
    """Texts of 1 to 12 numbers; the class is that of the one below 5."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    texts = []
    for label in labels:
        words = rng.integers(5, 64, rng.integers(1, 12))
        words[rng.integers(len(words))] = 2 + label
        texts.append(" ".join(map(str, words)))
    return data.LabelledSplit(tuple(map(str, range(count))), tuple(texts), labels)


CORPUS = data.LabelledCorpus(
    "numbers", "0", CLASSES, split_of(120, 0), split_of(50, 1), split_of(40, 2), {}
)


@pytest.fixture(scope="module")
def rows():
    return tasks.encoder_rows(CONFIG, CORPUS, Words(), length=16)


@pytest.fixture(scope="module")
def params():
    return models.encoder.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    """Task, logits and rows of a decoder of bytes, and its parameters."""
    tokenizer = byte_tokenizer()
    words = tasks.word_tokens(PROMPT, CORPUS, tokenizer)
    found = tasks.prompt_rows(DECODER, CORPUS, tokenizer, PROMPT, length=32)
    task = tasks.prompted(DECODER, MESH, words, found, length=32, eval_batch=16)
    return task, tasks.prompt_logits(DECODER, words), found, task.init(jax.random.key(0))


def test_a_row_is_a_function_of_its_number_and_an_epoch_has_every_row_once(rows):
    task = tasks.labelled(CONFIG, MESH, rows, length=16, seed=3)
    whole = task.batch(range(240))
    for number in (0, 7, 119, 120, 239):
        one = task.batch([number])
        for name in ("tokens", "mask", "label"):
            assert (one[name][0] == whole[name][number]).all()
            assert one[name].dtype == task.batch_spec[name].dtype
            assert one[name].shape[1:] == task.batch_spec[name].shape
    texts = [tuple(row) for row in whole["tokens"]]
    known = sorted(map(tuple, rows["train"].tokens))
    assert sorted(texts[:120]) == sorted(texts[120:]) == known
    assert texts[:120] != texts[120:]
    assert set(zip(texts, whole["label"].tolist(), strict=True)) == set(
        zip(map(tuple, rows["train"].tokens), rows["train"].label.tolist(), strict=True)
    )
    other = tasks.labelled(CONFIG, MESH, rows, length=16, seed=4).batch(range(120))
    assert [tuple(row) for row in other["tokens"]] != texts[:120]


def test_the_loss_is_a_mean_over_the_rows_that_count(rows, params):
    loss = jax.jit(tasks.classification_loss(tasks.encoder_logits(CONFIG)))
    part = {name: x[:6] for name, x in rows["train"]._asdict().items()}
    value, weight, metrics = loss(params, part, None)
    assert weight == 6
    logits = jax.jit(tasks.encoder_logits(CONFIG))(params, part, None)
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, part["label"])
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["accuracy"], (logits.argmax(1) == part["label"]).mean(), rtol=1e-6
    )
    less = {**part, "weight": jnp.array([1.0, 0, 1, 0, 0, 1])}
    value, weight, _ = loss(params, less, None)
    assert weight == 3
    np.testing.assert_allclose(value, wanted[np.array([0, 2, 5])].mean(), rtol=1e-6)


def test_evaluation_counts_every_row_once_and_agrees_with_the_rows(rows, params):
    task = tasks.labelled(CONFIG, MESH, rows, length=16, eval_batch=16)  # 50 = 3 * 16 + 2
    assert list(task.evaluations) == ["validation"]
    shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), task.param_specs)
    held_out = HeldOut(task.evaluations, MESH, shardings)
    assert held_out.ranking == "validation_loss"
    scores = held_out.scores(params)
    found = tasks.row_results(
        tasks.encoder_logits(CONFIG), params, rows["validation"], batch_size=7
    )
    assert len(found.nats) == 50
    np.testing.assert_allclose(scores["validation_loss"], found.nats.mean(), rtol=1e-6)
    np.testing.assert_allclose(scores["validation_accuracy"], found.accuracy, rtol=1e-6)
    about = task.evaluations["validation"].about
    labels, most = CORPUS.validation.labels, np.bincount(CORPUS.train.labels).argmax()
    assert about["majority_accuracy"] == (labels == most).mean() and about["rows"] == 50


def test_dropout_is_for_training_alone(rows, params):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    task = tasks.labelled(config, MESH, rows, length=16)
    batch = {name: x[:6] for name, x in rows["train"]._asdict().items()}

    def losses(loss):
        return [float(loss(params, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)]

    first, again, other = losses(jax.jit(task.loss))
    assert first == again != other
    assert len(set(losses(jax.jit(task.evaluations["validation"].loss)))) == 1


def trained(loss, params, batch_of, steps, rate=3e-3):
    tx = optax.adam(rate)

    @jax.jit
    def step(params, state, batch):
        found = backprop(loss, params, batch, jax.random.key(0))
        updates, state = tx.update(found.grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(steps):
        params, state = step(params, state, batch_of(range(number * 24, number * 24 + 24)))
    return params


def test_an_encoder_learns_from_what_the_task_gives(rows, params):
    task = tasks.labelled(CONFIG, MESH, rows, length=16)
    logits = tasks.encoder_logits(CONFIG)
    before = tasks.row_results(logits, params, rows["test"]).accuracy
    after = tasks.row_results(
        logits, trained(task.loss, params, task.batch, 80), rows["test"]
    ).accuracy
    assert before < 0.7 and after > 0.9


def test_a_decoder_learns_from_the_same_protocol(prompts):
    task, logits, found, params = prompts
    first = found["train"]._replace(**{k: v[:24] for k, v in found["train"]._asdict().items()})
    before = tasks.row_results(logits, params, first)
    batch = {name: x[:24] for name, x in first._asdict().items()}
    after = tasks.row_results(logits, trained(task.loss, params, lambda _: batch, 60), first)
    assert before.accuracy < 0.7 and after.accuracy > 0.9
    assert 0.9 < before.nats.mean() / np.log(3) < 1.2


def test_the_prompt_around_texts_long_and_short(prompts):
    _, _, found, _ = prompts
    tokenizer = byte_tokenizer()
    text, row = CORPUS.test.texts, found["test"]
    cut = 0
    for number, label in enumerate(CORPUS.test.labels):
        told = tokenizer.decode(row.tokens[number][row.mask[number]])
        assert told == ("<" + text[number])[:30] + ">="
        cut += len(text[number]) > 29
        assert row.label[number] == label
    assert 0 < cut < 40
    with pytest.raises(ValueError, match="length: got 3, wanted more than"):
        tasks.prompt_rows(DECODER, CORPUS, tokenizer, PROMPT, length=3)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_class_scores_as_its_word_at_the_place_of_the_label(prompts, document_mask):
    _, _, found, params = prompts
    config = dataclasses.replace(DECODER, document_mask=document_mask)
    logits = jax.jit(tasks.prompt_logits(config, np.array([97, 98, 99])))
    part = {name: x[:8] for name, x in found["test"]._asdict().items()}
    scores = logits(params, part, None)
    everything = jax.jit(lambda p, t: models.apply(DECODER, p, t))(params, part["tokens"])
    last = part["mask"].sum(1) - 1
    wanted = everything[np.arange(8), last][:, [97, 98, 99]]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    padded = {**part, "tokens": np.where(part["mask"], part["tokens"], 7)}
    np.testing.assert_allclose(logits(params, padded, None), scores, atol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_adapters_come_in_as_sides(kind, rows, params, prompts):
    if kind == "encoder":
        config, logits, found = CONFIG, tasks.encoder_logits(CONFIG), rows
    else:
        config, (_, logits, found, params) = DECODER, prompts
    axes = models.matrix_axes(config)
    spec = lora.resolve(lora.LoraConfig(rank=2, target="all-linear"), params, axes)
    adapters = lora.init(jax.random.key(1), spec, params)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    batch = {name: x[:6] for name, x in found["train"]._asdict().items()}
    loss = jax.jit(tasks.classification_loss(logits))
    beside = loss(params, batch, None, side=lora.side(adapters, spec))[0]
    merged = loss(lora.merge(params, adapters, spec), batch, None)[0]
    plain = loss(params, batch, None)[0]
    np.testing.assert_allclose(beside, merged, rtol=2e-5)
    assert abs(beside - plain) > 1e-3
    results = tasks.row_results(
        logits, params, found["test"], side=lora.side(adapters, spec), batch_size=16
    )
    again = tasks.row_results(
        logits, lora.merge(params, adapters, spec), found["test"], batch_size=16
    )
    np.testing.assert_allclose(results.nats, again.nats, rtol=2e-4)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_eight_devices_compute_what_one_does(kind, rows, params, prompts):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    if kind == "encoder":
        task = tasks.labelled(CONFIG, mesh, rows, length=16)
        alone = tasks.labelled(CONFIG, MESH, rows, length=16)
    else:
        alone, _, found, params = prompts
        task = tasks.prompted(DECODER, mesh, np.array([97, 98, 99]), found, length=32)
    batch = task.batch(range(8))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), task.param_specs)
    there = jax.device_put(params, shardings)
    estimate = jax.jit(lambda p, b: accumulated(2)(task.loss, p, b, jax.random.key(0)))
    one = jax.jit(lambda p, b: backprop(alone.loss, p, b, jax.random.key(0)))
    found, wanted = estimate(there, placed), one(params, batch)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["accuracy"], wanted.metrics["accuracy"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(wanted.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4)


def test_what_does_not_fit_is_refused_before_anything_is_compiled():
    two = dataclasses.replace(CONFIG, classes=2)
    with pytest.raises(ValueError, match="classes: got 2, wanted those of numbers: 3"):
        tasks.encoder_rows(two, CORPUS, Words())
    with pytest.raises(ValueError, match="classes: got None"):
        tasks.labelled(dataclasses.replace(CONFIG, classes=None), MESH)
    few = dataclasses.replace(CONFIG, vocab_size=63)
    with pytest.raises(ValueError, match="vocab_size: got 63, but the tokenizer has 64 tokens"):
        tasks.encoder_rows(few, CORPUS, Words(), length=16)
    with pytest.raises(ValueError, match="length: got 17, wanted at most context = 16"):
        tasks.encoder_rows(CONFIG, CORPUS, Words(), length=17)
    small = dataclasses.replace(DECODER, vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size: got 256, but the tokenizer has 257"):
        tasks.prompt_rows(small, CORPUS, byte_tokenizer(), PROMPT, length=32)


def test_words_and_templates_that_cannot_be_scored():
    tokenizer = byte_tokenizer()
    for template in ("{label}: {text}", "{text}", "{text} {text} {label}"):
        with pytest.raises(ValueError, match="Prompt.template: got .* wanted {text} once"):
            tasks.Prompt(template)
    for words in (("a", "a"), ("a",)):
        with pytest.raises(ValueError, match="Prompt.words: got .* wanted distinct words"):
            tasks.Prompt(words=words)
    with pytest.raises(ValueError, match="one for each class: low, middle, high"):
        tasks.word_tokens(tasks.Prompt(), CORPUS, tokenizer)
    long = tasks.Prompt("{text}={label}", ("a", "bc", "d"))
    with pytest.raises(ValueError, match=r"'bc' is 2 tokens, \['b', 'c'\], wanted one"):
        tasks.word_tokens(long, CORPUS, tokenizer)
    spaced = tasks.Prompt("{text} {label}", ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"' a' is 2 tokens, \[' ', 'a'\], wanted one"):
        tasks.word_tokens(spaced, CORPUS, tokenizer)


def test_a_task_without_rows_can_still_be_compiled():
    task = tasks.labelled(CONFIG, MESH, length=16)
    assert task.batch is None and not task.evaluations
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    key = jax.random.key(0)
    objective, weight, metrics = jax.eval_shape(task.loss, abstract, task.abstract_batch(4), key)
    assert objective.shape == weight.shape == metrics["accuracy"].shape == ()
    assert "head" in abstract and task.heads == ("head",)
