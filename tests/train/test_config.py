import functools
import json
from dataclasses import dataclass, fields, replace

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.data import CORPORA, Mixture, PreparedTfds, PreparedTokens, PythonSource, TextFiles
from jaxopt_lab.models import PRESETS, DecoderConfig, abstract_params, roles
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.bounds import Count, check_bounds
from jaxopt_lab.train.config.choices import name_of
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers import (
    OPTIMIZERS,
    AdamWConfig,
    LionMuonConfig,
    ModelInfo,
    MuonConfig,
    SignMuonConfig,
)
from jaxopt_lab.train.config.optimizers_pairs import ScaledLorsumConfig
from jaxopt_lab.train.config.run import (
    PretrainConfig,
    RunConfig,
    check_vocabulary,
    from_preset,
    validate,
    with_preset,
)
from jaxopt_lab.train.config.schedules import SCHEDULES, CosineConfig, WsdConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.config.trainable import TRAINABLES, FullConfig
from jaxopt_lab.train.config.tuned import FINETUNED, TUNED, default_optimizer
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.machine import check_memory, smallest_bytes
from jaxopt_lab.train.program import model_of

DEFAULT = PretrainConfig()
CORPUS_EXAMPLES = {
    "python-source": PythonSource(("stdlib", "/src")),
    "text-files": TextFiles(("a/*.txt", "b.md")),
    "prepared-tfds": PreparedTfds("/data", text_field="body"),
    "prepared-tokens": PreparedTokens("/data", tokens_field="ids"),
    "mixture": Mixture((PythonSource(), TextFiles(("a",))), (3.0, 1.0)),
}


def with_optimizer(**changes):
    return replace(DEFAULT, optimizer=LionMuonConfig(**changes))


def with_schedule(**changes):
    return replace(DEFAULT, schedule=WsdConfig(**changes))


BAD = {
    "steps": (replace(DEFAULT, steps=0), "steps: got 0, expected at least 1"),
    "batch": (replace(DEFAULT, batch_size=0), "batch_size: got 0"),
    "accumulation": (replace(DEFAULT, accumulation=-1), "accumulation: got -1"),
    "batch not divisible": (
        replace(DEFAULT, batch_size=24, accumulation=2, mesh=MeshConfig(4, 2)),
        "batch_size: got 24, expected a multiple of accumulation 2 x data 4 x fsdp 2 = 16",
    ),
    "mesh": (
        replace(DEFAULT, mesh=MeshConfig(3, 1, 4)),
        "mesh: got 'data 3 x fsdp 1 x tensor 4'.*8",
    ),
    "preset": (replace(DEFAULT, preset="huge"), "model: got 'huge', expected one of tiny, gpt2"),
    "period 0": (with_optimizer(period=0), "optimizer.period: got 0, expected at least 1, or inf"),
    "negative period": (with_optimizer(period=-3), "optimizer.period: got -3"),
    "rate nan": (
        with_optimizer(learning_rate=float("nan")),
        "optimizer.learning_rate: got nan, expected a finite number",
    ),
    "rate inf": (with_optimizer(learning_rate=float("inf")), "optimizer.learning_rate: got inf"),
    "rate negative": (
        with_optimizer(learning_rate=-1e-3),
        "optimizer.learning_rate: got -0.001, expected a positive number",
    ),
    "rate zero": (with_optimizer(learning_rate=0.0), "optimizer.learning_rate: got 0.0"),
    "decay negative": (with_optimizer(weight_decay=-0.1), "optimizer.weight_decay: got -0.1"),
    "average": (with_optimizer(b2=1.0), "optimizer.b2: got 1.0"),
    "average of one on the device": (
        with_optimizer(b2=1 - 1e-9),
        "optimizer.b2: got 0.999999999, expected at least 0 and below 1, and it is 1.0 in float32",
    ),
    "rate of zero on the device": (
        with_optimizer(learning_rate=1e-40),
        "optimizer.learning_rate: got 1e-40, expected a positive number, and it is 0.0 in float32",
    ),
    "two averages in sign-muon": (
        replace(DEFAULT, optimizer=SignMuonConfig(b2=0.99)),
        "optimizer.b2: got 0.99, expected b1 = 0.9",
    ),
    "warm-up too long": (
        replace(DEFAULT, schedule=CosineConfig(warmup_steps=10**6)),
        "schedule.warmup_steps: got 1000000",
    ),
    "warm-up share": (with_schedule(warmup_fraction=1.5), "schedule.warmup_fraction: got 1.5"),
    "warm-up meets decay": (
        with_schedule(warmup_fraction=0.5, decay_fraction=0.8),
        "schedule: warmup_steps",
    ),
    "decay share": (with_schedule(decay_fraction=-0.2), "schedule: decay_fraction: got -0.2"),
    "clip": (replace(DEFAULT, clip=0.0), "clip: got 0.0"),
    "clip nan": (replace(DEFAULT, clip=float("nan")), "clip: got nan"),
    "z-loss": (replace(DEFAULT, z_loss=-1.0), "z_loss: got -1.0"),
    "ema": (replace(DEFAULT, ema=1.0), "ema: got 1.0"),
    "held-out share": (replace(DEFAULT, validation_fraction=0.0), "validation_fraction: got 0.0"),
    "head chunks": (replace(DEFAULT, head_chunks=7), "head_chunks: got 7, expected a divisor"),
    "evaluation": (replace(DEFAULT, eval=EvalConfig(every=0)), "eval.every: got 0"),
    "checkpoints": (
        replace(DEFAULT, checkpoint=CheckpointConfig(keep_newest=0)),
        "checkpoint.keep_newest: got 0",
    ),
    "checkpoint clock": (
        replace(DEFAULT, checkpoint=CheckpointConfig(every_minutes=0.0)),
        "checkpoint.every_minutes: got 0.0",
    ),
    "wandb": (replace(DEFAULT, wandb=True), "wandb: got True, needs a package: pip install"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_name_field_value_and_remedy(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    config, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        validate(config, device_count=8)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_their_tokenizer_fits(name):
    config = from_preset(name)
    validate(config, device_count=8)
    assert config.tokenizer.vocab_size <= config.model.vocab_size


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_number_of_an_optimizer_is_bounded(name):
    config = OPTIMIZERS[name]()
    numbers = {f.name: getattr(config, f.name) for f in fields(config)}
    numbers = {k: v for k, v in numbers.items() if type(v) in (int, float)}
    assert "learning_rate" in numbers
    for field, value in numbers.items():
        for bad in (type(value)(-1), float("nan")):
            with pytest.raises(ConfigError, match=f"{field}: got {bad}, expected"):
                check_bounds(replace(config, **{field: bad}))


def test_a_run_that_the_memory_holds_is_not_refused(monkeypatch):
    config = from_preset("gpt2-124m")
    needed = smallest_bytes(config, rows=8, parts=1)
    # Weights and their gradients, and the logits of 8 x 512 tokens, all in float32.
    assert sum(needed.values()) > 4 * (2 * 120e6 + 8 * 512 * 50304)
    monkeypatch.setattr("jaxopt_lab.train.machine.memory_bytes", lambda: sum(needed.values()))
    check_memory(config)
    with pytest.raises(ConfigError, match="batch_size: got 9, expected less"):
        check_memory(replace(config, batch_size=9))
    check_memory(replace(config, batch_size=9), sizes=(1, 1, 2))
    check_memory(replace(config, batch_size=16), accumulation=2)


def test_every_preset_says_for_every_optimizer_whether_it_is_tuned():
    assert set(TUNED) == set(PRESETS)
    for preset, cells in TUNED.items():
        assert set(cells) == set(OPTIMIZERS)
        for name in cells:
            default_optimizer(preset, name).validate()


def test_a_run_that_was_given_its_own_rate_keeps_it_with_another_model():
    given = replace(DEFAULT, optimizer=LionMuonConfig(learning_rate=0.5))
    assert with_preset(given, "gpt2-124m").optimizer == given.optimizer
    assert with_preset(from_preset("gpt2-124m"), "tiny").optimizer == DEFAULT.optimizer


def test_unknown_preset_lists_the_choices():
    with pytest.raises(ConfigError, match="model: got 'llama', expected one of tiny, gpt2-124m"):
        from_preset("llama")


class FakeTokenizer:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def test_a_vocabulary_that_does_not_fit_is_refused_and_a_wasteful_one_noted():
    model = PRESETS["tiny"]
    with pytest.raises(ConfigError, match="model.vocab_size: got 4096, expected at least the 4097"):
        check_vocabulary(model, FakeTokenizer(4097))
    assert check_vocabulary(model, FakeTokenizer(4096)) is None
    assert check_vocabulary(model, FakeTokenizer(4000)) is None
    assert "3839 rows" in check_vocabulary(model, FakeTokenizer(257))


@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    corpus=st.sampled_from(sorted(CORPORA)),
    preset=st.sampled_from(sorted(PRESETS)),
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1e3),
    clip=st.none() | st.floats(1e-6, 1e6),
)
def test_json_holds_everything(optimizer, schedule, corpus, preset, steps, rate, clip):
    config = replace(
        from_preset(preset),
        optimizer=OPTIMIZERS[optimizer](learning_rate=rate),
        schedule=SCHEDULES[schedule](),
        corpus=CORPUS_EXAMPLES[corpus],
        steps=steps,
        clip=clip,
        mesh=MeshConfig(2, -1, 1),
    )
    assert from_json(to_json(config)) == config
    assert name_of(config.optimizer) == optimizer


def test_json_may_be_partial_and_takes_the_rest_from_the_preset():
    config = from_json('{"preset": "gpt2-124m", "model": {"depth": 2}, "optimizer": {"period": 5}}')
    assert config.model == replace(PRESETS["gpt2-124m"], depth=2)
    assert config.optimizer == LionMuonConfig(1e-3, period=5, sign_lr_ratio=1 / 60)
    assert config.tokenizer.vocab_size == 50304


def test_an_optimizer_that_json_names_has_the_rate_of_the_preset_until_it_is_given():
    config = from_json('{"preset": "gpt2-124m", "optimizer": {"name": "adamw", "b1": 0.8}}')
    assert config.optimizer == AdamWConfig(5e-4, b1=0.8)
    config = from_json('{"preset": "gpt2-124m", "optimizer": {"learning_rate": 0.5}}')
    assert config.optimizer == LionMuonConfig(0.5, sign_lr_ratio=1 / 60)


@dataclass(frozen=True)
class LabelsConfig(RunConfig):
    """What another verb might train."""

    optimizer: OptimizerConfig = AdamWConfig(1e-3)
    labels: Count = 2
    """Number of classes."""


def test_another_verb_brings_its_own_configuration(capsys):
    flags = "--model gpt2-124m --labels 3 --schedule wsd --model.depth 2".split()
    config = parse_config(flags, "classify", LabelsConfig)
    assert config.labels == 3 and config.model == replace(PRESETS["gpt2-124m"], depth=2)
    assert config.optimizer == AdamWConfig(5e-4) and config.schedule == WsdConfig()
    soap = parse_config(["--optimizer", "soap"], "classify", LabelsConfig)
    assert soap.optimizer == OPTIMIZERS["soap"]()
    assert from_json(to_json(config), LabelsConfig) == config
    with pytest.raises(ConfigError, match="labels: got 0, expected at least 1"):
        parse_config(["--labels", "0"], "classify", LabelsConfig)
    with pytest.raises(ConfigError, match="--accumulation: got '2', but there is no such setting"):
        parse_config(["--accumulation", "2"], "classify", LabelsConfig)
    with pytest.raises(SystemExit):
        parse_config(["--help"], "classify", LabelsConfig)
    assert "Number of classes" in capsys.readouterr().out


def test_json_holds_a_list_where_none_is_the_default():
    diagnostics = replace(DEFAULT.diagnostics, layers=("layers/mlp/down/kernel",))
    config = replace(DEFAULT, diagnostics=diagnostics)
    assert from_json(to_json(config)) == config and from_json(to_json(DEFAULT)) == DEFAULT


def test_json_without_period_inf_trouble():
    config = replace(DEFAULT, optimizer=LionMuonConfig(period="inf"))
    assert json.loads(to_json(config))["optimizer"]["period"] == "inf"
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stepz": 3}', "stepz: got 3, but there is no such setting; did you mean steps"),
        ('{"optimizer": {"perod": 2}}', "optimizer.perod.*did you mean period"),
        ('{"optimizer": {"name": "sgd"}}', "optimizer.name: got 'sgd', expected one of lion-muon"),
        ('{"corpus": {"name": "web"}}', "corpus.name: got 'web', expected one of python-source"),
        ('{"model": {"deep": 2}}', "model.deep"),
        ('{"model": {"width": 7}}', "model: heads: got 4, wanted a divisor of width = 7"),
        ('{"model": {"norm": "batch"}}', "model.norm: got 'batch', expected rms or layer"),
        ('{"steps": "3"}', "steps: got '3', expected int"),
        ('{"steps": true}', "steps: got True, expected int"),
        ('{"optimizer": 3}', "optimizer: got 3, expected an object"),
        ('{"corpus": {"name": "text-files", "paths": "a"}}', "corpus.paths: got 'a', expected a l"),
        ('{"preset": "x"}', "model: got 'x'"),
        ("[1]", "expected a JSON object"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"optimizer": {"name": {"name": "adamw"}}}', "optimizer.name: got {'name': 'adamw'}"),
    ],
)
def test_json_names_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(text)


def test_flops_of_an_optimizer_step():
    params = {"w": np.zeros((3, 8, 4)), "b": np.zeros(10)}
    axes = {"w": MuonDimensionNumbers(1, 2), "b": None}
    elementwise = 6 * 96 + 12 * 10
    spectral = 3 * 5 * 2 * 4**2 * (2 * 8 + 4)

    def flops(optimizer, **changes):
        return OPTIMIZERS[optimizer](**changes).mean_flops(params, axes)

    assert flops("adamw") == 12 * 106 and flops("lion") == flops("signum") == 6 * 106
    assert flops("muon") == flops("optax-muon") == spectral + elementwise
    assert flops("lion-muon") == spectral / 2 + elementwise
    assert flops("lion-muon", period="inf") == elementwise
    # A GPT of 124M parameters with fused projections and 16384 tokens a step: 1.5e12.
    shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    gpt = [np.broadcast_to(0.0, (12, *shape)) for shape in shapes]
    layout = [MuonDimensionNumbers(1, 2)] * 4
    np.testing.assert_allclose(MuonConfig().mean_flops(gpt, layout), 1.5e12, rtol=0.03)


# One of each class that has a `build` of its own.
@pytest.mark.parametrize(
    "name", ["lion-muon", "lion", "signum", "adamw", "optax-muon", "soap", "shampoo"]
)
def test_norms_biases_and_embeddings_decay_only_where_that_is_asked_for(name):
    model = DecoderConfig(
        vocab_size=16, width=4, depth=1, heads=2, context=4,
        positions="learned", norm="layer", bias=True, tied=False,
    )  # fmt: skip
    ones = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), abstract_params(model))

    @jax.jit
    def updated(ones):
        results = []
        for decay in ("matrices", "all"):
            config = OPTIMIZERS[name](learning_rate=0.1, weight_decay=0.5, decay=decay)
            tx = config.build(optax.constant_schedule(0.1), ModelInfo.of(model))
            # SOAP does nothing at the first gradient.
            _, state = tx.update(ones, tx.init(ones), ones)
            results.append(tx.update(ones, state, ones)[0])
        return results

    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), *updated(ones))
    assert same == jax.tree.map(lambda role: role in ("matrix", "head"), roles(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_of_an_optimizer_is_used(name):
    read = set()

    class Watched(OPTIMIZERS[name]):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    # JAGUAR's ways to draw a direction have settings of their own.
    ways = ({}, {"selection": "sparse"}) if name.startswith("jaguar") else ({},)
    params = {"a": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}
    axes = {"a": MuonDimensionNumbers(0, 1), "b": None}
    info = ModelInfo(axes, key=jax.random.key(0))
    for way in ways:
        config = Watched(weight_decay=0.5, **way)
        if not way:
            read.clear()  # what making it has read
        tx = optax.with_extra_args_support(config.build(lambda count: 0.1, info))
        update = functools.partial(tx.update, value_fn=lambda params: params["a"].sum())
        jax.eval_shape(update, params, jax.eval_shape(tx.init, params), params)
    # The rate comes as a schedule.
    assert {field.name for field in fields(config)} - read <= {"learning_rate"}


def test_every_optimizer_is_documented_and_muon_is_spectral_at_every_step():
    assert all(kind.__doc__ for kind in [*OPTIMIZERS.values(), *SCHEDULES.values()])
    assert MuonConfig().period == 1 and MuonConfig().b1 == MuonConfig().b2


def test_a_deterministic_run_avoids_the_kernel_that_is_not():
    config = replace(from_preset("tiny"), deterministic=True)
    assert model_of(config).attention == "xla"
    assert model_of(replace(config, deterministic=False)).attention == "auto"
    fixed = replace(config, model=replace(config.model, attention="cudnn"))
    with pytest.raises(ConfigError, match="model.attention"):
        validate(fixed, 1)


def rate(*flags):
    return parse_config(flags, "finetune", FinetuneConfig).optimizer.learning_rate


def test_what_moves_brings_its_rate():
    assert set(FINETUNED) == set(TRAINABLES)
    assert FinetuneConfig().optimizer == default_optimizer("lora", "adamw")
    assert rate() == 1e-3 and rate("--trainable", "full") == 1e-4
    assert rate("--trainable", "full", "--optimizer.weight-decay", "0.1") == 1e-4
    assert rate("--trainable", "full", "--optimizer", "adamw") == 1e-4
    assert rate("--optimizer", "lion", "--trainable", "head") == 3e-3
    assert rate("--trainable", "full", "--optimizer.learning-rate", "0.5") == 0.5
    assert rate("--optimizer", "scaled-lorsum") == ScaledLorsumConfig().learning_rate
    # What a run was given stays, whatever the table says now.
    stored = to_json(replace(FinetuneConfig(), trainable=FullConfig()))
    assert from_json(stored, FinetuneConfig).optimizer.learning_rate == 1e-3
