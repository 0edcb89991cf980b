"""The dense fallback: unpack the blocks into an ordinary kernel and let XLA do the rest.

Compute is dense, storage stays sparse: the kernel and its gradient live for the duration of one layer. Both
directions move runs of R weights (the rows of a group lie side by side in the grouped order) and then permute
whole columns, which on a CPU is many times faster than scattering single weights. Where the output is much smaller
than the kernel, it is the output that gets permuted.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.layout import BlockLayout, block_group, row_places
from pallas_kernels.interface import ConvGeometry
from pallas_kernels.reference import patches

FEW_FEATURES = 64  # kernel height * width * channels

_NHWC = (("NHWC", "HWIO", "NHWC"), lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC")))


def _runs(layout: BlockLayout) -> jax.Array:
    """int32[num_blocks, C, 2]: where the run of R weights of each block column begins in `[in, num_groups * R]`."""
    first = jnp.broadcast_to(block_group(layout)[:, None] * layout.block_shape[0], layout.in_idx.shape)
    return jnp.stack([layout.in_idx.astype(jnp.int32), first], axis=-1)


@jax.custom_vjp
def unpack_grouped(blocks: jax.Array, layout: BlockLayout) -> jax.Array:
    """blocks[num_blocks, R, C] -> [in, num_groups * R], output features in the order of the groups; zero elsewhere."""
    grouped = jnp.zeros((layout.shape[1], layout.num_groups * layout.block_shape[0]), blocks.dtype)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return lax.scatter(
        grouped, _runs(layout), blocks.transpose(0, 2, 1), numbers, unique_indices=True, mode="promise_in_bounds"
    )


def _unpack_fwd(blocks: jax.Array, layout: BlockLayout) -> tuple[jax.Array, BlockLayout]:
    return unpack_grouped(blocks, layout), layout


def _unpack_bwd(layout: BlockLayout, d_grouped: jax.Array) -> tuple[jax.Array, None]:
    numbers = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    runs = lax.gather(d_grouped, _runs(layout), numbers, (1, layout.block_shape[0]), mode="promise_in_bounds")
    return runs.transpose(0, 2, 1), None


unpack_grouped.defvjp(_unpack_fwd, _unpack_bwd)


def _take(values: jax.Array, idx: jax.Array, axis: int) -> jax.Array:
    return values.at[(slice(None),) * axis + (idx,)].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_output_order(grouped: jax.Array, layout: BlockLayout, axis: int) -> jax.Array:
    """Output features along `axis` from the order of the groups (num_groups * R of them) to their own (out)."""
    return _take(grouped, row_places(layout.out_idx)[: layout.shape[0]], axis)


def _order_fwd(grouped: jax.Array, layout: BlockLayout, axis: int) -> tuple[jax.Array, BlockLayout]:
    return to_output_order(grouped, layout, axis), layout


def _order_bwd(axis: int, layout: BlockLayout, d_ordered: jax.Array) -> tuple[jax.Array, None]:
    # Gathered, too: the transpose that jax would derive is a scatter, many times slower.
    phantom = [(0, 0)] * d_ordered.ndim
    phantom[axis] = (0, layout.out_idx.size - layout.shape[0])
    return _take(jnp.pad(d_ordered, phantom), layout.out_idx.reshape(-1), axis), None


to_output_order.defvjp(_order_fwd, _order_bwd)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    geometry: ConvGeometry,
    feature_major: bool,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """A dense convolution without the slow cases of XLA on CPUs: x is NHWC, or CHWN if `feature_major`; kernel HWIO.

    There, the patches are gathered and multiplied instead
      - where the image is smaller than the kernel (3x3 over 2x2, as in the last stage of VGG-16): XLA runs there
        at some 2 % of its usual rate;
      - where the input has few features and is feature-major (a stem): the convolution would transpose its output.
    """
    sizes = (*x.shape[1:3], *geometry.output_size(*x.shape[1:3]))
    small = min(sizes) < max(geometry.kernel_size) or (feature_major and geometry.in_features <= FEW_FEATURES)
    if small and jax.default_backend() == "cpu":
        gathered = patches(x if feature_major else x.transpose(3, 1, 2, 0), geometry)
        form = "jhwn,jo->ohwn" if feature_major else "jhwn,jo->nhwo"
        return jnp.einsum(form, gathered, kernel.reshape(-1, kernel.shape[3]), precision=precision)
    if feature_major and jax.default_backend() == "cpu":
        # Keeps the transpose of the input gradient out of other fusions, where it took three times as long.
        x = lax.optimization_barrier(x)
    numbers = ("CHWN", "HWIO", "CHWN") if feature_major else ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, geometry.strides, geometry.padding, dimension_numbers=numbers, precision=precision
    )


def add_bias(y: jax.Array, bias: jax.Array | None, axis: int) -> jax.Array:
    """y plus bias[out] along `axis`, an elementwise sum that XLA fuses with its neighbours where it can.

    In float32 and rounded once, which for operands of one dtype is what `nn.Dense` and `nn.Conv` give, too; the
    gradient of the bias is a sum in float32 by it.
    """
    if bias is None:
        return y
    wide = jnp.promote_types(y.dtype, jnp.float32)
    along = jnp.expand_dims(bias.astype(wide), [i for i in range(y.ndim) if i != axis])
    return (y.astype(wide) + along).astype(y.dtype)


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` by way of `convolve` where that serves.

    Fit for the `conv_general_dilated` argument of `nn.Conv`, so that dense baselines gain by it as well.
    """
    plain = all(set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    plain &= options.get("feature_group_count", 1) == 1 and lhs.ndim == 4
    plain &= options.get("dimension_numbers") in _NHWC
    if not plain:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    kernel_size = rhs.shape[0], rhs.shape[1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel_size, window_strides, padding)
    (top, bottom), (left, right) = padding
    stride_h, stride_w = window_strides
    geometry = ConvGeometry(lhs.shape[3], kernel_size, (stride_h, stride_w), ((top, bottom), (left, right)))
    return convolve(lhs, rhs, geometry=geometry, feature_major=False, precision=options.get("precision"))


def _permutes_output(positions: int, layout: BlockLayout) -> bool:
    """Whether to bring the output into order rather than the kernel, because it is much smaller.

    On a CPU, forward and backward of 512x512x3x3 took 54 instead of 69 ms at 2x2 positions and batch 128, 163 instead
    of 169 ms at 4x4; at equal sizes (512x256x3x3 at 4x4) the kernel is the better one, 82 against 92 ms.
    """
    return 2 * positions <= layout.shape[1]


def dense_conv(
    x: jax.Array,
    blocks: jax.Array,
    layout: BlockLayout,
    *,
    geometry: ConvGeometry,
    feature_major: bool,
    bias: jax.Array | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """The product by unpacking: x is NHWC, or CHWN if `feature_major`; the result likewise."""
    positions = x.shape[3 if feature_major else 0] * math.prod(geometry.output_size(*x.shape[1:3]))
    features = 0 if feature_major else 3
    grouped = unpack_grouped(blocks, layout)
    if _permutes_output(positions, layout):
        y = to_output_order(_convolve(x, grouped, geometry, feature_major, precision), layout, features)
    else:
        y = _convolve(x, to_output_order(grouped, layout, 1), geometry, feature_major, precision)
    return add_bias(y, bias, features)


def _convolve(
    x: jax.Array, kernel: jax.Array, geometry: ConvGeometry, feature_major: bool, precision: lax.PrecisionLike
) -> jax.Array:
    kernel = kernel.reshape(*geometry.kernel_size, geometry.in_channels, -1).astype(x.dtype)
    return convolve(x, kernel, geometry=geometry, feature_major=feature_major, precision=precision)


def dense_matmul(
    x: jax.Array,
    blocks: jax.Array,
    layout: BlockLayout,
    *,
    bias: jax.Array | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """x[..., in] -> y[..., out] by unpacking."""
    features = x.ndim - 1
    grouped = unpack_grouped(blocks, layout)
    if _permutes_output(math.prod(x.shape[:-1]), layout):
        y = to_output_order(jnp.dot(x, grouped.astype(x.dtype), precision=precision), layout, features)
    else:
        y = jnp.dot(x, to_output_order(grouped, layout, 1).astype(x.dtype), precision=precision)
    return add_bias(y, bias, features)
