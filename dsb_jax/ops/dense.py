"""The dense product: unpack the blocks into an ordinary kernel and let XLA do the rest.

Compute is dense, storage stays sparse: the kernel and its gradient live for the duration of one layer. Both
directions move rows of R weights (those of a group lie side by side in the grouped order) and then permute whole
columns, which on a CPU is many times faster than scattering single weights. Where the output is much smaller than the
kernel, it is the output that gets permuted.

Both steps are made of operations whose derivatives jax knows, in forward and in reverse mode, and whose transposes
are gathers again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.layout import BlockLayout, block_group, row_places
from dsb_jax.ops.convolution import add_bias, convolve
from pallas_kernels.interface import ConvGeometry


def _row_starts(layout: BlockLayout) -> jax.Array:
    """int32[num_blocks, C, 2]: where the R weights of each block column begin in `[in, num_groups * R]`."""
    first = jnp.broadcast_to(block_group(layout)[:, None] * layout.block_shape[0], layout.in_idx.shape)
    return jnp.stack([layout.in_idx.astype(jnp.int32), first], axis=-1)


def unpack_grouped(blocks: jax.Array, layout: BlockLayout) -> jax.Array:
    """blocks[num_blocks, R, C] -> [in, num_groups * R], output features in the order of the groups; zero elsewhere.

    The transpose is a gather of rows of R weights.
    """
    grouped = jnp.zeros((layout.shape[1], layout.num_groups * layout.block_shape[0]), blocks.dtype)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return lax.scatter(
        grouped, _row_starts(layout), blocks.transpose(0, 2, 1), numbers, unique_indices=True, mode="promise_in_bounds"
    )


def to_output_order(grouped: jax.Array, layout: BlockLayout, axis: int) -> jax.Array:
    """Output features along `axis` from the order of the groups (num_groups * R of them) to their own (out)."""
    ordered = _permute(grouped, row_places(layout.out_idx), layout.out_idx.reshape(-1), axis)
    return lax.slice_in_dim(ordered, 0, layout.shape[0], axis=axis)


def _permute(values: jax.Array, order: jax.Array, inverse: jax.Array, axis: int) -> jax.Array:
    """`values` in another order along `axis`, with a gather for its transpose, too.

    What jax would derive is a scatter, many times slower. A permutation is the solution of a linear system whose
    matrix is the inverse permutation: so jax is told the transpose, and knows what follows from it.
    """

    def take(idx: jax.Array, values: jax.Array) -> jax.Array:
        return values.at[(slice(None),) * axis + (idx,)].get(mode="promise_in_bounds")

    # Constants of a solve must differ from device to device as its values do: `shard_map` checks that.
    order, inverse = (idx + jnp.zeros_like(values, jnp.int32, shape=()) for idx in (order, inverse))
    return lax.custom_linear_solve(
        functools.partial(take, inverse),
        values,
        solve=lambda _, right: take(order, right),
        transpose_solve=lambda _, right: take(inverse, right),
    )


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
