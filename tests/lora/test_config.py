"""Patterns to adapters: a table, and what is refused."""

import jax
import pytest

from jaxopt_lab import lora, models
from jaxopt_lab.models import abstract_params, matrix_axes, matrix_names
from tests.models.decoders import GPT2_BIASED, GQA, LLAMA


def resolved(config, names=True, **options):
    names = matrix_names(config) if names else None
    axes = matrix_axes(config)
    return lora.resolve(lora.LoraConfig(rank=2, **options), abstract_params(config), axes, names)


def kept(spec):
    return sorted(e.names[i] for e in spec.adapters for i in e.kept)


def short(spec):
    return sorted({name.split(".", 3)[-1] for name in kept(spec)})


ATTENTION = [f"self_attn.{p}_proj" for p in "kqv"]
MLP = [f"mlp.{p}_proj" for p in ("down", "gate", "up")]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, sorted([*MLP, *ATTENTION, "self_attn.o_proj"])),
        ({"target": ("q_proj", "v_proj")}, ["self_attn.q_proj", "self_attn.v_proj"]),
        ({"target": ("self_attn.q_proj",)}, ["self_attn.q_proj"]),
        ({"target": r".*\.(gate|up)_proj"}, ["mlp.gate_proj", "mlp.up_proj"]),
        ({"target": ("qkv",)}, ATTENTION),
        ({"target": r"layers\.attention\..*"}, sorted([*ATTENTION, "self_attn.o_proj"])),
        (
            {"exclude": ("k_proj", "mlp.up")},
            sorted(
                [
                    "mlp.down_proj",
                    "mlp.gate_proj",
                    "self_attn.o_proj",
                    "self_attn.q_proj",
                    "self_attn.v_proj",
                ]
            ),
        ),
    ],
)
def test_targets(options, wanted):
    assert short(resolved(LLAMA, **options)) == wanted


def test_layers_ranks_and_scales():
    spec = resolved(
        LLAMA,
        target=("q_proj", "down_proj"),
        layers=(1,),
        alpha=8,
        rank_pattern={"down_proj": 4, "mlp.down_proj": 3},
        alpha_pattern={r"self_attn\.q_proj": 6},
    )
    assert kept(spec) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert {e.path[-2]: (e.rank, e.scale) for e in spec.adapters} == {
        "down": (4, 2.0),
        "qkv": (2, 3.0),
    }
    scale = resolved(LLAMA, target=("q_proj",), alpha=8, rslora=True).adapters[0].scale
    assert scale == pytest.approx(8 / 2**0.5)


def test_shapes_follow_the_layout():
    spec = resolved(GQA)
    shapes = {e.path[-2]: e.matrix_shape for e in spec.adapters}
    assert shapes["kv"] == (4, 16, 8) and shapes["q"] == (2, 16, 16)
    adapters = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), spec, models.init_params(GQA, jax.random.key(0)))
    )
    kv = adapters["layers"]["attention"]["kv"]["kernel"]
    assert (kv["a"].shape, kv["b"].shape) == ((4, 16, 2), (4, 2, 8))
    count = sum(x.size for x in jax.tree.leaves(adapters))
    assert count == spec.parameter_count and f"{count:,} parameters" in str(spec)


def test_without_names_matrices_are_numbered():
    spec = resolved(LLAMA, names=False, target=("qkv.0.2", "qkv.1.0"))
    assert kept(spec) == ["layers.attention.qkv.0.2", "layers.attention.qkv.1.0"]


def test_heads_norms_and_biases_are_trained_whole():
    spec = resolved(GPT2_BIASED, target=("c_fc",), full=("head", "final_norm"), bias="lora_only")
    found = {".".join(path) for path in spec.full}
    assert found == {"head", "final_norm.scale", "final_norm.bias", "layers.mlp.up.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ("query",)}, "target: 'query' matches nothing; there are"),
        ({"target": ("q_prj",)}, "target: 'q_prj' matches nothing; there are .*q_proj"),
        ({"target": "q_proj"}, "target: 'q_proj' matches nothing"),  # a string must match the whole
        ({"exclude": ("nope",)}, "exclude: 'nope' matches nothing"),
        ({"rank_pattern": {"nope": 2}}, "rank_pattern: 'nope' matches nothing"),
        ({"alpha_pattern": {"nope": 2}}, "alpha_pattern: 'nope' matches nothing"),
        ({"full": ("nrm",)}, "full: 'nrm' matches nothing"),
        ({"layers": (7,)}, r"layers \(7,\) leave nothing to adapt"),
        ({"target": ("embedding",)}, "target: 'embedding' matches nothing"),
        (
            {"rank_pattern": {"q_proj": 17}, "target": ("q_proj",)},
            "qkv.kernel: got rank 17, wanted at most 16",
        ),
        ({"rank_pattern": {"q_proj": 4}}, "have one rank and alpha; .* rank 2 .* rank 4"),
        ({"full": ("layers.mlp",)}, "trained whole and has an adapter"),
        ({"target": "("}, r"pattern '\('"),
        ({"dropout": 1.0}, "LoraConfig.dropout: got 1.0"),
        ({"init": "zeros"}, "LoraConfig.init: got 'zeros'"),
        ({"bias": "some"}, "LoraConfig.bias: got 'some'"),
        ({"alpha": float("nan")}, "LoraConfig.alpha: got nan"),
        ({"alpha_pattern": {"qkv": "2"}}, "LoraConfig.alpha_pattern of 'qkv': got '2'"),
        ({"dtype": "int32"}, "LoraConfig.dtype: got 'int32'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolved(LLAMA, **options)


def test_a_spec_is_static():
    one, two = resolved(LLAMA), resolved(LLAMA)
    assert one == two and hash(one) == hash(two)
    assert one != resolved(LLAMA, target=("q_proj",))
