"""VGG-16 in its CIFAR form: 13 convolutions with batch norm and one classifier.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
configuration D; the three linear layers give way to one, as usual for 32x32 images.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Five stages of 3x3 convolutions, each followed by a 2x2 max pooling."""

    num_classes: int
    conv: Callable[..., nn.Module] = nn.Conv
    dense: Callable[..., nn.Module] = nn.Dense
    dtype: Any = jnp.float32
    width_multiplier: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, widths in enumerate(STAGES):
            for j, width in enumerate(widths):
                name = "stem" if i == j == 0 else f"conv_{i}_{j}"
                features = round(width * self.width_multiplier)
                x = self.conv(
                    features, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype,
                    kernel_init=nn.initializers.he_normal(), name=name,
                )(x)  # fmt: skip
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm_{i}_{j}")
                x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return self.dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))).astype(jnp.float32)
