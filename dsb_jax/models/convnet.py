"""A small convolutional network for images of 8 to 32 pixels: four 3x3 convolutions of 32 to 128 channels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ConvNet(nn.Module):
    """Convolution, batch norm, relu four times; the third halves the resolution; then the mean and a classifier."""

    num_classes: int
    conv: Callable[..., nn.Module] = nn.Conv
    dense: Callable[..., nn.Module] = nn.Dense
    dtype: Any = jnp.float32
    width_multiplier: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, (width, stride) in enumerate(((32, 1), (64, 1), (128, 2), (128, 1))):
            name = "stem" if i == 0 else f"conv_{i}"
            features = round(width * self.width_multiplier)
            x = self.conv(
                features, (3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(), name=name,
            )(x)  # fmt: skip
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm_{i}")(x)
            x = nn.relu(x)
        return self.dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))).astype(jnp.float32)
