"""A decoder as in nanodo (`nanodo/model.py`, `nanodo/fsdp.py`) on two devices, in boxes."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxopt_lab as jol
from tests.elsewhere.runs import METHODS, train

D, H, L, V, F = 16, 2, 8, 32, 32


def boxed(*names):
    """An initialiser whose parameters carry the names of mesh axes."""
    return nn.with_partitioning(nn.initializers.xavier_uniform(), names)


class CausalAttn(nn.Module):
    """nanodo's attention, without biases."""

    @nn.compact
    def __call__(self, x):
        def projection(name):
            return nn.DenseGeneral(
                (H, D // H), use_bias=False, kernel_init=boxed("data", None), name=name
            )(x)

        q, k, v = map(projection, ("query", "key", "value"))
        att = jnp.einsum("bqhd,bkhd->bhqk", q / (D // H) ** 0.5, k)
        att = jnp.where(jnp.tril(jnp.ones((L, L), bool)), att, -1e30)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(att), v)
        dense = nn.DenseGeneral(
            D, axis=(-2, -1), use_bias=False, kernel_init=boxed(None, "data"), name="attn_out_proj"
        )
        return dense(out)


class Decoder(nn.Module):
    """Embeddings, one block, logits by the embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, embedding_init=boxed(None, "data"), name="embed")
        x = embed(tokens) + nn.Embed(L, D, name="pos_embed")(jnp.arange(L))
        x = x + CausalAttn()(nn.LayerNorm(use_bias=False)(x))
        y = nn.Dense(F, use_bias=False, kernel_init=boxed("data", None))(x)
        x = x + nn.Dense(D, use_bias=False, kernel_init=boxed(None, "data"))(nn.gelu(y))
        return embed.attend(nn.LayerNorm(use_bias=False, name="out_ln")(x))


def main() -> None:
    """Plain steps, then a sharded state for boxed parameters."""
    tokens = jax.random.randint(jax.random.key(1), (4, L), 0, V)
    model = Decoder()

    def loss(params):
        logits = model.apply({"params": params}, tokens)
        targets = jnp.roll(tokens, -1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    params = model.init(jax.random.key(0), tokens)["params"]
    train("nanodo", nn.unbox(params), loss, jol.flax_matrix_axes)
    train("boxed", params, loss, jol.flax_matrix_axes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = nn.get_sharding(params, mesh)
    placed = jax.device_put(params, shardings)
    for name, factory in METHODS.items():
        tx = factory(1e-2, matrix_axes=jol.flax_matrix_axes)
        state = jax.jit(tx.init, out_shardings=jol.state_shardings(tx, params, shardings))(placed)
        _, state = jax.jit(tx.update)(jax.grad(loss)(placed), state, placed)
        print(f"{'sharded':12s}{name}")


if __name__ == "__main__":
    main()
