"""Models in both faces of Flax, with the same names: an MLP, a convolutional network, an attention block."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

WIDTH, CLASSES = 32, 4


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="first")(x))
        x = nn.relu(nn.Dense(WIDTH, name="second")(x))
        return nn.Dense(CLASSES, name="third")(x)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, 64, rngs=rngs)
        self.second = nnx.Linear(64, WIDTH, rngs=rngs)
        self.third = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(WIDTH, (3, 3), strides=2, padding="CIRCULAR", name="second")(x))
        return nn.Dense(CLASSES, name="third")(x.mean(axis=(1, 2)))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, WIDTH, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs)
        self.third = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.third(x.mean(axis=(1, 2)))


def attention_weights(query, key, value, *args, **kwargs):
    """Plainly, for the two faces multiply in another order."""
    scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqs,bshk->bqhk", nnx.softmax(scores), value)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadAttention(num_heads=4, attention_fn=attention_weights, name="attention")(x)
        x = nn.Einsum((WIDTH, 2, 16), "btd,dhk->bthk", name="einsum")(x)
        return nn.DenseGeneral(CLASSES, axis=(-2, -1), name="out")(nn.relu(x)).mean(axis=1)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, WIDTH, attention_fn=attention_weights, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (WIDTH, 2, 16), (2, 16), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 16), CLASSES, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return self.out(nnx.relu(self.einsum(x))).mean(axis=1)


# name -> Linen's, NNX's, shape of a batch
BOTH = {
    "mlp": (LinenMLP, MLP, (8, WIDTH)),
    "cnn": (LinenCNN, CNN, (8, 6, 6, 8)),
    "attention": (LinenAttention, Attention, (8, 5, WIDTH)),
}
