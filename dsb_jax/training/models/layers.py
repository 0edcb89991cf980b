"""The layers that the models are built of, in either order of activations.

The models take images [N, H, W, C]. Inside, activations are [N, H, W, C] too, or *feature-major*, [C, H, W, N]: the
form that the shuffled-block products read and write, so that nothing is transposed between layers (on a CPU the
transposes took half of a training step). Height and width are axes 1 and 2 of both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.training.models.batch_norm import BatchNorm


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layer classes and how they are called; hashable, a static attribute of the models.

    Attributes:
      conv, dense: classes with the signatures of `nn.Conv` and `nn.Dense`.
      dtype: of the computation; parameters stay float32.
      width_multiplier: scales every hidden width, as for a smaller dense model.
      feature_major: whether activations are [C, H, W, N]; `conv` must then take them so (as `SparseConv` does, when
        it is told to by its own `feature_major`).
    """

    conv: Callable[..., nn.Module] = nn.Conv
    dense: Callable[..., nn.Module] = nn.Dense
    dtype: Any = jnp.float32
    width_multiplier: float = 1.0
    feature_major: bool = False

    def width(self, features: int) -> int:
        """A hidden width of the model, scaled."""
        return round(features * self.width_multiplier)

    def enter(self, images: jax.Array) -> jax.Array:
        """images[N, H, W, C] -> activations."""
        return images.transpose(3, 1, 2, 0) if self.feature_major else images

    def convolution(self, features: int, size: int = 3, *, stride: int = 1, name: str) -> Any:
        """A convolution without bias, padded so that stride 1 keeps height and width."""
        around = (size - 1) // 2, size // 2
        return self.conv(
            features, (size, size), strides=(stride, stride), padding=(around, around), use_bias=False,
            dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=name,
        )  # fmt: skip

    def norm(self, name: str, *, train: bool) -> BatchNorm:
        """Batch norm over all but the features."""
        axis = 0 if self.feature_major else -1
        return BatchNorm(use_running_average=not train, dtype=self.dtype, axis=axis, name=name)

    def linear(self, features: int, *, name: str) -> Any:
        """A linear layer without bias over the last axis."""
        return self.dense(features, use_bias=False, dtype=self.dtype, name=name)

    def layer_norm(self, name: str) -> nn.LayerNorm:
        """Layer norm over the last axis, without a bias."""
        return nn.LayerNorm(use_bias=False, dtype=self.dtype, name=name)

    def num_features(self, x: jax.Array) -> int:
        """Channels of activations."""
        return x.shape[0 if self.feature_major else -1]

    def classify(self, x: jax.Array, num_classes: int) -> jax.Array:
        """Mean over the image and the classifier `head`: logits float32[N, num_classes]."""
        x = x.mean(axis=(1, 2))
        head: Any = self.dense(num_classes, dtype=self.dtype, name="head")
        return head(x.T if self.feature_major else x).astype(jnp.float32)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling of stride 2 in either order; an odd last row or column is dropped.

    By reshaping: XLA's windowed maximum and its gradient are five times slower on a CPU.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    a, height, width, b = x.shape
    x = x.reshape(a, height // 2, 2, width // 2, 2 * b)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[..., :b], x[..., b:])
