"""SOAP and DyKAF refuse what cannot be meant, by name and before anything compiles."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxopt_lab as jol

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
    ("max_precond_dim", -1),
]
KERNEL = {"w": jnp.ones((4, 6))}


def call(factory, **options):
    return factory(**({"learning_rate": 1e-3} if factory in READY else {}) | options)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_numbers_out_of_range(name, value):
    for factory in EVERY:
        with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be"):
            call(factory, **{name: value})


@pytest.mark.parametrize("value", [NAN, -1e-3, math.inf])
def test_rates_that_are_no_rates(value):
    rates = [*((f, "learning_rate") for f in READY), *((f, "weight_decay") for f in EVERY)]
    for factory, name in [*rates, *((f, "decay_rate") for f in BARE)]:
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must be a finite number"):
            call(factory, **{name: value})


SHARED = ("orthogonalizer", "factor_precision", "rotation_precision")
OWN = ("integrator", "init", "kron_init_scale", "one_sided")
CHOICES = [
    *((f, name) for f in EVERY for name in SHARED),
    *((f, "replicated_work") for f in (*BARE, jol.soap, jol.dykaf)),
    *((f, name) for f in (jol.scale_by_dykaf, jol.dykaf) for name in OWN),
    *((f, "on_uncovered") for f in (jol.soap, jol.dykaf)),
    (jol.dykaf_official, "init"),
]


def test_unknown_choices_are_told_the_known_ones():
    for factory, name in CHOICES:
        with pytest.raises(ValueError, match=f"^{name} is 'other'; choose .*, "):
            call(factory, **{name: "other"})


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_stagger_needs_to_know_the_frequency(factory):
    def traced(static):
        inject = optax.inject_hyperparams(factory, static_args=static)
        tx = inject(learning_rate=1e-3, stagger=True, precondition_frequency=3)
        state = tx.init(KERNEL)
        return jax.eval_shape(tx.update, KERNEL, state, KERNEL)

    with pytest.raises(ValueError, match="^stagger .* precondition_frequency .* static_args"):
        traced(())
    assert traced("precondition_frequency")[0]["w"].shape == (4, 6)


@pytest.mark.parametrize("factory", [jol.soap, jol.dykaf])
def test_a_matrix_with_both_sides_over_the_limit_belongs_to_adamw(factory):
    shapes = {"both": (6, 8), "one": (4, 8), "none": (4, 4)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    found = jol.describe(factory(1e-3, max_precond_dim=5), params)
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
        factory(1e-3, on_uncovered="error").init(params)
    rules = {how: jol.describe(factory(1e-3, on_uncovered=how), params).rows[0].rule
             for how in ("adamw", "modes")}  # fmt: skip
    assert rules == {"adamw": "adamw", "modes": "modes"}


@pytest.mark.parametrize("factory", BARE)
def test_leaves_that_are_no_matrices(factory):
    for shape in ((6,), (2, 4, 6)):
        with pytest.raises(ValueError, match=r"^leaf \['b'\] of shape .* is not a matrix; .*"):
            factory().init({"b": jnp.ones(shape)})


@pytest.mark.parametrize("factory", [*BARE, jol.soap, jol.dykaf])
def test_decay_needs_the_parameters(factory):
    make = functools.partial(call, factory)
    decaying, free = make(weight_decay=0.1), make(weight_decay=0.0)
    with pytest.raises(ValueError, match="^weight_decay needs the parameters"):
        jax.eval_shape(decaying.update, KERNEL, decaying.init(KERNEL))
    assert jax.eval_shape(free.update, KERNEL, free.init(KERNEL))[0]["w"].shape == (4, 6)
