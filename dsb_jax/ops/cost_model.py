"""What each pass of a layer costs with a sparse product, as a share of unpack-then-dense, from static sizes alone.

The model for CPUs (`dsb_jax.ops.cpu_model`) is fitted to measured layers. The one for GPUs is a roofline of estimates
that no measurement has seen yet: `python -m experiments.tune` writes what is measured, and "auto" believes that first.
"""

import dataclasses
import re

import jax.numpy as jnp

from dsb_jax.ops.cpu_model import cpu_facts, cpu_ratios
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.native import loading
from pallas_kernels.interface import Passes
from pallas_kernels.tiles import weight_gradient_columns


def _activations(layer: LayerCall) -> int:
    """Elements of the input and of the output."""
    return layer.input_elements + layer.output_elements


def _columns(layer: LayerCall) -> int:
    """Columns of all panels together: rows that the forward pass gathers for each output position."""
    return layer.spec.num_blocks * layer.spec.block_shape[1]


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """Rates of a GPU, in FLOP and bytes per second. Peaks are the vendor's for dense operands.

    Attributes:
      half: tensor-core peak of bfloat16 and float16, accumulating in float32.
      tf32: tensor-core peak of float32 operands at default precision.
      cache: bandwidth of the L2 cache; an estimate, vendors do not tell it.
      memory: bandwidth of device memory that a copy reaches; an estimate from the vendor's peak.
      conv_share: of the peak that XLA's dense convolutions of CIFAR size reach; an estimate that every ratio hangs on.
    """

    half: float
    tf32: float
    cache: float
    memory: float
    conv_share: float = 0.6


GENERIC = DeviceFacts(half=200e12, tf32=100e12, cache=2.5e12, memory=1.0e12)  # an estimate for any other GPU
_DEVICES = (
    (r"\bA100\b", DeviceFacts(half=312e12, tf32=156e12, cache=4.0e12, memory=1.6e12)),
    (r"\bL4\b", DeviceFacts(half=121e12, tf32=60e12, cache=1.3e12, memory=0.3e12)),
    (r"\bRTX 4090\b", DeviceFacts(half=165e12, tf32=83e12, cache=4.5e12, memory=1.0e12)),
    (r"\bH100\b", DeviceFacts(half=989e12, tf32=495e12, cache=5.5e12, memory=3.0e12, conv_share=0.43)),
    (r"\bH200\b", DeviceFacts(half=989e12, tf32=495e12, cache=5.5e12, memory=4.3e12, conv_share=0.43)),
)
# Without tensor cores that take bfloat16, and without asynchronous copies, the kernels have nothing to offer.
_BEFORE_AMPERE = r"\b(V100|P100|P40|P4|T4|GTX|TITAN|RTX 20[678]0|Quadro RTX)\b"

# Estimates, all of them: shares of the peak that products reach.
_DENSE_MATMUL_SHARE = 0.8
_SPARSE_SHARE = 0.62  # mma.sync
_OF_BOUND = 0.85  # what a kernel reaches of the rate that bounds it
_LAUNCH = 2e-6  # seconds
_TILE = 128  # positions of a program: a panel is read again by each
_LAUNCHES = Passes(1, 2, 2)  # of the sparse product: one kernel, scatter and collect, kernel and sum over its splits
_UNPACK_LAUNCHES = 3  # zeros, blocks into them, permutation; a gradient takes as many
_UNPACK_PASSES = 3  # reads and writes of a dense kernel for that


def device_facts(device_kind: str) -> DeviceFacts | None:
    """The rates of a GPU by its name, `GENERIC` if it is unknown, None if it is too old for the kernels."""
    if re.search(_BEFORE_AMPERE, device_kind):
        return None
    return next((facts for pattern, facts in _DEVICES if re.search(pattern, device_kind)), GENERIC)


def gpu_sparse_seconds(layer: LayerCall, facts: DeviceFacts) -> Passes:
    """Predicted seconds of each pass of the GPU kernels: the largest of its bounds.

    Through L2 go, for each operation, 1/R elements of gathered rows and 1/128 of the panel (forward), or 1/R and one
    over the columns of a program (weight gradient, whose programs read dY again). The input gradient writes a scratch
    array of one element for each panel column and position to memory, and reads it again.
    """
    itemsize = jnp.dtype(layer.dtype).itemsize
    peak = facts.half if itemsize == 2 else facts.tf32
    rows, columns = layer.spec.block_shape[0], _columns(layer)
    operations = 2 * columns * rows * layer.positions
    width = weight_gradient_columns(rows, columns / layer.spec.num_groups, itemsize)
    memory = _activations(layer) * itemsize / facts.memory
    product = operations / (_SPARSE_SHARE * peak)
    # An operation reads half an element of each kind: it is a multiplication and an addition.
    gathered = operations * itemsize / 2 / facts.cache
    scratch = 2 * columns * layer.positions * itemsize / facts.memory
    bounds = Passes(
        max(gathered * (1 / rows + 1 / _TILE), product, memory),
        max(gathered * (1 / rows + 1 / _TILE), product, memory + scratch),
        max(gathered * (1 / rows + 1 / width), product, memory),
    )
    return Passes(*(b / _OF_BOUND + n * _LAUNCH for b, n in zip(bounds, _LAUNCHES, strict=True)))


def gpu_dense_seconds(layer: LayerCall, facts: DeviceFacts) -> Passes:
    """Predicted seconds of each pass of unpack-then-dense: those of the dense product, and what unpacking adds."""
    itemsize = jnp.dtype(layer.dtype).itemsize
    peak = facts.half if itemsize == 2 else facts.tf32
    share = _DENSE_MATMUL_SHARE if layer.is_linear else facts.conv_share
    product = 2 * layer.spec.size * layer.positions / (share * peak)
    memory = _activations(layer) * itemsize / facts.memory / _OF_BOUND
    unpack = _UNPACK_PASSES * layer.spec.size * itemsize / facts.memory + _UNPACK_LAUNCHES * _LAUNCH
    return Passes(*[max(product, memory) + _LAUNCH + unpack] * 3)


def predicted_ratios(layer: LayerCall, backend: str, device_kind: str) -> dict[str, Passes]:
    """Predicted time of each pass over that of unpack-then-dense, by implementation; empty without a model."""
    if backend == "cpu":
        return cpu_ratios(layer, cpu_facts(loading.vector()))
    facts = device_facts(device_kind) if backend == "gpu" else None
    if facts is None:
        return {}
    pairs = zip(gpu_sparse_seconds(layer, facts), gpu_dense_seconds(layer, facts), strict=True)
    return {"pallas": Passes(*(sparse / dense for sparse, dense in pairs))}
