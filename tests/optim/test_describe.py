"""The table of rules and state bytes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol

SHAPES = {
    "embedding": (12, 4),
    "excluded": (4, 6),
    "kernel": (4, 6),
    "scale": (),
    "stack": (2, 4, 6),
}
PARAMS = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in SHAPES.items()}
AXES = {"kernel": Axes(), "stack": Axes(1, 2), **dict.fromkeys(("embedding", "excluded", "scale"))}


def table(tx):
    found = jol.describe(tx, PARAMS)
    return {r.path[2:-2]: (r.role, r.rule, r.state_bytes) for r in found.rows}, found


def test_roles_rules_and_bytes_of_the_default_routing():
    rows, found = table(jol.lion_muon(1e-3))
    assert rows == {
        "embedding": ("embedding", "adamw", 2 * 4 * 48),
        "excluded": ("matrix", "lion_muon", 4 * 24 + 4),
        "kernel": ("matrix", "lion_muon", 4 * 24 + 4),
        "scale": ("vector", "adamw", 2 * 4),
        "stack": ("unspecified", "adamw", 2 * 4 * 48),
    }
    assert found.shared_bytes == 12, "one counter a group, and one of the schedule of two rates"
    assert found.total_bytes == 12 + sum(r.state_bytes for r in found.rows)


def test_layouts_change_roles():
    rows, _ = table(jol.lion_muon(1e-3, matrix_axes=AXES, mu_dtype="bfloat16"))
    assert rows["excluded"] == ("excluded", "adamw", (2 + 4) * 24)
    assert rows["stack"] == ("matrix", "lion_muon", 2 * 48 + 4 * 2)


def test_a_layout_beats_what_a_name_says():
    params = {k: jax.ShapeDtypeStruct((4, 6), "float32") for k in ("bias", "embedding", "head")}
    by_name = jol.describe(jol.lion_muon(1e-3), params).rows
    assert [(r.role, r.rule) for r in by_name] == [
        ("vector", "adamw"), ("embedding", "adamw"), ("head", "adamw")
    ]  # fmt: skip
    told = jol.describe(jol.lion_muon(1e-3, matrix_axes=Axes()), params).rows
    assert {(r.role, r.rule) for r in told} == {("matrix", "lion_muon")}


def test_groups_within_groups():
    labels = {k: "slow" for k in SHAPES} | {"kernel": "frozen"}
    groups = {"slow": jol.lion_muon(1e-3, matrix_axes=AXES), "frozen": optax.set_to_zero()}
    rows, _ = table(optax.partition(groups, labels))
    assert rows["kernel"] == ("matrix", "stateless", 0)
    assert rows["stack"][:2] == ("matrix", "slow/lion_muon")
    assert rows["excluded"][:2] == ("excluded", "slow/adamw")


def test_the_text_says_what_to_do_about_an_uncovered_leaf():
    lines = str(jol.describe(jol.lion_muon(1e-3), PARAMS)).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "role", "rule", "state", "bytes"]
    assert len({len(line) for line in lines[:6]}) == 1, "columns line up"
    assert lines[4].split() == ["['scale']", "()", "float32", "vector", "adamw", "8"]
    assert lines[6] == "total state 988 bytes, of which 12 shared"
    (note,) = lines[7:]
    assert "['stack'] has 3 axes" in note and "adamw" in note and "matrix_axes" in note
    assert "note:" not in str(jol.describe(jol.lion_muon(1e-3, matrix_axes=AXES), PARAMS))


KERNEL = 4 * 24


@pytest.mark.parametrize(
    ("tx", "rule", "state_bytes"),
    [
        (optax.sgd(0.1), "stateless", 0),
        (optax.sgd(0.1, momentum=0.9), "Trace", KERNEL),
        (optax.contrib.muon(0.1), "muon", KERNEL),
        (jol.muon(0.1), "muon", KERNEL + 4),
        (jol.legacy_sign_muon(cheap_mode="cached"), "sign_muon", 2 * KERNEL + 4),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), None, 3 * KERNEL),
        (optax.chain(optax.adam(0.1), jol.track_params_ema(0.9)), None, 3 * KERNEL),
        (optax.inject_hyperparams(optax.adam)(0.1), "ScaleByAdam", 2 * KERNEL),
        (optax.masked(optax.adam(0.1), {**dict.fromkeys(SHAPES, True), "kernel": False}), None, 0),
    ],
)
def test_any_chain(tx, rule, state_bytes):
    rows, found = table(tx)
    assert rows["kernel"][2] == state_bytes
    assert rule is None or rows["kernel"][1] == rule
    state = jax.eval_shape(tx.init, PARAMS)
    assert found.total_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_states_are_named_in_order_and_keys_are_shared():
    rows, _ = table(optax.chain(optax.adam(0.1), jol.track_params_ema(0.9)))
    assert rows["kernel"][1] == "ScaleByAdam, ParamsEma"
    plain = jol.describe(jol.lion_muon(0.1), PARAMS)
    keyed = jol.describe(jol.lion_muon(0.1, stable_rank_threshold=0.1), PARAMS)
    key_bytes = jax.random.key_data(jax.random.key(0)).nbytes
    assert keyed.shared_bytes == plain.shared_bytes - 4 + key_bytes, "no schedule of two rates"
    bools = [1 if r.rule == "lion_muon" else 0 for r in plain.rows]
    assert [r.state_bytes for r in keyed.rows] == [
        r.state_bytes + b for r, b in zip(plain.rows, bools, strict=True)
    ]


def test_an_empty_tree_has_an_empty_table():
    found = jol.describe(optax.adam(0.1), {})
    assert (
        found.rows == () and str(found).splitlines()[1] == "total state 4 bytes, of which 4 shared"
    )


@pytest.mark.parametrize(
    ("tx", "shape", "row"),
    [
        (optax.adam(0.1), (3,), ("vector", "ScaleByAdam", 24)),
        (optax.sgd(0.1), (4, 6), ("matrix", "stateless", 0)),
        (jol.lion_muon(1e-3), (4, 6), ("matrix", "lion_muon", 4 * 24 + 4)),
        (jol.lion_muon(1e-3), (6,), ("vector", "adamw", 2 * 4 * 6)),
        (jol.lion_muon(1e-3, matrix_axes=Axes(1, 2)), (2, 4, 6), ("matrix", "lion_muon", 200)),
    ],
)
def test_a_bare_array_has_its_state(tx, shape, row):
    for param in (jnp.ones(shape), jax.ShapeDtypeStruct(shape, "float32")):
        found = jol.describe(tx, param)
        assert [(r.path, r.role, r.rule, r.state_bytes) for r in found.rows] == [("", *row)]
        assert found.total_bytes == found.shared_bytes + row[-1]
