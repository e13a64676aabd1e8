"""Small decoders of every style, and batches for them."""

import dataclasses
import functools

import jax
import numpy as np

from jaxopt_lab.models import DecoderConfig, abstract_params, apply, loss, roles

LLAMA = DecoderConfig(vocab_size=64, width=16, depth=2, heads=4, hidden=24, context=12)
GQA = dataclasses.replace(LLAMA, kv_heads=2, tied=False, bias=True)
GPT2 = dataclasses.replace(LLAMA, positions="learned", norm="layer", mlp="gelu", hidden=None)
GPT2_BIASED = dataclasses.replace(GPT2, bias=True, tied=False)
STYLES = {"llama": LLAMA, "gqa": GQA, "gpt2": GPT2, "gpt2-biased": GPT2_BIASED}


def varied_params(config, seed=0):
    """Parameters without the symmetries of a fresh model: no zero biases, no unit scales."""
    rng = np.random.default_rng(seed)
    centre = {"norm": 1.0}

    def draw(leaf, role):
        return (centre.get(role, 0.0) + 0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(draw, abstract_params(config), roles(config))


def tokens(config, batch=2, length=12, seed=2):
    shape = (batch, length)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


# The programs are tiny and run a few times: compiling them fast matters more than running them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def logits(config, params, tokens, segment_ids=None):
    return apply(config, params, tokens, segment_ids)


@functools.partial(jit, static_argnums=0, static_argnames=("z_loss", "head_chunks", "mesh"))
def loss_and_gradient(config, params, batch, **options):
    return jax.value_and_grad(lambda params: loss(config, params, batch, **options), has_aux=True)(
        params
    )


def largest_difference(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return max(float(d) for d in jax.tree.leaves(differences))
