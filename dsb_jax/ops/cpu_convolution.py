"""A dense convolution on a CPU: three passes that are each other's transposes, each in the form that XLA runs soonest.

    forward          y = patches(x) @ kernel
    input gradient   dx = patches(dy, dilated by the strides) @ kernel turned by 180 degrees, channels exchanged
    weight gradient  dkernel = patches(x)^T @ dy

All are convolutions as XLA's library (Eigen) has them, or products with gathered patches where that is faster
(`_gathers`). The convolutions are written in the one order of axes for which XLA calls the library inside of loops,
too: with any other, one in `lax.scan` took 20 to 70 times as long.

The weight gradient is a sum over pieces of the batch that stay in the cache. Of the whole batch, as jax has it, it is a
convolution by a kernel as large as the image, which the library computes at a third of its usual rate or less. Times in
ms on one core (jax's, these) of 3x3 convolutions in NHWC:

                 32x32x64    16x16x128   8x8x256     4x4x512     64 to 128 over 32x32, strides 2
    batch 8      16, 9       8, 8        8, 8        13, 5       5, 6
    batch 128    386, 139    338, 119    319, 117    338, 149    234, 90
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dsb_jax.ops import primitive
from dsb_jax.ops.partitioning import Product
from dsb_jax.target import current_backend
from pallas_kernels.interface import ConvGeometry, Kernels, matmul_geometry, patches

FEW_FEATURES = 64  # kernel height * width * channels

# Numbers of x and dy in a piece of the weight gradient: 2 MiB, as large as the cache of a core. A half takes up to a
# tenth longer; with the double, at 32x32x64 and batch 32, 58 ms instead of 37.
_PIECE = 2**19

_FEW_PIXELS = 256  # of an image: beyond, feature-major patches are slices of it, contiguous along its rows
_ORDER = ("NHWC", "HWIO", "NHWC")


def serves(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the program is for CPUs alone, and the arrays are of the kind that was measured there."""
    is_float32 = x.dtype == kernel.dtype == jnp.float32
    return current_backend() == "cpu" and is_float32 and not any(map(is_symbolic_dim, x.shape)) and x.size > 0


def convolve(
    x: jax.Array, kernel: jax.Array, *, geometry: ConvGeometry, feature_major: bool, precision: lax.PrecisionLike = None
) -> jax.Array:
    """x is NHWC, or CHWN if `feature_major`; kernel HWIO. Derivatives of any order, `vmap`, shards of the batch."""
    # Under `shard_map`, where the kernel is the same on all devices: then its gradient is summed over them.
    missing = jax.typeof(x).manual_axis_type.varying - jax.typeof(kernel).manual_axis_type.varying
    if missing:
        kernel = lax.pcast(kernel, tuple(missing), to="varying")
    size = (x.shape[1], x.shape[2])
    product = Product(_kernels(feature_major), geometry, kernel.shape[3], size, precision, feature_major)
    return primitive.forward(product, x, kernel.reshape(1, geometry.in_features, -1), None)


@functools.cache  # one object for each order, so nothing recompiles
def _kernels(feature_major: bool) -> Kernels:
    """The passes in the form of `Kernels`: the flattened kernel is the one block, and there is no index."""

    def of_forward(x, blocks, index, *, out, geometry, precision=None, bias=None):
        return forward(x, blocks[0], geometry, feature_major, precision)

    def of_input(dy, blocks, index, *, geometry, input_size, precision=None):
        return input_gradient(dy, blocks[0], geometry, feature_major, input_size, precision)

    def of_weights(x, dy, index, *, geometry, dtype, precision=None):
        return weight_gradient(x, dy, geometry, feature_major, precision)[None].astype(dtype)

    return Kernels(of_forward, of_input, of_weights)


def _gathers(geometry: ConvGeometry, output_size: tuple[int, int]) -> bool:
    """Whether to multiply gathered patches: where the kernel is 1x1, or the output at most one larger than the kernel.

    Times in ms of 3x3 convolutions (forward, input gradient) at batch 128, first of the library, then of patches:

        4x4x512, 4x4x512         238, 217    144, 151
        8x8x256, 4x4x512         125,  63     52, 414 (of dy with zeros between: not served)
        8x8x256, 8x8x256         153, 144    201, 217
        32x32x64, 32x32x64       127, 131    474, 485

    and of 1x1 over 32x32x64, strides 2, feature-major: 62 against 15.
    """
    return geometry.kernel_size == (1, 1) or min(output_size) <= max(geometry.kernel_size) + 1


def forward(
    x: jax.Array, kernel: jax.Array, geometry: ConvGeometry, feature_major: bool, precision: lax.PrecisionLike
) -> jax.Array:
    """x by the flattened kernel[in, out]."""
    few = feature_major and geometry.in_features <= FEW_FEATURES  # a stem: the library would transpose its output
    if few or _gathers(geometry, geometry.output_size(x.shape[1], x.shape[2])):
        return _gathered(x, kernel, geometry, feature_major, precision)
    kernel = kernel.reshape(*geometry.kernel_size, geometry.in_channels, -1)
    return _convolved(x, kernel, geometry.strides, geometry.padding, (1, 1), feature_major, precision)


def input_gradient(
    dy: jax.Array,
    kernel: jax.Array,
    geometry: ConvGeometry,
    feature_major: bool,
    input_size: tuple[int, int],
    precision: lax.PrecisionLike,
) -> jax.Array:
    """The gradient of `forward` with respect to x."""
    out = dy.shape[0 if feature_major else 3]
    turned = kernel.reshape(*geometry.kernel_size, geometry.in_channels, out)[::-1, ::-1].transpose(0, 1, 3, 2)
    padding = []
    for width, (low, _), stride, size, out_size in zip(
        geometry.kernel_size, geometry.padding, geometry.strides, input_size, dy.shape[1:3], strict=True
    ):
        before = width - 1 - low
        padding.append((before, size + width - 1 - before - ((out_size - 1) * stride + 1)))
    of_dy = ConvGeometry(out, geometry.kernel_size, (1, 1), (padding[0], padding[1]))
    if geometry.kernel_size == (1, 1):
        dx = _gathered(dy, kernel.T, matmul_geometry(out), feature_major, precision)
        edges = [(low, high, stride - 1) for (low, high), stride in zip(padding, geometry.strides, strict=True)]
        return lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    if geometry.strides == (1, 1) and _gathers(of_dy, input_size):
        return _gathered(dy, turned.reshape(of_dy.in_features, -1), of_dy, feature_major, precision)
    return _convolved(dy, turned, (1, 1), of_dy.padding, geometry.strides, feature_major, precision)


def weight_gradient(
    x: jax.Array, dy: jax.Array, geometry: ConvGeometry, feature_major: bool, precision: lax.PrecisionLike
) -> jax.Array:
    """The gradient of `forward` with respect to the flattened kernel: [in, out]."""
    _, out_h, out_w, _ = dy.shape
    batch, features = (3, 0) if feature_major else (0, 3)
    if _gathers(geometry, (out_h, out_w)):
        over = tuple(axis for axis in range(4) if axis != features)
        rows = _patches(x, geometry, feature_major)
        return lax.dot_general(rows, dy, ((over, over), ((), ())), precision=precision)
    # dy, with zeros between for the strides, is the kernel of a convolution over x whose output is [kh, kw].
    (height, width), (stride_h, stride_w) = geometry.kernel_size, geometry.strides
    (top, _), (left, _) = geometry.padding
    bottom = height + (out_h - 1) * stride_h - x.shape[1] - top
    right = width + (out_w - 1) * stride_w - x.shape[2] - left
    if feature_major:  # pieces are rows: an image is not contiguous
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (0, 0, 0), (0, 0, 0)))
        top = bottom = 0
    total, each = (out_h, dy.shape[3] * out_w) if feature_major else (dy.shape[0], out_h * out_w)
    values = each * (geometry.in_channels * stride_h * stride_w + dy.shape[features])
    pieces = -(-total // max(_PIECE // values, 1))
    count = -(-total // pieces)

    def of_piece(first: jax.Array | int, count: int) -> jax.Array:
        if feature_major:
            read = lax.dynamic_slice_in_dim(x, first * stride_h, (count - 1) * stride_h + height, 1)
            d = lax.dynamic_slice_in_dim(dy, first, count, 1).transpose(1, 2, 3, 0)
        else:
            read, d = (lax.dynamic_slice_in_dim(a, first, count, batch) for a in (x, dy))
            read, d = read.transpose(3, 1, 2, 0), d.transpose(1, 2, 0, 3)
        return lax.conv_general_dilated(
            read, d, (1, 1), ((top, bottom), (left, right)), rhs_dilation=geometry.strides, dimension_numbers=_ORDER,
            precision=precision,
        )  # fmt: skip

    whole, rest = divmod(total, count)
    gradient = of_piece(0, count)
    if whole > 1:
        gradient = lax.fori_loop(1, whole, lambda i, so_far: so_far + of_piece(i * count, count), gradient)
    if rest:
        gradient += of_piece(whole * count, rest)
    return gradient.transpose(1, 2, 0, 3).reshape(geometry.in_features, -1)


def _patches(x: jax.Array, geometry: ConvGeometry, feature_major: bool) -> jax.Array:
    """What each position of the output reads: x[C, H, W, N] -> [in, OH, OW, N], or [N, H, W, C] -> [N, OH, OW, in]."""
    _, height, width, _ = x.shape
    out_size = geometry.output_size(height, width)
    if geometry.kernel_size == (1, 1) or (feature_major and height * width > _FEW_PIXELS):
        rows = patches(x if feature_major else x.transpose(3, 1, 2, 0), geometry)
        return rows if feature_major else rows.transpose(3, 1, 2, 0)
    # A gather of pixels: slices beside each other would be a program to compile for each tap.
    reads = []  # of each axis (traced: a kernel may hold no constants): int[positions, taps]
    for (low, _), stride, taps, out in zip(
        geometry.padding, geometry.strides, geometry.kernel_size, out_size, strict=True
    ):
        first = jnp.arange(out, dtype=jnp.int32) * stride - low
        reads.append(first[:, None] + jnp.arange(taps, dtype=jnp.int32)[None])
    row, column = reads[0][:, None, :, None], reads[1][None, :, None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = jnp.where(inside, row * width + column, height * width)  # [OH, OW, kh, kw]; outside is zero
    if feature_major:
        flat = x.reshape(x.shape[0], height * width, -1)
        read = flat.at[:, pixel.transpose(2, 3, 0, 1).reshape(-1)].get(mode="fill", fill_value=0)
        read = read.reshape(x.shape[0], -1, *out_size, x.shape[3]).swapaxes(0, 1)
        return read.reshape(-1, *out_size, x.shape[3])
    flat = x.reshape(-1, height * width, x.shape[3])
    read = flat.at[:, pixel.reshape(-1)].get(mode="fill", fill_value=0)
    return read.reshape(x.shape[0], *out_size, -1)


def _gathered(
    x: jax.Array, kernel: jax.Array, geometry: ConvGeometry, feature_major: bool, precision: lax.PrecisionLike
) -> jax.Array:
    form = "jhwn,jo->ohwn" if feature_major else "nhwj,jo->nhwo"
    return jnp.einsum(form, _patches(x, geometry, feature_major), kernel, precision=precision)


def _convolved(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
    feature_major: bool,
    precision: lax.PrecisionLike,
) -> jax.Array:
    x = x.transpose(3, 1, 2, 0) if feature_major else x
    y = lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation=dilation, dimension_numbers=_ORDER, precision=precision
    )
    return y.transpose(3, 1, 2, 0) if feature_major else y
