"""The shuffled-block product by native kernels of a CPU: C++17, called by XLA through its foreign function interface.

The sources beside this file are compiled when the package is installed, if there is a C++ compiler; `loading` finds the
library and chooses the instructions. How the kernels work is said in `product.h` and `passes.h`.

float32 and bfloat16, which is stored as such and summed in float32; every R, C, batch, kernel, stride and padding.
Activations are [C, H, W, N]. Those of a matrix product may be [N, 1, 1, C] instead, which saves the transposes around
it: layers of 256 to 1024 features and 576 examples took 1.1 to 1.5 times as long with them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsb_jax.ops.cpu_model import available_cores
from dsb_jax.ops.native.loading import TARGETS, register
from pallas_kernels.interface import ConvGeometry, Index, Kernels

DTYPES = ("float32", "bfloat16")

# Parts of a weight gradient that are summed each by itself, whatever the number of threads: so many positions and
# lanes each, that adding the parts costs next to nothing, and as many parts as there may be cores.
_PART_POSITIONS = 512
_MOST_PARTS = 64

# Of a row of examples a core computes all outputs, for at least so many examples at once.
_FEW_LANES = 16


def _workspace(index: Index, geometry: ConvGeometry, copies: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a call works in: columns and their places, where taps begin, and weights in the order of the columns."""
    columns, taps = index.in_idx.size, math.prod(geometry.kernel_size)
    integers = 2 * columns + index.out_idx.shape[0] * (taps + 1)
    floats = columns * index.out_idx.shape[1] * copies
    return jax.ShapeDtypeStruct((integers,), jnp.int32), jax.ShapeDtypeStruct((floats,), jnp.float32)


def _call(
    name: str, first: jax.Array, second: jax.Array, index: Index, geometry: ConvGeometry, result: jax.ShapeDtypeStruct,
    *, feature_major: bool, bias: jax.Array | None = None, parts: int = 1,
) -> jax.Array:  # fmt: skip
    register()
    (top, _), (left, _) = geometry.padding
    window = np.array([*geometry.kernel_size, *geometry.strides, top, left], np.int64)
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)
    call = jax.ffi.ffi_call(TARGETS[name], (result, *_workspace(index, geometry, parts)))
    options = {"window": window, "batch_major": not feature_major, "parts": np.int64(parts)}
    return call(first, second, *index[:3], bias, **options)[0]


def _activations(features: int, size: tuple[int, int], batch: int, like: jax.Array, feature_major: bool
                 ) -> jax.ShapeDtypeStruct:  # fmt: skip
    ends = (features, batch) if feature_major else (batch, features)
    return jax.ShapeDtypeStruct((ends[0], *size, ends[1]), like.dtype)


def forward(
    x: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    out: int,
    geometry: ConvGeometry,
    precision: lax.PrecisionLike = None,
    bias: jax.Array | None = None,
    feature_major: bool = True,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`."""
    size = geometry.output_size(x.shape[1], x.shape[2])
    result = _activations(out, size, x.shape[3 if feature_major else 0], x, feature_major)
    blocks = blocks.astype(x.dtype)
    return _call("forward", x, blocks, index, geometry, result, feature_major=feature_major, bias=bias)


def input_gradient(
    dy: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    precision: lax.PrecisionLike = None,
    feature_major: bool = True,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`. Deterministic: a tile of dx belongs to one thread."""
    batch = dy.shape[3 if feature_major else 0]
    result = _activations(geometry.in_channels, input_size, batch, dy, feature_major)
    blocks = blocks.astype(dy.dtype)
    return _call("input_gradient", dy, blocks, index, geometry, result, feature_major=feature_major)


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    dtype: jnp.dtype,
    precision: lax.PrecisionLike = None,
    feature_major: bool = True,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`. Deterministic: parts are added in their order."""
    features = dy.shape[0 if feature_major else 3]
    parts = min(max(dy.size // max(features, 1) // _PART_POSITIONS, 1), _MOST_PARTS)
    result = jax.ShapeDtypeStruct((index.in_idx.shape[0], index.out_idx.shape[1], index.in_idx.shape[1]), jnp.float32)
    dy = dy.astype(x.dtype)
    gradient = _call("weight_gradient", x, dy, index, geometry, result, feature_major=feature_major, parts=parts)
    return gradient.astype(dtype)


def prefers_batch_major(geometry: ConvGeometry, input_size: tuple[int, int], batch: int) -> bool:
    """Whether `NATIVE_BATCH_MAJOR` is to compute a product: that of a matrix, with examples for half of the cores."""
    return geometry.is_matmul(input_size) and batch >= _FEW_LANES * available_cores()


NATIVE = Kernels(forward, input_gradient, weight_gradient)
NATIVE_BATCH_MAJOR = Kernels(*(functools.partial(of, feature_major=False) for of in NATIVE))
