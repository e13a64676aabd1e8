"""Option objects refuse what cannot be meant, when they are made, and name the field."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol

OPTIONS = (
    *(jol.AdamW, jol.Eigenbasis, jol.Graft, jol.InverseRoot),
    *(jol.MeshWork, jol.NewtonSchulz, jol.Routing),
)
FIELDS = [(kind, field.name) for kind in OPTIONS for field in dataclasses.fields(kind)]
CHOICES = [
    (kind, name)
    for kind, name in FIELDS
    if "Literal" in str(typing.get_type_hints(kind)[name]) or name == "coefficients"
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_no_field_takes_a_word_it_does_not_know(kind, name):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{name}: got 'other', wanted "):
        kind(**{name: "other"})


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_a_wrong_word_is_told_the_right_ones(kind, name):
    assert len(CHOICES) == 11
    default = getattr(kind(), name)
    for wrong in ("other", 3, np.float32(1), jnp.ones(()), ("kron",)):
        with pytest.raises(ValueError, match=f"{name}: got .*, wanted one of .*{default}"):
            kind(**{name: wrong})


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (jol.AdamW, {"b1": 1.0}, r"b1: got 1.0, wanted a number in \[0, 1\)"),
        (jol.AdamW, {"b1": (0.9, 0.95)}, r"b1: got \(0.9, 0.95\), wanted a number"),
        (jol.AdamW, {"b2": np.float32(1.5)}, "b2: got 1.5, wanted a number in"),
        (jol.AdamW, {"eps": np.int64(-1)}, "eps: got -1, wanted a finite number >= 0"),
        (jol.AdamW, {"lr_ratio": None}, "lr_ratio: got None, wanted a finite number >= 0"),
        (jol.AdamW, {"lr_ratio": lambda count: 1.0}, "lr_ratio: got <function .*, wanted a finite"),
        (jol.AdamW, {"learning_rate": -1e-3}, "learning_rate: got -0.001, wanted a finite"),
        (jol.AdamW, {"learning_rate": True}, "learning_rate: got True, wanted a finite"),
        (jol.AdamW, {"learning_rate": 1e-3, "lr_ratio": 0.5}, "lr_ratio: got 0.5, wanted none"),
        (jol.AdamW, {"weight_decay": np.nan}, "weight_decay: got nan, wanted a finite"),
        (jol.NewtonSchulz, {"steps": 0}, "steps: got 0, wanted an integer >= 1"),
        (jol.NewtonSchulz, {"steps": 2.0}, "steps: got 2.0, wanted an integer"),
        (jol.NewtonSchulz, {"dtype": "float8_e4m3fn"}, "dtype: got 'float8_e4m3fn', wanted None"),
        (jol.NewtonSchulz, {"dtype": "int32"}, "dtype: got 'int32', wanted None or one of"),
        (jol.Eigenbasis, {"max_precond_dim": -1}, "max_precond_dim: got -1, wanted an integer"),
        (jol.Eigenbasis, {"stagger": 1}, "stagger: got 1, wanted True or False"),
        (jol.InverseRoot, {"exponent": 0}, "exponent: got 0, wanted a finite number > 0"),
        (jol.InverseRoot, {"exponent": 0.4}, "exponent: got 0.4, wanted the inverse of an int"),
        (jol.InverseRoot, {"exponent": {2: "x"}}, "exponent: got 'x', wanted a finite number > 0"),
        (jol.InverseRoot, {"exponent": {5: 0.1}}, "exponent: got .*, wanted orders from 1 to 4"),
        (jol.Graft, {"b2": 1.0}, "b2: got 1.0, wanted a number in"),
        (jol.MeshWork, {"param_shardings": {"w": None, "b": 3}}, "param_shardings: got 3, wanted"),
        (jol.Routing, {"vocabulary_size": True}, "vocabulary_size: got True, wanted an integer"),
        (jol.Routing, {"decay_mask": False}, r"decay_mask: got False, .*Routing\(decay_mask=...\)"),
    ],
)
def test_values_out_of_range(kind, fields, message):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{message}"):
        kind(**fields)


def test_numbers_of_numpy_are_those_of_python():
    for options in (
        jol.AdamW(lr_ratio=np.float32(0.5), b2=np.float64(0.5)),
        jol.NewtonSchulz(steps=np.int64(3)),
        jol.Eigenbasis(max_precond_dim=np.int32(8), stagger=np.bool_(True)),
        jol.InverseRoot(exponent=np.float32(0.25)),
        jol.Graft(b2=np.float32(0.5)),
        jol.Routing(vocabulary_size=np.int64(8)),
    ):
        values = [getattr(options, field.name) for field in dataclasses.fields(options)]
        assert not any(isinstance(value, np.generic) for value in values)
    assert jol.InverseRoot(exponent={1: np.float32(0.5)}).of_order(1) == 0.5
    assert jol.InverseRoot(exponent=0.4, method="eigh").of_order(2) == 0.4


def test_an_integer_of_numpy_decides_shapes():
    eigenbasis, root = jol.Eigenbasis(stagger=True), jol.InverseRoot(stagger=True)
    jol.soap(1e-3, precondition_frequency=np.int64(2), eigenbasis=eigenbasis)
    jol.shampoo(1e-3, precondition_frequency=np.int64(2), inverse_root=root)
    axes = MuonDimensionNumbers(np.int64(0), np.int64(1))
    jol.lion_muon(1e-3, matrix_axes=axes).init({"w": jnp.ones((4, 6))})


def test_an_option_object_of_another_class_is_refused_by_name():
    with pytest.raises(TypeError, match="^lion_muon: newton_schulz is 5, wanted a NewtonSchulz$"):
        jol.lion_muon(1e-3, newton_schulz=5)
    with pytest.raises(TypeError, match="^shampoo: graft is 'adam', wanted a Graft$"):
        jol.shampoo(1e-3, graft="adam")
