"""Options that cannot be meant: refused by name, before anything compiles."""

import dataclasses
import functools
import inspect
import math
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_lab as jol
from jaxopt_lab import lora
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.optim.keywords import ELSEWHERE
from jaxopt_lab.optim.routing import float_leaves
from tests.contract.optimizers import FACTORIES

NAN = float("nan")

stable_rank = functools.partial(jol.scale_by_stable_rank, 0.1)

OUT_OF_RANGE = [
    *((jol.lion_muon, "period", value) for value in (0, -1, 2.5, NAN, -math.inf)),
    (jol.sign_muon, "period", 0),
    (jol.legacy_sign_muon, "period", 0),
    (jol.scale_by_lion_muon, "period", 0),
    (functools.partial(jol.branch_rate, spectral_rate=1.0, sign_rate=1.0), "period", 0),
    (functools.partial(jol.branch_rate, 2, 1.0), "sign_rate", NAN),
    *((factory, "momentum", 1.0) for factory in (jol.signum, jol.normalized_sgd, jol.muon)),
    *((factory, "b1", -0.1) for factory in (jol.lion_muon, jol.sign_muon, jol.soap, jol.shampoo)),
    *((jol.lion_muon, "stable_rank_threshold", value) for value in (0, -0.1, NAN)),
    *((stable_rank, name, NAN) for name in ("spectral_rate", "sign_rate")),
]
RATES = [
    (jol.lion_muon, "sign_learning_rate"),
    (jol.legacy_sign_muon, "sign_learning_rate"),
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
    needs_rate = factory in (*READY, jol.soap, jol.shampoo)
    return factory(**({"learning_rate": 1e-3} if needs_rate else {}) | options)


@pytest.mark.parametrize(("factory", "name", "value"), OUT_OF_RANGE)
def test_numbers_out_of_range(factory, name, value):
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}, wanted"):
        call(factory, **{name: value})


@pytest.mark.parametrize("value", [NAN, -1e-3, math.inf])
def test_rates_that_are_no_rates(value):
    named = [*((factory, "learning_rate") for factory in READY), *RATES]
    for factory, name in named:
        with pytest.raises(ValueError, match=f"^{name}: got {value}, wanted a finite number"):
            call(factory, **{name: value})


def test_unknown_choices_are_told_the_known_ones():
    with pytest.raises(ValueError, match="^spectral_scale: got 'other', wanted one of .*, "):
        jol.scale_by_lion_muon(spectral_scale="other")
    for name in ("cheap_mode", "sign_scaling"):
        with pytest.raises(ValueError, match=f"^{name}: got 'other', wanted one of .*, "):
            jol.legacy_sign_muon(**{name: "other"})
    with pytest.raises(ValueError, match="norm: got 'other', wanted one of"):
        jol.scale_by_normalized_heavy_ball(norm="other")


def test_coefficients_under_the_wrong_name_are_told_the_right_one():
    with pytest.raises(ValueError, match="NewtonSchulz.coefficients: got 'dion', wanted 'you_jia"):
        jol.NewtonSchulz(coefficients="dion")


@pytest.mark.parametrize(
    ("factory", "keyword", "place"),
    [
        (jol.lion_muon, "weight_decay_mask", "mask="),
        (jol.lion_muon, "beta", "b1="),
        (jol.lion_muon, "nesterov", "b1=beta"),
        (jol.lion_muon, "consistent_rms", "spectral_scale="),
        (jol.lion_muon, "ns_coeffs", "NewtonSchulz"),
        (jol.lion_muon, "ns_steps", "NewtonSchulz"),
        (jol.lion_muon, "adam_b1", "AdamW"),
        (jol.lion_muon, "on_uncovered", "Routing"),
        (jol.lion_muon, "sign_lr_ratio", "sign_learning_rate="),
        (jol.lion_muon, "first_step_spectral", "period="),
        (jol.lion_muon, "key", "scale_by_stable_rank"),
        (jol.sign_muon, "b2", "lion_muon"),
        (jol.scale_by_lion_muon, "weight_decay", "add_decayed_weights"),
        (jol.scale_by_lion_muon, "sign_rate", "branch_rate"),
        (jol.scale_by_lion_muon, "cheap_mode", "parity"),
        (jol.muon, "beta", "momentum="),
        (jol.d_muon, "ns_dtype", "NewtonSchulz"),
        (jol.legacy_sign_muon, "cheap_learning_rate", "sign_learning_rate="),
        (jol.signum, "init_buffer", "parity"),
        (jol.normalized_sgd, "b1", "momentum="),
        (jol.muon, "beta1", "momentum="),
        (jol.scale_by_adamw_fallback, "beta2", "b2="),
        (jol.scale_by_adamw_fallback, "eps_root", "eps="),
        (jol.scale_by_stable_rank, "ns_steps", "NewtonSchulz"),
        (jol.scale_by_stable_rank, "period", "threshold="),
        (jol.scale_by_stable_rank, "decay_mask", "mask="),
    ],
)
def test_other_names_of_an_option_are_told_where_it_is(factory, keyword, place):
    with pytest.raises(TypeError, match=f"no argument '{keyword}'; (write|there is no) .*{place}"):
        factory(**{keyword: None})


@pytest.mark.parametrize("factory", (*READY, jol.soap, jol.dykaf, jol.shampoo, jol.dykaf_official))
def test_masks_that_are_none_are_refused(factory):
    for mask in (True, np.bool_(False), jnp.zeros((), bool), 1.0, "bias"):
        with pytest.raises(ValueError, match=r"^mask: got .*routing=Routing\(decay_mask=\.\.\.\)"):
            factory(1e-3, weight_decay=0.1, mask=mask)
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    for mask, message in [
        ({"w": True}, r"it has no entry for leaf \['b'\]"),
        ({"w": True, "b": None}, r"it has no entry for leaf \['b'\]"),
        ({"w": True, "b": False, "c": True}, r"there is no leaf for its entry \['c'\]"),
        ({"w": {"kernel": True}, "b": False}, r"it has no entry for leaf \['w'\]"),
        ({"w": True, "b": "no"}, r"mask of leaf \['b'\]: got 'no', wanted a bool"),
        (lambda p: {"w": 1.0, "b": False}, r"mask of leaf \['w'\]: got 1.0, wanted a bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            factory(1e-3, weight_decay=0.1, mask=mask).init(params)
    factory(1e-3, weight_decay=0.1, mask={"w": np.True_, "b": jnp.zeros((), bool)}).init(params)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32", "half-ish"])
def test_dtypes_of_momenta_are_checked(dtype):
    with_dtype = [f for f in (*READY, jol.scale_by_lion_muon, stable_rank)
                  if f not in (jol.signum, jol.normalized_sgd)]  # fmt: skip
    for factory in (*with_dtype, jol.scale_by_adamw_fallback):
        options = {"learning_rate": 1e-3} if factory in READY else {}
        with pytest.raises(ValueError, match=f"^mu_dtype: got '{dtype}', wanted None or one of"):
            factory(mu_dtype=dtype, **options)


WHOLE_MODEL = (*READY, jol.soap, jol.dykaf, jol.shampoo)
BARE = (jol.scale_by_lion_muon, jol.scale_by_soap, jol.scale_by_dykaf)
OTHER = (jol.scale_by_adamw_fallback, jol.scale_by_normalized_heavy_ball)


def make(factory):
    if factory is jol.scale_by_normalized_heavy_ball:
        return factory(norm="sign")
    return factory(1e-3) if factory in WHOLE_MODEL else factory()


@pytest.mark.parametrize("factory", (*WHOLE_MODEL, *BARE, *OTHER))
def test_leaves_that_no_rule_fits_are_named(factory):
    tx, filters = make(factory), "eqx.filter.*is_inexact_array"
    good = {"w": jnp.ones((4, 6))}
    bad = [
        ({"v": jnp.ones((4, 6), jnp.complex64)}, r"\['v'\]: got dtype complex64, wanted real"),
        ({"v": {"b": jnp.ones((2, 3), int)}}, rf"\['v'\]\['b'\]: got dtype int32.*{filters}"),
        ({"v": jax.nn.relu}, rf"\['v'\]: got .*, wanted arrays of floating.*{filters}"),
        ({"v": "adam"}, rf"\['v'\]: got str.*{filters}"),
        ({"v": 3}, rf"\['v'\]: got int.*{filters}"),
        (
            {"v": jnp.ones((4, 6), "float8_e5m2")},
            r"\['v'\]: got dtype float8_e5m2, wanted one of bfl",
        ),
        ({"v": jax.random.key(0)}, rf"\['v'\]: got dtype key.*{filters}"),
    ]
    for leaves, message in bad:
        with pytest.raises(TypeError, match=f"leaf {message}"):
            tx.init(good | leaves)
    with pytest.raises(TypeError, match=r"leaf \.activation: got"):
        tx.init(eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0)))


@pytest.mark.parametrize("factory", [f for f in WHOLE_MODEL if f is not jol.legacy_sign_muon])
def test_parameters_are_needed_where_weights_decay_alone(factory):
    g = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    tx = factory(1e-3, weight_decay=0.0)
    jax.eval_shape(tx.update, g, tx.init(g))
    tx = factory(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="not passing `params`"):
        jax.eval_shape(tx.update, g, tx.init(g))


@pytest.mark.parametrize("factory", WHOLE_MODEL)
def test_complex_vectors_and_filtered_modules(factory):
    tx = make(factory)
    with pytest.raises(TypeError, match=r"leaf \['b'\]: got dtype complex64"):
        tx.init({"b": jnp.ones(4, jnp.complex64)})
    model = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    updates, _ = jax.eval_shape(tx.update, state, tx.init(state), state)
    assert jax.tree.structure(updates) == jax.tree.structure(state)


@pytest.mark.parametrize("factory", WHOLE_MODEL)
def test_python_and_numpy_numbers_are_scalars(factory):
    tx = make(factory)
    numbers = {"w": jnp.ones((4, 6)), "x": 0.5, "y": np.float32(0.5), "z": np.ones(3, np.float32)}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, "float32"), numbers)
    state, wanted = tx.init(numbers), tx.init(arrays)
    for _ in range(2):
        updates, state = tx.update(numbers, state, numbers)
        expected, wanted = tx.update(arrays, wanted, arrays)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, wanted)


ELEMENTWISE = {
    "scale_by_adamw_fallback": (jol.scale_by_adamw_fallback, {}),
    "scale_by_adamm": (zo.scale_by_adamm, {}),
    "scale_by_coordinate_momentum": (zo.scale_by_coordinate_momentum, {}),
    "scale_by_matrix_sign": (zo.scale_by_matrix_sign, {}),
}
EVERY = FACTORIES | ELEMENTWISE


@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_of_another_shape(name):
    factory, options = EVERY[name]
    tx, params = factory(**options), {"w": jnp.ones((3, 2)), "row": jnp.ones((1, 3))}
    for leaf, shape in (("w", (2, 3)), ("row", (3, 3)), ("row", (1, 1))):  # two are broadcast
        message = re.escape(f"gradient of leaf ['{leaf}']: got shape {shape}, wanted")
        with pytest.raises(ValueError, match=message):
            given = params | {leaf: jnp.ones(shape)}
            jax.eval_shape(lambda g: tx.update(g, tx.init(params), params, value=1.0), given)


def test_only_shapes_of_leaves_in_both_trees_are_compared():
    gradient = {"w": jnp.ones((3, 2)), "masked": optax.MaskedNode()}
    for like in (
        None,
        {"w": optax.MaskedNode(), "masked": jnp.ones(5)},
        {"w": {"other": jnp.ones(2)}},
        {"w": jax.ShapeDtypeStruct((3, 2), "bfloat16"), "more": 1.0},
    ):
        chex.assert_trees_all_equal(float_leaves(gradient, like), gradient)


BLACK_BOX = "gradient_descent", "jaguar_gd"
PUBLIC = [
    pytest.param(factory, id=name)
    for module in (jol, lora, zo)
    for name, factory in inspect.getmembers(module, inspect.isfunction)
    if name in module.__all__ and name not in BLACK_BOX
    if "learning_rate" in inspect.signature(factory).parameters or hasattr(factory, "__wrapped__")
]


@pytest.mark.parametrize("factory", PUBLIC)
def test_what_is_said_to_write_is_an_argument(factory):
    own, told = inspect.signature(factory).parameters, 0
    for keyword in ELSEWHERE.keys() - own.keys():
        with pytest.raises(TypeError) as found:
            factory(**{keyword: None})
        advice = re.search(r"; write (\w+)=(?!.* of the ready optimizer)", str(found.value))
        told += advice is not None
        assert advice is None or advice[1] in own, found.value
    assert told or factory is jol.track_params_ema


@pytest.mark.parametrize("factory", PUBLIC)
def test_options_are_of_their_class(factory):
    for name, parameter in inspect.signature(factory).parameters.items():
        if dataclasses.is_dataclass(kind := type(parameter.default)):
            message = f"{factory.__name__}: {name} is 'muon', wanted a {kind.__name__}"
            with pytest.raises(TypeError, match=message):
                factory(**{name: "muon"})


def test_names_of_a_perturbation_are_told_where_it_is():
    for factory in (zo.mezo, zo.estimate, zo.ldsd, zo.scale_by_jaguar):
        for name in ("tau", "zo_eps"):
            with pytest.raises(TypeError, match=f"has no argument '{name}'; write eps="):
                factory(**{name: 1e-3})
    for factory in (zo.forward_gradient, jol.soap):
        with pytest.raises(TypeError, match="unexpected keyword"):
            factory(tau=1e-3)
