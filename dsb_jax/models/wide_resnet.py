"""Wide residual networks of any depth 6n + 4 and width, for 32x32 images.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: pre-activation blocks, optional dropout between the
two convolutions, three stages of 16, 32, 64 times the width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class WideBlock(nn.Module):
    """Batch norm, relu, convolution, twice; the skip is a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    dropout_rate: float
    conv: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal())
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        y = nn.relu(norm(name="norm_0")(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = conv(self.features, (1, 1), strides=strides, name="conv_skip")(y)
        y = conv(self.features, (3, 3), strides=strides, padding=padding, name="conv_0")(y)
        y = nn.relu(norm(name="norm_1")(y))
        if self.dropout_rate:
            y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return x + conv(self.features, (3, 3), padding=padding, name="conv_1")(y)


class WideResNet(nn.Module):
    """`depth = 6n + 4`: three stages of n blocks."""

    num_classes: int
    depth: int = 22
    width: int = 2
    dropout_rate: float = 0.0
    conv: Callable[..., nn.Module] = nn.Conv
    dense: Callable[..., nn.Module] = nn.Dense
    dtype: Any = jnp.float32
    width_multiplier: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.conv(
            16, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(), name="stem",
        )(x)  # fmt: skip
        for stage, base in enumerate((16, 32, 64)):
            features = round(base * self.width * self.width_multiplier)
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                x = WideBlock(
                    features, stride, self.dropout_rate, self.conv, self.dtype, name=f"block_{stage}_{block}"
                )(x, train)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")(x))
        return self.dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))).astype(jnp.float32)
