"""Batch norm of the models: that of flax, in a form whose gradient reads and keeps less.

Ioffe and Szegedy, "Batch Normalization", ICML 2015. The normalized x is written as x * a + b, with one a and one b for
each feature. So what the backward pass needs of a feature map is the map itself, and dx is a * dy + c * x + d; flax
subtracts the mean first, for which XLA writes x - mean beside x, and keeps it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class BatchNorm(nn.Module):
    """Batch norm over all axes but one; names, shapes and values of `flax.linen.BatchNorm`, up to rounding.

    Attributes:
      use_running_average: normalize by the averages of training instead of the statistics of this batch.
      axis: of the features.
      momentum: of the averages: new = momentum * old + (1 - momentum) * of this batch.
      epsilon: added to the variance.
      dtype: of the result; statistics are float32.
    """

    use_running_average: bool
    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axis = self.axis % x.ndim
        features = (x.shape[axis],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        average = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        average_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        wide = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = average.value, average_var.value
        else:
            others = tuple(i for i in range(x.ndim) if i != axis)
            mean = wide.mean(others)
            var = jnp.maximum(jnp.square(wide).mean(others) - jnp.square(mean), 0.0)
            if not self.is_initializing():
                average.value = self.momentum * average.value + (1 - self.momentum) * mean
                average_var.value = self.momentum * average_var.value + (1 - self.momentum) * var
        a = scale * jax.lax.rsqrt(var + self.epsilon)
        b = bias - mean * a
        shape = [1] * x.ndim
        shape[axis] = -1
        return (wide * a.reshape(shape) + b.reshape(shape)).astype(self.dtype)
