"""Shuffled-block matmul and convolution, differentiable in activations, blocks and bias.

Each is one call of the array-level product (`dsb_jax.ops.vjp`) of an implementation, or the dense product.
"""

import functools
import math

import jax
from jax import lax
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout, check_arrays, validate
from dsb_jax.ops import vjp
from dsb_jax.ops.dense import dense_conv, dense_matmul
from dsb_jax.ops.dispatch import Choice, choose
from dsb_jax.ops.partitioning import Product
from dsb_jax.ops.xla import XLA
from pallas_kernels import REFERENCE, ConvGeometry, Kernels, matmul_geometry
from pallas_kernels.tiles import KernelTiles


@functools.lru_cache(maxsize=256)  # equal arguments give the same object, so nothing recompiles
def _kernels(implementation: str, tiles: KernelTiles | None) -> Kernels:
    """The kernels of an implementation; those of a GPU are imported when they are first used."""
    if implementation == "pallas":
        from pallas_kernels.pallas_gpu import pallas_kernels

        return pallas_kernels() if tiles is None else pallas_kernels(tiles)
    if implementation == "triton":
        from pallas_kernels.triton_gpu import triton_kernels

        return triton_kernels(tiles)
    return {"xla": XLA, "reference": REFERENCE}[implementation]


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


def _forward(
    product: Product, x: jax.Array, blocks: jax.Array, layout: BlockLayout, bias: jax.Array | None
) -> jax.Array:
    """The product by kernels of x[N, H, W, C]."""
    return vjp.forward(product, x.transpose(3, 1, 2, 0), blocks, layout.index, bias).transpose(3, 1, 2, 0)


def sparse_conv(
    x: Float[Array, "N H W C"],
    blocks: Float[Array, "num_blocks R C_block"],
    layout: BlockLayout,
    *,
    geometry: ConvGeometry,
    bias: Float[Array, "out"] | None = None,
    implementation: str | Choice = "auto",
    feature_major: bool = False,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "N OH OW out"]:
    """2-D convolution with shuffled-block weights.

    Derivatives in reverse mode are of any order. Forward mode (`jax.jvp`, `jax.linearize`, `jax.hessian`) works with
    "dense"; with any other implementation it ends in jax's TypeError about `custom_vjp`.

    Args:
      x: [N, H, W, C], or [C, H, W, N] if `feature_major`.
      blocks: [num_blocks, R, C].
      layout: where the blocks lie in `W[out, in]`, `in` in HWIO order.
      geometry: kernel size, strides, padding.
      bias: [out], added to every position of an output; kernels add it before they round, at next to no cost.
      implementation: "auto", "pallas", "triton", "xla", "dense" or "reference", or what `dsb_jax.ops.choose` gave.
      feature_major: activations come and go as [C, H, W, N], the form the kernels use, without a transpose.
      precision: as in `jax.lax.dot`.

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
        implementation,
        layout,
        geometry=geometry,
        input_size=(height, width),
        batch=batch,
        dtype=x.dtype,
        precision=precision,
    )
    if choice.implementation == "dense" or batch == 0:  # nothing to tile
        return dense_conv(
            x, blocks, layout, geometry=geometry, bias=bias, feature_major=feature_major, precision=precision
        )
    kernels = _kernels(choice.implementation, choice.tiles)
    product = Product(kernels, geometry, layout.shape[0], (height, width), precision)
    if feature_major:
        return vjp.forward(product, x, blocks, layout.index, bias)
    return _forward(product, x, blocks, layout, bias)


def sparse_matmul(
    x: Float[Array, "... in"],
    blocks: Float[Array, "num_blocks R C"],
    layout: BlockLayout,
    *,
    bias: Float[Array, "out"] | None = None,
    implementation: str | Choice = "auto",
    feature_major: bool = False,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "... out"]:
    """`x @ W^T + bias` with shuffled-block weights: [..., in] -> [..., out], [in, N] -> [out, N] if `feature_major`.

    Arguments, derivatives and errors as in `sparse_conv`.
    """
    geometry = matmul_geometry(layout.shape[1])
    if feature_major:
        y = sparse_conv(
            x[:, None, None, :],
            blocks,
            layout,
            geometry=geometry,
            bias=bias,
            implementation=implementation,
            feature_major=True,
            precision=precision,
        )
        return y.reshape(y.shape[0], y.shape[3])
    _check(x, -1, blocks, layout, geometry, bias)
    batch = math.prod(x.shape[:-1])
    choice = choose(
        implementation, layout, geometry=geometry, input_size=(1, 1), batch=batch, dtype=x.dtype, precision=precision
    )
    if choice.implementation == "dense" or batch == 0:  # nothing to tile
        return dense_matmul(x, blocks, layout, bias=bias, precision=precision)
    product = Product(_kernels(choice.implementation, choice.tiles), geometry, layout.shape[0], (1, 1), precision)
    y = _forward(product, x.reshape(batch, 1, 1, x.shape[-1]), blocks, layout, bias)
    return y.reshape(*x.shape[:-1], layout.shape[0])
