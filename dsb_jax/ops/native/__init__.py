"""The shuffled-block product by native kernels of a CPU: C++17, called by XLA through its foreign function interface.

The sources beside this file are compiled when the package is installed, if there is a C++ compiler; `loading` finds the
library and chooses the instructions. How the kernels work is said in `product.h` and `passes.h`.

float32 and bfloat16, which is stored as such and summed in float32; every R, C, batch, kernel, stride and padding.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsb_jax.ops.native.loading import TARGETS, register
from pallas_kernels.interface import ConvGeometry, Index, Kernels

DTYPES = ("float32", "bfloat16")

# Parts of a weight gradient that are summed each by itself, whatever the number of threads: so many positions and
# lanes each, that adding the parts costs next to nothing, and as many parts as there may be cores.
_PART_POSITIONS = 512
_MOST_PARTS = 64


def _workspace(index: Index, geometry: ConvGeometry, copies: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a call works in: columns and their places, where taps begin, and weights in the order of the columns."""
    columns, taps = index.in_idx.size, math.prod(geometry.kernel_size)
    integers = 2 * columns + index.out_idx.shape[0] * (taps + 1)
    floats = columns * index.out_idx.shape[1] * copies
    return jax.ShapeDtypeStruct((integers,), jnp.int32), jax.ShapeDtypeStruct((floats,), jnp.float32)


def _call(
    name: str, first: jax.Array, second: jax.Array, index: Index, geometry: ConvGeometry, result: jax.ShapeDtypeStruct,
    *, bias: jax.Array | None = None, parts: int = 1,
) -> jax.Array:  # fmt: skip
    register()
    (top, _), (left, _) = geometry.padding
    window = np.array([*geometry.kernel_size, *geometry.strides, top, left], np.int64)
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)
    call = jax.ffi.ffi_call(TARGETS[name], (result, *_workspace(index, geometry, parts)))
    return call(first, second, *index[:3], bias, window=window, parts=np.int64(parts))[0]


def forward(
    x: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    out: int,
    geometry: ConvGeometry,
    precision: lax.PrecisionLike = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`."""
    result = jax.ShapeDtypeStruct((out, *geometry.output_size(*x.shape[1:3]), x.shape[3]), x.dtype)
    return _call("forward", x, blocks.astype(x.dtype), index, geometry, result, bias=bias)


def input_gradient(
    dy: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`. Deterministic: a tile of dx belongs to one thread."""
    result = jax.ShapeDtypeStruct((geometry.in_channels, *input_size, dy.shape[3]), dy.dtype)
    return _call("input_gradient", dy, blocks.astype(dy.dtype), index, geometry, result)


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    dtype: jnp.dtype,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`. Deterministic: parts are added in their order."""
    parts = min(max(math.prod(dy.shape[1:]) // _PART_POSITIONS, 1), _MOST_PARTS)
    result = jax.ShapeDtypeStruct((index.in_idx.shape[0], index.out_idx.shape[1], index.in_idx.shape[1]), jnp.float32)
    return _call("weight_gradient", x, dy.astype(x.dtype), index, geometry, result, parts=parts).astype(dtype)


NATIVE = Kernels(forward, input_gradient, weight_gradient)
