"""Shuffled-block matmul and convolution, differentiable in activations, blocks and bias.

Each is one call of the array-level product (`dsb_jax.ops.primitive`) of an implementation, or the dense product.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout, check_arrays, validate
from dsb_jax.ops import primitive
from dsb_jax.ops.dispatch import Choice, choose, record
from dsb_jax.ops.implementations import kernels_of, take_batch_major
from dsb_jax.ops.partitioning import Product
from pallas_kernels.interface import ConvGeometry, Kernels, Passes, matmul_geometry
from pallas_kernels.kernel_index import KernelIndex
from pallas_kernels.tiles import KernelTiles


@functools.lru_cache(maxsize=256)  # equal arguments give the same object, so nothing recompiles
def _kernels_by_pass(passes: Passes, tiles: KernelTiles | None, feature_major: bool) -> Kernels:
    """The kernels of each pass, of the implementations named."""
    named = {name: kernels_of(name, tiles, feature_major=feature_major) for name in passes}
    return Kernels(*(getattr(named[name], of) for of, name in passes._asdict().items()))


def _check(
    x: jax.Array,
    channel_axis: int,
    blocks: jax.Array,
    layout: BlockLayout,
    geometry: ConvGeometry,
    bias: jax.Array | None,
    kernel_index: KernelIndex | None,
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
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, to which weights would be cut; pass x.astype(jnp.float32).")
    if x.shape[channel_axis] != geometry.in_channels or geometry.in_features != layout.shape[1]:
        raise ValueError(
            f"x has {x.shape[channel_axis]} input channels and the kernel {geometry.kernel_size} taps, but the layout "
            f"has {layout.shape[1]} columns (kernel height * width * channels)."
        )
    rows = None if kernel_index is None else kernel_index.row_place
    groups = None if kernel_index is None else kernel_index.block_group
    if (rows is not None and rows.size != layout.out_idx.size) or (
        groups is not None and groups.shape != (layout.num_blocks,)
    ):
        raise ValueError(
            "kernel_index does not belong to the layout; pass both of one node, or None to derive it in the call."
        )
    if bias is not None and bias.shape != layout.shape[:1]:
        raise ValueError(
            f"bias has shape {bias.shape}, but the layout has {layout.shape[0]} outputs; pass bias[{layout.shape[0]}], "
            "one number for each output in their own order, or None."
        )


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
    kernel_index: KernelIndex | None = None,
    path: tuple[str, ...] | None = None,
) -> Float[Array, "N OH OW out"]:
    """2-D convolution with shuffled-block weights.

    Derivatives are of any order, forward and in reverse, with every implementation.

    Args:
      x: [N, H, W, C], or [C, H, W, N] if `feature_major`.
      blocks: [num_blocks, R, C].
      layout: where the blocks lie in `W[out, in]`, `in` in HWIO order.
      geometry: kernel size, strides, padding.
      bias: [out], added to every position of an output; kernels add it before they round, at next to no cost.
      implementation: one of `dsb_jax.ops.IMPLEMENTATIONS`, or what `dsb_jax.ops.choose` gave.
      feature_major: activations come and go as [C, H, W, N], the form the kernels use, without a transpose.
      precision: as in `jax.lax.dot`.
      kernel_index: of the same layout, as its node carries it; None derives in the call what the products need.
      path: of the layer, under which `dsb_jax.ops.record_choices` notes what was chosen.

    Returns:
      [N, OH, OW, out], or [out, OH, OW, N] if `feature_major`, in x's dtype.

    Raises:
      ValueError: if shapes do not fit, x holds no floating-point numbers, or the implementation is unknown.
      NotImplementedError: if the implementation asked for cannot serve the layer here.
    """
    _check(x, 0 if feature_major else 3, blocks, layout, geometry, bias, kernel_index)
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
    if path is not None:
        out_positions = math.prod(geometry.output_size(height, width)) * batch
        record(path, choice, 0 if (height, width) == (1, 1) else x.size + layout.shape[0] * out_positions)
    empty = not is_symbolic_dim(batch) and batch == 0  # nothing to tile
    passes = Passes("dense", "dense", "dense") if empty else choice.passes
    computed_so = feature_major or not take_batch_major(passes, geometry, (height, width), batch)
    kernels = _kernels_by_pass(passes, choice.tiles, computed_so)
    product = Product(kernels, geometry, layout.shape[0], (height, width), precision, feature_major=computed_so)
    index = layout.index._replace(derived=kernel_index)
    if feature_major == computed_so:
        return primitive.forward(product, x, blocks, index, bias)
    return primitive.forward(product, x.transpose(3, 1, 2, 0), blocks, index, bias).transpose(3, 1, 2, 0)


def sparse_matmul(
    x: Float[Array, "... in"],
    blocks: Float[Array, "num_blocks R C"],
    layout: BlockLayout,
    *,
    bias: Float[Array, "out"] | None = None,
    implementation: str | Choice = "auto",
    feature_major: bool = False,
    precision: lax.PrecisionLike = None,
    kernel_index: KernelIndex | None = None,
    path: tuple[str, ...] | None = None,
) -> Float[Array, "... out"]:
    """`x @ W^T + bias` with shuffled-block weights: [..., in] -> [..., out], [in, N] -> [out, N] if `feature_major`.

    Arguments, derivatives and errors as in `sparse_conv`.
    """
    geometry = matmul_geometry(layout.shape[1])
    options: dict[str, Any] = {
        "geometry": geometry, "bias": bias, "implementation": implementation, "feature_major": feature_major,
        "precision": precision, "kernel_index": kernel_index, "path": path,
    }  # fmt: skip
    if feature_major:
        return sparse_conv(x[:, None, None, :], blocks, layout, **options)[:, 0, 0, :]
    y = sparse_conv(x.reshape(math.prod(x.shape[:-1]), 1, 1, x.shape[-1]), blocks, layout, **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])
