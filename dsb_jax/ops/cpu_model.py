"""What each pass of a layer costs on a CPU with each implementation, from static sizes alone.

Each is a sum of what bounds it: products, at a share of what the vector units can do; activations that are read,
written and brought into another order; weights. The constants are fitted to measurements of one kind of processor
(`python -m experiments.tune`). Only ratios matter, so they carry over to others with another clock; width of the
vectors, cores and L2 are parameters.
"""

import dataclasses
import functools
import math
import os

from dsb_jax.ops.layer_call import LayerCall
from pallas_kernels.interface import Passes

VECTOR = 16  # floats, of the processor that the constants were fitted to


@dataclasses.dataclass(frozen=True)
class CpuFacts:
    """What the speed of the implementations depends on.

    Attributes:
      vector: floats of a vector that the native kernels use.
      cores: that a program may use.
      l2: bytes of a core's second cache.
    """

    vector: int = VECTOR
    cores: int = 1
    l2: int = 2 << 20


@functools.cache
def cpu_facts(vector: int) -> CpuFacts:
    """Of this machine; `vector` is what the native kernels use, 0 without any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = getattr(os, "sysconf_names", {})
    l2 = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in names else 0
    return CpuFacts(vector or VECTOR, cores, l2 if l2 > 0 else CpuFacts.l2)


def cpu_ratios(layer: LayerCall, cpu: CpuFacts) -> dict[str, Passes]:
    return {"native": Passes(0.3, 0.3, 0.3), "xla": Passes(*[_xla_ratio(layer)] * 3)}


# Nanoseconds for forward and backward together, fitted by least squares of the logarithms to 98 times of 14 layers
# (64 channels at 32x32 to a 512x512 linear layer, strides 1 and 2, batch 128, float32; densities 0.1, 0.2, 0.5; 16x16
# and 32x8 blocks, feature-major) on a 2-core x86 CPU. Good to some 20 to 30 %.
_DENSE_ACTIVATION = 8.1  # each element of the input and the output
_DENSE_PRODUCT = 0.035  # each weight at each position
# The same where XLA's weight gradient is slow, see `_slow_in_xla`: 3x3 over 64 and 128 channels at 16x16 and 32x32 took
# 0.05 to 0.09 on one machine, 0.03 to 0.05 on another, and the sparse product 0.7 to 0.9 of dense on both.
_DENSE_PRODUCT_LARGE = 0.06
_DENSE_WEIGHT = 9.1  # each weight of the unpacked kernel
_SPARSE_ACTIVATION = 3.4  # each element of the input and the output
_SPARSE_COPY = 1.3  # each column of a panel at each position: the gather
_SPARSE_PRODUCT = 0.031  # each stored weight at each position
_SPARSE_WEIGHT = 20.0  # each stored weight


def _activations(layer: LayerCall) -> int:
    """Elements of the input and of the output."""
    return layer.input_elements + layer.output_elements


def _columns(layer: LayerCall) -> int:
    """Columns of all panels together: rows that the forward pass gathers for each output position."""
    return layer.spec.num_blocks * layer.spec.block_shape[1]


def _slow_in_xla(layer: LayerCall) -> bool:
    """Whether XLA's weight gradient of a convolution is slow on a CPU: over many positions for each image."""
    return layer.positions_per_example >= 200 and math.prod(layer.spec.kernel_size) > 1


def _xla_ratio(layer: LayerCall) -> float:
    """Predicted training-step time of the `xla` product over that of the dense fallback, on a CPU."""
    activations, positions, columns = _activations(layer), layer.positions, _columns(layer)
    rows = layer.spec.block_shape[0]
    sparse = _SPARSE_ACTIVATION * activations + columns * positions * (_SPARSE_COPY + rows * _SPARSE_PRODUCT)
    sparse += columns * rows * _SPARSE_WEIGHT
    product = _DENSE_PRODUCT_LARGE if _slow_in_xla(layer) else _DENSE_PRODUCT
    dense = _DENSE_ACTIVATION * activations + layer.spec.size * (positions * product + _DENSE_WEIGHT)
    return sparse / dense


