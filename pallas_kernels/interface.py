"""What an implementation of the shuffled-block product is: three array-level operations, one geometry.

Activations are feature-major, `x[C, H, W, N]` with the batch innermost, so that a gathered input row is
contiguous and a convolution tap a mere change of base address. A linear layer is the same thing with a
1x1 kernel and `H = W = 1`.

Column j of the flattened matrix `W[out, in]` means tap and channel in HWIO order,
`j = (kh * kernel_width + kw) * C + c`. For a 2x1 kernel over C = 3 channels:

    j        0  1  2  3  4  5
    (kh,kw)  0,0 0,0 0,0 1,0 1,0 1,0
    c        0  1  2  0  1  2
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Index(NamedTuple):
    """Where the blocks lie, as kernels read it.

    Attributes:
      out_idx: int32[num_groups, R], the rows of each group; rows `>= out` are phantom.
      in_idx: uint16 or int32[num_blocks, C], the input columns of each block.
      group_start: int32[num_groups + 1]; the blocks of group g are `group_start[g]:group_start[g + 1]`.
      derived: a `KernelIndex` of the same layout, or None: then what a kernel needs of it is derived in the call.
    """

    out_idx: jax.Array
    in_idx: jax.Array
    group_start: jax.Array
    derived: Any = None


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Static sizes of a 2-D convolution over `x[C, H, W, N]` (dilation 1, one feature group).

    Attributes:
      in_channels: C.
      kernel_size: `(kernel_height, kernel_width)`.
      strides: `(stride_height, stride_width)`.
      padding: `((top, bottom), (left, right))` zeros.
    """

    in_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def in_features(self) -> int:
        """Columns of the flattened weight matrix."""
        return self.kernel_size[0] * self.kernel_size[1] * self.in_channels

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Spatial size of the output for an input of `height x width`."""
        sizes = []
        for size, kernel, stride, (low, high) in zip(
            (height, width), self.kernel_size, self.strides, self.padding, strict=True
        ):
            if size + low + high < kernel:
                raise ValueError(
                    f"a {kernel}-wide kernel does not fit an input of {size} padded by {low}+{high}; pad more."
                )
            sizes.append((size + low + high - kernel) // stride + 1)
        return sizes[0], sizes[1]

    def is_matmul(self, input_size: tuple[int, ...]) -> bool:
        """Whether it is the product of a matrix: a 1x1 kernel at one position of each example."""
        return self == matmul_geometry(self.in_channels) and input_size == (1, 1)


def matmul_geometry(in_features: int) -> ConvGeometry:
    """The geometry of a linear layer: x is `[in, 1, 1, N]`."""
    return ConvGeometry(in_channels=in_features)


def read_by_taps(a: jax.Array, geometry: ConvGeometry) -> list[jax.Array]:
    """What each tap of the kernel reads of a[., H, W, ...], zero-padded: [., OH, OW, ...] in HW order."""
    (stride_h, stride_w), (out_h, out_w) = geometry.strides, geometry.output_size(a.shape[1], a.shape[2])
    none = [(0, 0, 0)]
    padding = none + [(low, high, 0) for low, high in geometry.padding] + none * (a.ndim - 3)
    a = lax.pad(a, jnp.zeros((), a.dtype), padding)  # which takes negative padding, too
    return [
        a[:, kh : kh + (out_h - 1) * stride_h + 1 : stride_h, kw : kw + (out_w - 1) * stride_w + 1 : stride_w]
        for kh in range(geometry.kernel_size[0])
        for kw in range(geometry.kernel_size[1])
    ]


def patches(x: jax.Array, geometry: ConvGeometry) -> jax.Array:
    """x[C, H, W, N] -> [in, OH, OW, N]: row (kh, kw, c) is channel c shifted by the tap and strided."""
    return jnp.concatenate(read_by_taps(x, geometry))


def accumulator_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of sums over values of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


class Passes(NamedTuple):
    """One value for each pass of a layer's training step."""

    forward: Any
    input_gradient: Any
    weight_gradient: Any


class Kernels(NamedTuple):
    """One implementation: the three passes.

    `index` is an `Index`. Its phantom rows are computed by nobody, read as zero, and get zero gradient. Results have
    the dtype of the activations (weight gradient: of `blocks`); products accumulate in `accumulator_dtype`, and the
    bias of each output, if there is one, is added before the sum is rounded.

    Attributes:
      forward: `(x[C, H, W, N], blocks[num_blocks, R, C'], index, *, out, geometry, bias=None) -> y[out, OH, OW, N]`,
        `bias[out]` of any float dtype.
      input_gradient: `(dy[out, OH, OW, N], blocks, index, *, geometry, input_size=(H, W)) -> dx[C, H, W, N]`.
      weight_gradient: `(x, dy, index, *, geometry, dtype) -> dblocks[num_blocks, R, C']`.

    All three take `precision=` as `jax.lax.dot` does. An implementation that cannot serve a shape, dtype or device
    raises NotImplementedError with the reason.
    """

    forward: Callable[..., jax.Array]
    input_gradient: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]
