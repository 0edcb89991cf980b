"""ResNet-18 in its CIFAR form: a 3x3 stem without pooling, four stages of two basic blocks.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, which is projected by a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal())
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        y = conv(self.features, (3, 3), strides=strides, padding=padding, name="conv_0")(x)
        y = nn.relu(norm(name="norm_0")(y))
        y = conv(self.features, (3, 3), padding=padding, name="conv_1")(y)
        y = norm(name="norm_1")(y)
        if x.shape != y.shape:
            x = norm(name="norm_skip")(conv(self.features, (1, 1), strides=strides, name="conv_skip")(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Stages of 64, 128, 256, 512 channels at full, half, quarter and eighth resolution."""

    num_classes: int
    conv: Callable[..., nn.Module] = nn.Conv
    dense: Callable[..., nn.Module] = nn.Dense
    dtype: Any = jnp.float32
    width_multiplier: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        widths = [round(width * self.width_multiplier) for width in (64, 128, 256, 512)]
        x = self.conv(
            widths[0], (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(), name="stem",
        )(x)  # fmt: skip
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm_stem")(x))
        for stage, width in enumerate(widths):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(width, stride, self.conv, self.dtype, name=f"block_{stage}_{block}")(x, train)
        return self.dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))).astype(jnp.float32)
