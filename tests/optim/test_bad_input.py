"""Options that cannot be meant: refused by name, before anything compiles."""

import math

import pytest

import jaxopt_lab as jol

NAN = float("nan")

OUT_OF_RANGE = [
    *((jol.lion_muon, "period", value) for value in (0, -1, 2.5, NAN, -math.inf)),
    (jol.sign_muon, "period", 0),
    (jol.legacy_sign_muon, "period", 0),
    (jol.scale_by_lion_muon, "period", 0),
    (jol.lion_muon, "ns_steps", 0),
    (jol.lion_muon, "ns_steps", 2.5),
    (jol.scale_by_lion_muon, "cheap_ns_steps", 0),
    (jol.lion_muon, "ns_dtype", "int32"),
    (jol.lion_muon, "ns_dtype", "bfloat17"),
    *((jol.lion_muon, "stable_rank_threshold", value) for value in (0, -0.1, NAN)),
    *((jol.scale_by_lion_muon, name, NAN) for name in ("spectral_rate", "sign_rate")),
]
RATES = [
    *((jol.lion_muon, name) for name in ("sign_learning_rate", "adam_learning_rate")),
    *((jol.lion_muon, name) for name in ("sign_lr_ratio", "adam_lr_ratio")),
    *((jol.legacy_sign_muon, name) for name in ("cheap_learning_rate", "adam_learning_rate")),
    (jol.muon, "adam_lr_ratio"),
]
READY = (
    jol.lion_muon,
    jol.sign_muon,
    jol.legacy_sign_muon,
    jol.muon,
    jol.d_muon,
    jol.signum,
    jol.normalized_sgd,
)


def call(factory, **options):
    needs_rate = factory is not jol.scale_by_lion_muon
    return factory(**({"learning_rate": 1e-3} if needs_rate else {}) | options)


@pytest.mark.parametrize(("factory", "name", "value"), OUT_OF_RANGE)
def test_numbers_out_of_range(factory, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be"):
        call(factory, **{name: value})


@pytest.mark.parametrize("value", [NAN, -1e-3, math.inf])
def test_rates_that_are_no_rates(value):
    named = [*((factory, "learning_rate") for factory in READY), *RATES]
    for factory, name in named:
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must be a finite number"):
            call(factory, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "momentum",
        "heavy_ball_direction",
        "ns_coefficients",
        "spectral_scale",
        "cheap_mode",
        "sign_scaling",
        "replicated_work",
    ],
)
def test_unknown_choices_are_told_the_known_ones(name):
    with pytest.raises(ValueError, match=f"^{name} is 'other'; choose one of .*, "):
        jol.scale_by_lion_muon(**{name: "other"})


def test_unknown_choices_of_the_heavy_ball():
    for name in ("norm", "init_buffer"):
        with pytest.raises(ValueError, match=f"{name} is 'other'; choose"):
            jol.scale_by_normalized_heavy_ball(**{"norm": "sign", name: "other"})
    with pytest.raises(ValueError, match="needs update"):
        jol.signum(1.0, init_buffer="params").update({}, jol.signum(1.0).init({}))
