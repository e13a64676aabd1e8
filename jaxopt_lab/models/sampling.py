"""Sampling continuations from a decoder."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_lab.core.packed import unpacked
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.models.decoder import Params, bind


def generate(
    config: DecoderConfig,
    params: Params,
    prompt_tokens: jax.Array,
    *,
    steps: int,
    temperature: float = 1.0,
    key: jax.Array,
) -> jax.Array:
    """Continues prompts token by token.

    Each token is drawn from the model's distribution given the last ``config.context`` tokens
    before it. Every step runs the model on the whole window and the head on one position: simple
    and exact also when the window slides, meant for samples of a few hundred tokens.

    Args:
        config: of the decoder.
        params: as from `init_params`. On a mesh they stay where they are: a window is small beside
            them, so that activations move from device to device.
        prompt_tokens: (P,) or (B, P) with P >= 1, of any length.
        steps: number of tokens to add.
        temperature: divides the logits; 0 takes the most likely token.
        key: PRNG key; step i draws with ``fold_in(key, i)``.

    Returns:
        The prompt with its continuation, (P + steps,) or (B, P + steps).

    Raises:
        ValueError: for an empty prompt, negative ``steps`` or ``temperature``.

    >>> from jaxopt_lab.models import init_params
    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> generate(config, params, jnp.array([1, 2]), steps=3, key=jax.random.key(1)).shape
    (5,)
    """
    prompt_tokens = jnp.asarray(prompt_tokens, jnp.int32)
    if prompt_tokens.ndim not in (1, 2) or prompt_tokens.shape[-1] == 0:
        raise ValueError(
            f"prompt_tokens: got shape {prompt_tokens.shape}, wanted (P,) or (B, P) with P >= 1"
        )
    if steps < 0:
        raise ValueError(f"steps: got {steps}, wanted at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, wanted at least 0")
    prompt_BxP = jnp.atleast_2d(prompt_tokens)
    new_BxS = _continue(config, steps, params, prompt_BxP, temperature, key)
    tokens_BxN = jnp.concatenate([prompt_BxP, new_BxS], axis=1)
    return tokens_BxN if prompt_tokens.ndim == 2 else tokens_BxN[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    config: DecoderConfig,
    steps: int,
    params: Params,
    prompt_BxP: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    B, P = prompt_BxP.shape
    W = min(config.context, P + steps)
    known = min(P, W)
    window_BxW = jnp.zeros((B, W), jnp.int32).at[:, :known].set(prompt_BxP[:, P - known :])
    segment_ids_BxW = jnp.zeros((B, W), jnp.int32) if config.document_mask else None
    decoder = bind(config, params)
    head_DxV = unpacked(decoder.head_kernel())  # once, not for each token

    def step(carry: tuple[jax.Array, jax.Array], i: jax.Array):
        window_BxW, filled = carry
        x_BxWxD = decoder.hidden(window_BxW, segment_ids_BxW)
        # Positions after the last known token hold padding, which causality hides.
        x_BxD = jax.lax.dynamic_index_in_dim(x_BxWxD, filled - 1, axis=1, keepdims=False)
        token_B = _draw(x_BxD @ head_DxV, temperature, jax.random.fold_in(key, i))
        full = filled == W
        window_BxW = jnp.where(full, jnp.roll(window_BxW, -1, axis=1), window_BxW)
        position = jnp.where(full, W - 1, filled)
        window_BxW = jax.lax.dynamic_update_index_in_dim(window_BxW, token_B, position, axis=1)
        return (window_BxW, jnp.minimum(filled + 1, W)), token_B

    _, new_SxB = jax.lax.scan(step, (window_BxW, jnp.int32(known)), jnp.arange(steps))
    return new_SxB.T


def _draw(logits_BxV: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
    logits_BxV = logits_BxV.astype(jnp.promote_types(logits_BxV.dtype, jnp.float32))
    likeliest_B = jnp.argmax(logits_BxV, axis=-1)
    divisor = jnp.where(temperature > 0, temperature, 1)
    drawn_B = jax.random.categorical(key, logits_BxV / divisor)
    return jnp.where(temperature > 0, drawn_B, likeliest_B).astype(jnp.int32)
