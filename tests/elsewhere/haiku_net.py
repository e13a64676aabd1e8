"""Attention, a norm and a head in Haiku, whose modules have slashes in their names."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import jaxopt_lab as jol
from tests.elsewhere.runs import METHODS, train


def main() -> None:
    """Steps, and which leaves are embeddings and heads."""

    def forward(tokens):
        x = hk.LayerNorm(-1, True, True)(hk.Embed(11, 8)(tokens))
        init = hk.initializers.VarianceScaling()
        x = x + hk.MultiHeadAttention(2, 4, w_init=init)(x, x, x)
        return hk.Linear(11, name="head")(hk.nets.MLP([16, 8])(x))

    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 11)
    net = hk.without_apply_rng(hk.transform(forward))
    params = net.init(jax.random.key(0), tokens)

    def loss(params):
        logits, labels = net.apply(params, tokens), jnp.roll(tokens, 1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for factory in METHODS.values():
        roles = {r.path: r.role for r in jol.describe(factory(1e-3), params).rows}
        found = roles["['embed']['embeddings']"], roles["['head']['w']"]
        assert found == ("embedding", "head"), roles
    train("haiku", params, loss)


if __name__ == "__main__":
    main()
