"""What a device could do at best, and from which sparsity on sparse is faster than dense."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsb_jax.ops.cpu_model import available_cores
from dsb_jax.ops.native import loading
from experiments import timing
from experiments.kernel_shapes import Layer


@dataclasses.dataclass(frozen=True)
class Device:
    """Measured limits.

    Attributes:
      bandwidth: bytes a second that a large copy reads and writes, both counted.
      flops: operations a second of a large dense product, a multiplication and an addition counted as two.
      core_peak: operations a second of all cores that are used, in registers alone; None but of a CPU with native
        kernels.
    """

    bandwidth: float
    flops: float
    core_peak: float | None = None


def measure_device(dtype: str, rounds: int = 5) -> Device:
    """Runs a large copy and a large dense product; sizes are by the backend."""
    on_gpu = jax.default_backend() == "gpu"
    size = 8192 if on_gpu else 1024
    held = [jnp.ones((1 << (27 if on_gpu else 24),), jnp.float32)]
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    calls = 10 if on_gpu else 1  # one after the other, waited for once

    negative = jax.jit(jnp.negative, donate_argnums=0)  # in place: fresh memory would cost a CPU more than the copy
    multiply = jax.jit(jnp.matmul)

    def copy() -> jax.Array:
        for _ in range(calls):
            held[0] = negative(held[0])
        return held[0]

    def product() -> jax.Array:
        for _ in range(calls):
            result = multiply(matrix, matrix)
        return result

    times = timing.in_turns({"copy": copy, "product": product}, rounds)
    copied, multiplied = (min(times[name]) / calls for name in ("copy", "product"))  # a limit: the best counts
    peak = None if on_gpu or loading.unavailable_reason() else loading.peak_flops() * available_cores()
    return Device(bandwidth=2 * held[0].nbytes / copied, flops=2 * size**3 / multiplied, core_peak=peak)


def bound(layer: Layer, weights: int, index_bytes: int, itemsize: int, device: Device) -> float:
    """Seconds that any of the three passes takes at the least.

    Every operand crosses the memory once (each pass reads two of input, output and weights, and writes the third), and
    every weight meets every output position. What stays in a cache from one call to the next may beat the former.

    Args:
      layer: sizes.
      weights: weights that are stored: `out * in` of a dense layer.
      index_bytes: size of the index arrays, 0 of a dense layer.
      itemsize: bytes of a number.
      device: its limits.
    """
    moved = (weights + layer.input_elements + layer.output_elements) * itemsize + index_bytes
    return max(2 * weights * layer.positions / device.flops, moved / device.bandwidth)


def break_even(sparsities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """The sparsity from which on sparse is at least as fast as dense, at every measured sparsity above it.

    Between two measurements the time over dense, `1 / speedup`, is taken to be linear in the sparsity, as the work is.

    Args:
      sparsities: measured, in any order, each once.
      speedups: time of dense over time of sparse at each; positive.

    Returns:
      None if sparse is slower at the highest of them. The lowest if it is as fast at all of them: the true point may
      lie below.

    Raises:
      ValueError: if a sparsity comes twice, or the two do not match.
    """
    if len(set(sparsities)) != len(speedups) or len(sparsities) != len(speedups):
        raise ValueError(f"{len(speedups)} speed-ups for the sparsities {list(sparsities)}; give one for each, once.")
    order = np.argsort(sparsities)
    at, ratio = np.asarray(sparsities, float)[order], 1 / np.asarray(speedups, float)[order]
    slower = np.flatnonzero(ratio > 1)
    if not at.size or (slower.size and slower[-1] == at.size - 1):
        return None
    if not slower.size:
        return float(at[0])
    i = slower[-1]
    share = (ratio[i] - 1) / (ratio[i] - ratio[i + 1])
    return float(at[i] + share * (at[i + 1] - at[i]))
