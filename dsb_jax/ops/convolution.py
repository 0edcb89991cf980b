"""Dense convolutions without the slow cases of XLA on CPUs, and the sum with a bias.

Both serve the dense product (`dsb_jax.ops.dense`), layers that stay dense, and dense baselines.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.ops import cpu_convolution
from dsb_jax.ops.cpu_convolution import FEW_FEATURES
from dsb_jax.target import ANY, current_backend
from pallas_kernels.interface import ConvGeometry, accumulator_dtype, patches

_NHWC = (("NHWC", "HWIO", "NHWC"), lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC")))


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
    if cpu_convolution.serves(x, kernel):
        return cpu_convolution.convolve(x, kernel, geometry=geometry, feature_major=feature_major, precision=precision)
    sizes = (*x.shape[1:3], *geometry.output_size(*x.shape[1:3]))
    small = min(sizes) < max(geometry.kernel_size) or (feature_major and geometry.in_features <= FEW_FEATURES)
    may_be_cpu = current_backend() in ("cpu", ANY.backend)
    if small and may_be_cpu:
        gathered = patches(x if feature_major else x.transpose(3, 1, 2, 0), geometry)
        form = "jhwn,jo->ohwn" if feature_major else "jhwn,jo->nhwo"
        return jnp.einsum(form, gathered, kernel.reshape(-1, kernel.shape[3]), precision=precision)
    if feature_major and may_be_cpu:
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
    wide = accumulator_dtype(y.dtype)
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
