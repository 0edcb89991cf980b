"""A decoder-only transformer of the usual pre-norm form for text of any vocabulary: tokens in, next-token logits out.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017; normalization before each part as in Radford et al., 2019.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.training.models.layers import Layers

HEADS = 4


class DecoderBlock(nn.Module):
    """Causal attention and a GELU network of four times the width, each added to what goes in."""

    width: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = self.layers
        y = layers.layer_norm("norm_attention")(x)
        query, key, value = (
            layers.linear(self.width, name=name)(y).reshape(*y.shape[:-1], HEADS, -1)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(y.shape)
        x = x + layers.linear(self.width, name="out")(y)
        y = nn.gelu(layers.linear(4 * self.width, name="up")(layers.layer_norm("norm_mlp")(x)))
        return x + layers.linear(self.width, name="down")(y)


class Transformer(nn.Module):
    """`__call__(tokens[N, T]) -> logits[N, T, num_classes]`; embeddings and the last layer are no sparse layers."""

    num_classes: int
    depth: int = 2
    width: int = 128
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        layers = self.layers
        width = HEADS * max(round(layers.width(self.width) / HEADS), 1)
        x = nn.Embed(self.num_classes, width, embedding_init=nn.initializers.normal(0.1), name="embed")(tokens)
        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[-1], width))
        x = (x + positions[None]).astype(layers.dtype)
        for i in range(self.depth):
            x = DecoderBlock(width, layers, name=f"block_{i}")(x)
        x = layers.layer_norm("norm")(x)
        return layers.linear(self.num_classes, name="head")(x).astype(jnp.float32)
