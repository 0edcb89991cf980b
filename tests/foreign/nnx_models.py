"""NNX models of `attnax` and `jraphx` in small configurations, their code unchanged: model, inputs, logits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import attnax
import jax
import jax.numpy as jnp
from flax import nnx
from jraphx.nn.models import GIN

from tests.foreign.models import BATCH, CLASSES, IMAGES, LENGTH, WORDS

SIZES = {"num_layers": 1, "num_heads": 4, "d_model": 32, "d_ff": 64, "dropout_rate": 0.1}
NODES, EDGES, FEATURES = 24, 64, 16


@dataclasses.dataclass(frozen=True)
class ForeignNNX:
    """One model, with random weights, in training mode.

    Attributes:
      make: rngs -> model.
      inputs: PRNG key -> what it is called with.
      num_sparse: layers that a plan makes sparse.
      logits: model, *inputs -> logits[..., classes].
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: Callable[[jax.Array], tuple[Any, ...]]
    num_sparse: int
    logits: Callable[..., jax.Array] = lambda model, *inputs: model(*inputs)


def vit(rngs):
    options = {"image_size": IMAGES["image_size"], "patch_size": IMAGES["patch_size"], "num_classes": CLASSES}
    return attnax.VisionTransformer(rngs, attnax.VisionTransformerConfig(**options, **SIZES))


def decoder(rngs):
    """In the manner of Llama: rotary positions, two heads for the keys of four, gated MLP, RMS norm."""
    config = attnax.TransformerConfig(
        vocab_size=WORDS, max_len=16, num_kv_heads=2, pos_emb_type="rope", norm_type="rms", ff_activation="swiglu",
        **SIZES,
    )  # fmt: skip
    return attnax.TransformerDecoder(rngs, config)


def tied(model, ids):
    """The decoder has no head of its own."""
    return model(ids) @ model.token_embed.embed.embedding[...].T


def gin(rngs):
    return GIN(FEATURES, 32, 2, CLASSES, norm="batch_norm", dropout_rate=0.1, rngs=rngs)


def image(key):
    return (jax.random.normal(key, (BATCH, IMAGES["image_size"], IMAGES["image_size"], 3)),)


def text(key):
    return (jax.random.randint(key, (BATCH, LENGTH), 0, WORDS),)


def graph(key):
    """Features of nodes, and from where to where edges go."""
    return jax.random.normal(key, (NODES, FEATURES)), jax.random.randint(key, (2, EDGES), 0, NODES)


def labels(logits):
    """A class for each of the leading axis: an image, a text, a node."""
    classes = jnp.arange(logits.shape[0]) % CLASSES
    return jnp.broadcast_to(classes.reshape(-1, *[1] * (logits.ndim - 2)), logits.shape[:-1])


MODELS = {
    "vit": ForeignNNX(vit, image, num_sparse=8),  # q, k, v, out, two of the MLP; patches, head
    "decoder": ForeignNNX(decoder, text, num_sparse=7, logits=tied),  # q, k, v, out, three of the MLP
    "gin": ForeignNNX(gin, graph, num_sparse=4),  # two of each MLP, the last of 10 to 10
}
