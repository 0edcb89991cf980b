"""Shuffled-block matmul and convolution, differentiable in activations, blocks and bias.

    forward          Y[out_idx[g]] = sum over blocks b of g of blocks[b] @ X[in_idx[b]]  (+ bias[out_idx[g]])
    input gradient   dX[in_idx[b]] += blocks[b]^T @ dY[out_idx[g]]
    weight gradient  dblocks[b] = dY[out_idx[g]] @ X[in_idx[b]]^T
    bias gradient    dbias = sum over positions and examples of dY

(Jiang et al. 2022, section 3.) The gradient of the blocks exists at the stored blocks only. Each of the first three
is one call of an array-level implementation (`pallas_kernels.interface`), made fit for `vmap` and for activations
that are sharded over the batch (`dsb_jax.ops.partitioning`).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout, check_arrays, validate
from dsb_jax.ops.dense import dense_conv, dense_matmul
from dsb_jax.ops.dispatch import choose
from dsb_jax.ops.partitioning import partitioned
from dsb_jax.ops.xla import XLA
from pallas_kernels import REFERENCE, ConvGeometry, Kernels, matmul_geometry
from pallas_kernels.reference import Index
from pallas_kernels.tiles import KernelTiles


@functools.lru_cache(maxsize=256)  # equal arguments give the same object, so nothing recompiles
def _kernels(implementation: str, tiles: KernelTiles | None) -> Kernels:
    """The kernels of an implementation; those of a GPU are imported when they are first used."""
    if implementation == "pallas":
        from pallas_kernels.pallas_gpu import pallas_kernels

        return partitioned(pallas_kernels() if tiles is None else pallas_kernels(tiles))
    if implementation == "triton":
        from pallas_kernels.triton_gpu import triton_kernels

        return partitioned(triton_kernels(tiles))
    return partitioned({"xla": XLA, "reference": REFERENCE}[implementation])


class _Static(NamedTuple):
    """What the three operations of one layer share."""

    kernels: Kernels
    geometry: ConvGeometry
    out: int
    input_size: tuple[int, int]
    precision: lax.PrecisionLike


# Each operation is linear in both operands, and its gradients are the other two: derivatives of any order follow. The
# bias is added by the product that was asked for; products inside of derivatives have none.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    static: _Static, x: jax.Array, blocks: jax.Array, index: Index, bias: jax.Array | None = None
) -> jax.Array:
    return static.kernels.forward(
        x, blocks, index, out=static.out, geometry=static.geometry, precision=static.precision, bias=bias
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(static: _Static, dy: jax.Array, blocks: jax.Array, index: Index) -> jax.Array:
    return static.kernels.input_gradient(
        dy, blocks, index, geometry=static.geometry, input_size=static.input_size, precision=static.precision
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight_gradient(static: _Static, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, index: Index) -> jax.Array:
    return static.kernels.weight_gradient(
        x, dy, index, geometry=static.geometry, dtype=dtype, precision=static.precision
    )


def _product_fwd(static, x, blocks, index, bias=None):
    return _product(static, x, blocks, index, bias), (x, blocks, index, bias)


def _product_bwd(static, residuals, dy):
    x, blocks, index, bias = residuals
    dx = _input_gradient(static, dy, blocks, index)
    d_blocks = _weight_gradient(static, blocks.dtype, x, dy, index)
    return dx, d_blocks, None, None if bias is None else _bias_gradient(dy, bias.dtype)


def _bias_gradient(dy: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """dy[out, OH, OW, N] -> [out], summed in float32 and rounded once."""
    return dy.sum(axis=(1, 2, 3), dtype=jnp.promote_types(dy.dtype, jnp.float32)).astype(dtype)


def _input_gradient_fwd(static, dy, blocks, index):
    return _input_gradient(static, dy, blocks, index), (dy, blocks, index)


def _input_gradient_bwd(static, residuals, d_dx):
    dy, blocks, index = residuals
    d_dy = _product(static, d_dx, blocks, index)
    return d_dy, _weight_gradient(static, blocks.dtype, d_dx, dy, index), None


def _weight_gradient_fwd(static, dtype, x, dy, index):
    return _weight_gradient(static, dtype, x, dy, index), (x, dy, index)


def _weight_gradient_bwd(static, dtype, residuals, d_blocks):
    del dtype
    x, dy, index = residuals
    return _input_gradient(static, dy, d_blocks, index), _product(static, x, d_blocks, index), None


_product.defvjp(_product_fwd, _product_bwd)
_input_gradient.defvjp(_input_gradient_fwd, _input_gradient_bwd)
_weight_gradient.defvjp(_weight_gradient_fwd, _weight_gradient_bwd)


def _check(
    x: jax.Array,
    channel_axis: int,
    blocks: jax.Array,
    layout: BlockLayout,
    geometry: ConvGeometry,
    bias: jax.Array | None,
) -> None:
    # A wrong index reads foreign memory on a GPU. Traced ones cannot be looked at; those of a train state were checked
    # when it was restored, or come from this library.
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(layout)):
        check_arrays(layout)
    else:
        validate(layout)
    if blocks.shape != (layout.num_blocks, *layout.block_shape):
        raise ValueError(
            f"blocks has shape {blocks.shape}, but the layout holds {layout.num_blocks} blocks of "
            f"{layout.block_shape[0]}x{layout.block_shape[1]}; pass the blocks and the layout of one layer."
        )
    if x.shape[channel_axis] != geometry.in_channels or geometry.in_features != layout.shape[1]:
        raise ValueError(
            f"x has {x.shape[channel_axis]} input channels and the kernel {geometry.kernel_size} taps, but the layout "
            f"has {layout.shape[1]} columns (kernel height * width * channels)."
        )
    if bias is not None and bias.shape != layout.shape[:1]:
        raise ValueError(
            f"bias has shape {bias.shape}, but the layout has {layout.shape[0]} outputs; pass bias[{layout.shape[0]}], "
            "one number for each output in their own order, or None."
        )


def _convolve(
    static: _Static,
    x: jax.Array,
    blocks: jax.Array,
    layout: BlockLayout,
    bias: jax.Array | None,
    feature_major: bool,
) -> jax.Array:
    """The product by kernels, of activations in either order."""
    if feature_major:
        return _product(static, x, blocks, layout.index, bias)
    return _product(static, x.transpose(3, 1, 2, 0), blocks, layout.index, bias).transpose(3, 1, 2, 0)


def sparse_conv(
    x: Float[Array, "N H W C"],
    blocks: Float[Array, "num_blocks R C_block"],
    layout: BlockLayout,
    *,
    geometry: ConvGeometry,
    bias: Float[Array, "out"] | None = None,
    implementation: str = "auto",
    feature_major: bool = False,
    precision: lax.PrecisionLike = None,
    tiles: KernelTiles | None = None,
) -> Float[Array, "N OH OW out"]:
    """2-D convolution with shuffled-block weights.

    Args:
      x: [N, H, W, C], or [C, H, W, N] if `feature_major`.
      blocks: [num_blocks, R, C].
      layout: where the blocks lie in `W[out, in]`, `in` in HWIO order.
      geometry: kernel size, strides, padding.
      bias: [out], added to every position of an output; kernels add it before they round, at next to no cost.
      implementation: "auto", "pallas", "triton", "xla", "dense" or "reference"; see `dsb_jax.ops.choose`.
      feature_major: activations come and go as [C, H, W, N], the form the kernels use, without a transpose.
      precision: as in `jax.lax.dot`.
      tiles: tile sizes of the GPU kernels; None takes tuned ones if there are any.

    Returns:
      [N, OH, OW, out], or [out, OH, OW, N] if `feature_major`, in x's dtype.

    Raises:
      ValueError: if shapes do not fit or the implementation is unknown.
      NotImplementedError: if the implementation asked for cannot serve the layer here.
    """
    _check(x, 0 if feature_major else 3, blocks, layout, geometry, bias)
    height, width = x.shape[1:3]
    batch = x.shape[3 if feature_major else 0]
    choice = choose(
        implementation, layout, geometry=geometry, input_size=(height, width), batch=batch, dtype=x.dtype,
        precision=precision,
    )  # fmt: skip
    if choice.implementation == "dense" or batch == 0:  # nothing to tile
        return dense_conv(
            x, blocks, layout, geometry=geometry, bias=bias, feature_major=feature_major, precision=precision
        )
    kernels = _kernels(choice.implementation, tiles or choice.tiles)
    static = _Static(kernels, geometry, layout.shape[0], (height, width), precision)
    return _convolve(static, x, blocks, layout, bias, feature_major)


def sparse_matmul(
    x: Float[Array, "... in"],
    blocks: Float[Array, "num_blocks R C"],
    layout: BlockLayout,
    *,
    bias: Float[Array, "out"] | None = None,
    implementation: str = "auto",
    feature_major: bool = False,
    precision: lax.PrecisionLike = None,
    tiles: KernelTiles | None = None,
) -> Float[Array, "... out"]:
    """`x @ W^T + bias` with shuffled-block weights: [..., in] -> [..., out], [in, N] -> [out, N] if `feature_major`.

    Arguments and errors as in `sparse_conv`.
    """
    geometry = matmul_geometry(layout.shape[1])
    if feature_major:
        y = sparse_conv(
            x[:, None, None, :], blocks, layout, geometry=geometry, bias=bias, implementation=implementation,
            feature_major=True, precision=precision, tiles=tiles,
        )  # fmt: skip
        return y.reshape(y.shape[0], y.shape[3])
    _check(x, -1, blocks, layout, geometry, bias)
    batch = math.prod(x.shape[:-1])
    choice = choose(
        implementation, layout, geometry=geometry, input_size=(1, 1), batch=batch, dtype=x.dtype, precision=precision
    )
    if choice.implementation == "dense" or batch == 0:  # nothing to tile
        return dense_matmul(x, blocks, layout, bias=bias, precision=precision)
    kernels = _kernels(choice.implementation, tiles or choice.tiles)
    static = _Static(kernels, geometry, layout.shape[0], (1, 1), precision)
    y = _convolve(static, x.reshape(batch, 1, 1, x.shape[-1]), blocks, layout, bias, feature_major=False)
    return y.reshape(*x.shape[:-1], layout.shape[0])
