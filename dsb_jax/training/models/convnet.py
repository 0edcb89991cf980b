"""Small convolutional networks for images of 8 to 32 pixels: four 3x3 convolutions."""

import jax
from flax import linen as nn

from dsb_jax.training.models.layers import Layers

# Width and stride of the stem and of the three convolutions after it.
CONVNET = ((32, 1), (64, 1), (128, 2), (128, 1))
NARROW_CONVNET = ((32, 1), (32, 2), (64, 2), (64, 1))


class ConvNet(nn.Module):
    """Convolution, batch norm, relu four times; then the mean and a classifier."""

    num_classes: int
    layers: Layers = Layers()
    sizes: tuple[tuple[int, int], ...] = CONVNET

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = self.layers
        x = layers.enter(x)
        for i, (width, stride) in enumerate(self.sizes):
            name = "stem" if i == 0 else f"conv_{i}"
            x = layers.convolution(layers.width(width), stride=stride, name=name)(x)
            x = nn.relu(layers.norm(f"norm_{i}", train=train)(x))
        return layers.classify(x, self.num_classes)
