"""What each pass of a layer costs on a CPU with each implementation, from static sizes alone.

Each is a sum of what it does: elements of activations that are read and written, columns that are read at every
position, products, weights that are brought into another order, the call itself. The nanoseconds are fitted to
measurements of one core with AVX-512. Only ratios matter, so they carry over to cores with another clock; the width of
the vectors and the number of cores are parameters.
"""

import dataclasses
import functools
import math
import os

from dsb_jax.ops.layer_call import LayerCall
from pallas_kernels.interface import Passes

VECTOR = 16  # floats of a vector of the processor that the constants were fitted to
LANES = 32  # of a tile of the native kernels: the batch is padded to them
L2_SHARE = 0.8  # of a tile's input


@dataclasses.dataclass(frozen=True)
class CpuFacts:
    """What the speed of the implementations depends on.

    Attributes:
      vector: floats of a vector.
      cores: that a program may use.
      l2: bytes of a core's second cache.
    """

    vector: int = VECTOR
    cores: int = 1
    l2: int = 2 << 20


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_facts(vector: int) -> CpuFacts:
    """Of this machine; `vector` is what the native kernels use, 0 without any."""
    known = "SC_LEVEL2_CACHE_SIZE" in getattr(os, "sysconf_names", {})
    l2 = os.sysconf("SC_LEVEL2_CACHE_SIZE") if known else 0
    return CpuFacts(vector or VECTOR, available_cores(), l2 if l2 > 0 else CpuFacts.l2)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Nanoseconds of one core, for each of these.

    Attributes:
      activation: element of the input and of the output.
      column: column of a panel, of all panels together, at each position.
      product: weight that is multiplied, at each position; a dense kernel has all of them.
      weight: weight, whatever the number of positions.
      call: the whole of it.
    """

    activation: float
    column: float
    product: float
    weight: float
    call: float


# Fitted to 24 layers, 83 cases on one core: convolutions of 32 to 512 channels at 32x32 to 2x2, strides 1 and 2, batch
# 128 and less; matrices of 64x64 to 4096x1024 over 128 to 2048 rows; blocks of 4x4, 16x16 and 32x8, densities 0.1 and
# 0.5. Half of the times are predicted within 16 %, nine of ten within 57 %: the machine was shared. On two cores, what
# the model chooses takes 2.6 % longer than the best choice, on average over passes and cases.
_COSTS = {
    "native": Passes(
        Cost(activation=0.38, column=0.040, product=0.0118, weight=2.3, call=4e4),
        Cost(activation=0.40, column=0.058, product=0.0134, weight=1.5, call=4e4),
        Cost(activation=0.32, column=0.039, product=0.0160, weight=3.2, call=4e4),
    ),
    "xla": Passes(
        Cost(activation=0.63, column=0.39, product=0.0243, weight=0, call=1e4),
        Cost(activation=0.70, column=0.44, product=0.0183, weight=0, call=1e4),
        Cost(activation=0.62, column=0.33, product=0.0228, weight=0.6, call=1e4),
    ),
    "dense": Passes(
        Cost(activation=0.26, column=0, product=0.0187, weight=0.5, call=1e4),
        Cost(activation=0.23, column=0, product=0.0194, weight=0.3, call=1e4),
        Cost(activation=1.24, column=0, product=0.0225, weight=0, call=1e4),
    ),
}
# The share of the work that more cores do not speed up. On two cores native and dense took 0.6 of the time of one, xla,
# whose loops are sequential and its products small, 1.2 times as long.
_SERIAL = {"native": 0.1, "xla": 1.0, "dense": 0.15}


def _halo(layer: LayerCall, l2: int) -> float:
    """How often a tile of the native kernels reads an element of the input, for the rows beyond its own."""
    (kernel_h, kernel_w), (stride_h, stride_w) = layer.geometry.kernel_size, layer.strides
    out_h, out_w = layer.geometry.output_size(*layer.input_size)
    halo_h, halo_w = (kernel_h - 1) // stride_h, (kernel_w - 1) // stride_w
    slot = 4 * LANES * layer.spec.c_in * min(kernel_h, stride_h) * min(kernel_w, stride_w)
    rows = min(out_h, max(1, int(L2_SHARE * l2 / slot / (out_w + halo_w)) - halo_h))
    return (rows + halo_h) / rows


def _lanes(batch: int, vector: int) -> float:
    """Lanes that are computed for each example."""
    half = LANES // 2
    padded = math.ceil(batch / LANES) * LANES if batch > half else math.ceil(batch / vector) * vector
    return padded / max(batch, 1)


def cpu_seconds(layer: LayerCall, cpu: CpuFacts) -> dict[str, Passes]:
    """Predicted seconds of each pass, by implementation."""
    spec, positions = layer.spec, layer.positions
    columns = spec.num_blocks * spec.block_shape[1]
    weights = columns * spec.block_shape[0]
    found = {}
    for name, costs in _COSTS.items():
        share = _SERIAL[name] + (1 - _SERIAL[name]) / cpu.cores
        seconds = []
        for of, cost in zip(Passes._fields, costs, strict=True):
            read, stored, computed = float(layer.input_elements), weights, float(positions)
            if name == "dense":
                stored = spec.size
            if name == "native":
                read *= _halo(layer, cpu.l2) if of != "input_gradient" else 1
                computed *= _lanes(layer.batch, cpu.vector)
            nanoseconds = cost.activation * (read + layer.output_elements) + cost.weight * stored
            vectors = computed * (cost.column * columns + cost.product * stored) * VECTOR / cpu.vector
            seconds.append(1e-9 * (cost.call + share * (nanoseconds + vectors)))
        found[name] = Passes(*seconds)
    return found


def cpu_ratios(layer: LayerCall, cpu: CpuFacts) -> dict[str, Passes]:
    """Predicted time of each pass over that of unpack-then-dense, by implementation."""
    seconds = cpu_seconds(layer, cpu)
    dense = seconds.pop("dense")
    return {name: Passes(*(a / b for a, b in zip(of, dense, strict=True))) for name, of in seconds.items()}
