"""ResNet-18 in its CIFAR form: a 3x3 stem without pooling, four stages of two basic blocks.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

import jax
from flax import linen as nn

from dsb_jax.training.models.layers import Layers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, which is projected by a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layers = self.layers
        y = layers.convolution(self.features, stride=self.stride, name="conv_0")(x)
        y = nn.relu(layers.norm("norm_0", train=train)(y))
        y = layers.convolution(self.features, name="conv_1")(y)
        y = layers.norm("norm_1", train=train)(y)
        if x.shape != y.shape:
            x = layers.convolution(self.features, 1, stride=self.stride, name="conv_skip")(x)
            x = layers.norm("norm_skip", train=train)(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Stages of 64, 128, 256, 512 channels at full, half, quarter and eighth resolution."""

    num_classes: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = self.layers
        widths = [layers.width(width) for width in (64, 128, 256, 512)]
        x = layers.convolution(widths[0], name="stem")(layers.enter(x))
        x = nn.relu(layers.norm("norm_stem", train=train)(x))
        for stage, width in enumerate(widths):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(width, stride, layers, name=f"block_{stage}_{block}")(x, train)
        return layers.classify(x, self.num_classes)
