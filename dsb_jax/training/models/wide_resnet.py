"""Wide residual networks of any depth 6n + 4 and width, for 32x32 images.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: pre-activation blocks, optional dropout between the
two convolutions, three stages of 16, 32, 64 times the width.
"""

import jax
from flax import linen as nn

from dsb_jax.training.models.layers import Layers


class WideBlock(nn.Module):
    """Batch norm, relu, convolution, twice; the skip is a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    dropout_rate: float
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layers = self.layers
        y = nn.relu(layers.norm("norm_0", train=train)(x))
        if layers.num_features(x) != self.features or self.stride != 1:
            x = layers.convolution(self.features, 1, stride=self.stride, name="conv_skip")(y)
        y = layers.convolution(self.features, stride=self.stride, name="conv_0")(y)
        y = nn.relu(layers.norm("norm_1", train=train)(y))
        if self.dropout_rate:
            y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return x + layers.convolution(self.features, name="conv_1")(y)


class WideResNet(nn.Module):
    """`depth = 6n + 4`: three stages of n blocks."""

    num_classes: int
    depth: int = 22
    width: int = 2
    dropout_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = self.layers
        x = layers.convolution(16, name="stem")(layers.enter(x))
        for stage, base in enumerate((16, 32, 64)):
            features = layers.width(base * self.width)
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                x = WideBlock(features, stride, self.dropout_rate, layers, name=f"block_{stage}_{block}")(x, train)
        x = nn.relu(layers.norm("norm", train=train)(x))
        return layers.classify(x, self.num_classes)
