"""VGG-16 in its CIFAR form: 13 convolutions with batch norm and one classifier.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
configuration D; the three linear layers give way to one, as usual for 32x32 images.
"""

import jax
from flax import linen as nn

from dsb_jax.training.models.layers import Layers, max_pool

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Five stages of 3x3 convolutions, each followed by a 2x2 max pooling: images of 32x32 pixels at least."""

    num_classes: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = self.layers
        least = 2 ** len(STAGES)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"model='vgg16' halves its images {len(STAGES)} times and needs {least}x{least} pixels at least, not "
                f"{x.shape[1]}x{x.shape[2]}; choose another model: --model=convnet takes images of any size."
            )
        x = layers.enter(x)
        for i, widths in enumerate(STAGES):
            for j, width in enumerate(widths):
                name = "stem" if i == j == 0 else f"conv_{i}_{j}"
                x = layers.convolution(layers.width(width), name=name)(x)
                x = layers.norm(f"norm_{i}_{j}", train=train)(x)
                # Pooling commutes with relu, which then has a quarter of the work.
                x = nn.relu(max_pool(x) if j + 1 == len(widths) else x)
        return layers.classify(x, self.num_classes)
