"""SOAP and DyKAF refuse what cannot be meant, by name and before anything compiles."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab.parity.dykaf import dykaf as parity_dykaf

NAN = float("nan")
BARE = (jol.scale_by_soap, jol.scale_by_dykaf)
READY = (jol.soap, jol.dykaf, jol.dykaf_official)
EVERY = (*BARE, *READY)
OUT_OF_RANGE = [
    *(("b1", value) for value in (-0.1, 1, 1.5, NAN)),
    *(("b2", value) for value in (-0.1, 1, NAN)),
    *(("factor_decay", value) for value in (-0.1, 1.1, NAN)),
    *(("eps", value) for value in (-1e-8, NAN, math.inf)),
    *(("precondition_frequency", value) for value in (0, -1, 2.5, NAN, math.inf)),
]
KERNEL = {"w": jnp.ones((4, 6))}


def call(factory, **options):
    return factory(**({"learning_rate": 1e-3} if factory in READY else {}) | options)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_numbers_out_of_range(name, value):
    for factory in EVERY:
        with pytest.raises(ValueError, match=f"^{name}: got {value!r}, wanted"):
            call(factory, **{name: value})


@pytest.mark.parametrize("value", [NAN, -1e-3, math.inf])
def test_rates_that_are_no_rates(value):
    for factory in READY:
        for name in ("learning_rate", "weight_decay"):
            with pytest.raises(ValueError, match=f"^{name}: got {value}, wanted a finite number"):
                call(factory, **{name: value})


def test_unknown_choices_are_told_the_known_ones():
    for factory in (jol.dykaf, jol.scale_by_dykaf):
        with pytest.raises(ValueError, match="^integrator: got 'other', wanted one of ksl, "):
            call(factory, integrator="other")
    for quirk in ("kron_init_scale", "one_sided"):
        with pytest.raises(ValueError, match=f"^{quirk}: got 'other', wanted one of "):
            parity_dykaf(1e-3, **{quirk: "other"})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("max_precond_dim", r"eigenbasis=Eigenbasis\(max_precond_dim=...\)"),
        ("stagger", r"eigenbasis=Eigenbasis\(stagger=...\)"),
        ("rotation_precision", r"eigenbasis=Eigenbasis\(rotation_precision=...\)"),
        ("on_uncovered", r"routing=Routing\(on_uncovered=...\)"),
        ("weight_decay_mask", "mask="),
        ("beta", "b1="),
        ("correct_bias", "jaxopt_lab.parity"),
        ("skip_first_step", "nothing: the first"),
    ],
)
def test_keywords_of_earlier_versions_and_of_optax_are_told_their_place(name, place):
    for factory in (jol.soap, jol.dykaf):
        message = f"{factory.__name__} has no argument '{name}'; .*{place}"
        with pytest.raises(TypeError, match=message):
            factory(1e-3, **{name: None})


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_stagger_needs_to_know_the_frequency(factory):
    def traced(static):
        inject = optax.inject_hyperparams(factory, static_args=static)
        basis = jol.Eigenbasis(stagger=True)
        tx = inject(learning_rate=1e-3, eigenbasis=basis, precondition_frequency=3)
        state = tx.init(KERNEL)
        return jax.eval_shape(tx.update, KERNEL, state, KERNEL)

    with pytest.raises(ValueError, match="^stagger .* precondition_frequency .* static_args"):
        traced(())
    assert traced("precondition_frequency")[0]["w"].shape == (4, 6)


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_a_matrix_with_both_sides_over_the_limit_belongs_to_adamw(factory):
    shapes = {"both": (6, 8), "one": (4, 8), "none": (4, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    found = jol.describe(factory(1e-3, eigenbasis=jol.Eigenbasis(max_precond_dim=5)), params)
    label = factory.__name__
    assert {r.path[2:-2]: r.rule for r in found.rows} == {
        "both": "adamw", "one": label, "none": label,
    }  # fmt: skip
    (line,) = (line for line in str(found).splitlines() if line.startswith("['both']"))
    assert "adamw" in line and "6x8" in line


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_uncovered_tensors(factory):
    params = {"deep": {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"^leaf \['deep'\]\['kernel'\] of shape \(2, 3, 4\)"):
        factory(1e-3, routing=jol.Routing(on_uncovered="error")).init(params)
    rules = {
        how: jol.describe(factory(1e-3, routing=jol.Routing(on_uncovered=how)), params).rows[0].rule
        for how in ("adamw", "modes")
    }
    assert rules == {"adamw": "adamw", "modes": "modes"}


@pytest.mark.parametrize("factory", BARE)
def test_leaves_that_are_no_matrices(factory):
    for shape in ((6,), (2, 4, 6)):
        with pytest.raises(ValueError, match=r"^leaf \['b'\] of shape .* is not a matrix; .*"):
            factory().init({"b": jnp.ones(shape)})


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_decay_needs_the_parameters(factory):
    tx = factory(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        jax.eval_shape(tx.update, KERNEL, tx.init(KERNEL))
