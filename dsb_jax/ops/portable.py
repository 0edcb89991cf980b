"""The product of a program that is lowered for several platforms: `xla` on a CPU, `dense` on all others.

`jax.export` traces a model once and lowers it for each platform. Which of the two is meant is decided there, so what
runs has nothing of the other. (The many small steps of `xla` are made for a CPU, and slow on anything else.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from dsb_jax.ops.dense import dense_kernels
from dsb_jax.ops.xla import XLA
from pallas_kernels.interface import Kernels


def _by_platform(on_cpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """One pass, in the form of `Kernels`, by either function."""

    def compute(*operands: Any, **options: Any) -> jax.Array:
        return lax.platform_dependent(
            *operands, cpu=functools.partial(on_cpu, **options), default=functools.partial(elsewhere, **options)
        )

    return compute


PORTABLE = Kernels(*map(_by_platform, XLA, dense_kernels(feature_major=True)))
