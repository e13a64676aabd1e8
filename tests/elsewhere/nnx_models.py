"""Flax's `examples/mnist/train.py` and the layers of `examples/gemma/modules.py`, with NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxopt_lab as jol
from tests.elsewhere.runs import METHODS, STEPS, train


class CNN(nnx.Module):
    """The convolutional net of the example, smaller."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 8, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(8 * 7 * 7, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        """Logits of images (batch, 28, 28, 1)."""
        x = nnx.avg_pool(nnx.relu(self.batch_norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class Gemma(nnx.Module):
    """One block with grouped attention."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedder = nnx.Embed(32, 16, rngs=rngs)
        self.attn = nnx.Dict(
            q_einsum=nnx.Einsum("BTD,NDH->BTNH", (4, 16, 4), rngs=rngs),
            kv_einsum=nnx.Einsum("BTD,CKDH->CBTKH", (2, 2, 16, 4), rngs=rngs),
            attn_vec_einsum=nnx.Einsum("BTNH,NHD->BTD", (4, 4, 16), rngs=rngs),
        )
        self.mlp = nnx.Dict(
            gate_proj=nnx.Linear(16, 32, use_bias=False, rngs=rngs),
            up_proj=nnx.Linear(16, 32, use_bias=False, rngs=rngs),
            down_proj=nnx.Linear(32, 16, use_bias=False, rngs=rngs),
        )

    def __call__(self, tokens):
        """Logits of tokens (batch, time)."""
        x = self.embedder(tokens)
        q, (k, v) = self.attn.q_einsum(x), self.attn.kv_einsum(x)
        x = x + self.attn.attn_vec_einsum(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        y = nnx.gelu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.embedder.attend(x + self.mlp.down_proj(y))


def optimizer_steps(model, inputs, labels) -> None:
    """The training loop of the examples: `nnx.Optimizer`."""
    for name, factory in METHODS.items():
        tx = factory(1e-2, matrix_axes=jol.flax_matrix_axes)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                logits = model(inputs)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(STEPS)]
        print(f"{'Optimizer':12s}{name:12s}loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        if not losses[-1] < losses[0]:
            raise SystemExit(f"nnx.Optimizer, {name}: {losses}")


def main() -> None:
    """Both models, by functions of the state and by `nnx.Optimizer`."""
    images = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 32)
    for project, model, inputs, labels in (
        ("mnist", CNN(nnx.Rngs(0)), images, jnp.arange(8)),
        ("gemma", Gemma(nnx.Rngs(0)), tokens, jnp.roll(tokens, -1, 1)),
    ):
        graph, params, others = nnx.split(model, nnx.Param, ...)

        def loss(params, graph=graph, others=others, inputs=inputs, labels=labels):
            logits = nnx.merge(graph, params, others, copy=True)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        train(project, params, loss, jol.flax_matrix_axes(params))
        optimizer_steps(model, inputs, labels)


if __name__ == "__main__":
    main()
