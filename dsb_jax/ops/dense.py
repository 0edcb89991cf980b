"""The dense product: unpack the blocks into an ordinary kernel and let XLA do the rest.

Compute is dense, storage stays sparse: the kernel and its gradient live for the duration of one pass of one layer. Both
directions move rows of R weights (those of a group lie side by side in the grouped order) and then permute whole
columns, which on a CPU is many times faster than scattering single weights. Where the output is much smaller than the
kernel, it is the output that gets permuted. The gradient leaves as blocks: what is summed over devices is packed.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dsb_jax.ops import cpu_convolution
from dsb_jax.ops.convolution import add_bias, convolve
from pallas_kernels.interface import ConvGeometry, Index, Kernels
from pallas_kernels.kernel_index import block_group, row_place


class _Order(NamedTuple):
    """How activations lie: feature-major `[C, H, W, N]`, or `[N, H, W, C]`."""

    feature_major: bool

    @property
    def features(self) -> int:
        return 0 if self.feature_major else 3

    @property
    def batch(self) -> int:
        return 3 if self.feature_major else 0


def _row_starts(index: Index) -> jax.Array:
    """int32[num_blocks, C, 2]: where the R weights of each block column begin in `[in, num_groups * R]`."""
    first = block_group(index).astype(jnp.int32) * index.out_idx.shape[1]
    first = jnp.broadcast_to(first[:, None], index.in_idx.shape)
    return jnp.stack([index.in_idx.astype(jnp.int32), first], axis=-1)


def unpack_grouped(blocks: jax.Array, index: Index, in_features: int) -> jax.Array:
    """blocks[num_blocks, R, C] -> [in, num_groups * R], outputs in the order of the groups; zero elsewhere."""
    grouped = jnp.zeros((in_features, index.out_idx.size), blocks.dtype)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return lax.scatter(
        grouped, _row_starts(index), blocks.transpose(0, 2, 1), numbers, unique_indices=True, mode="promise_in_bounds"
    )


def pack_grouped(grouped: jax.Array, index: Index) -> jax.Array:
    """The transpose of `unpack_grouped`: a gather of rows of R weights."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    sizes = (1, index.out_idx.shape[1])
    rows = lax.gather(grouped, _row_starts(index), numbers, sizes, mode="promise_in_bounds")
    return rows.transpose(0, 2, 1)


def to_output_order(grouped: jax.Array, index: Index, out: int, axis: int) -> jax.Array:
    """Outputs along `axis` from the order of the groups (num_groups * R of them) to their own (out)."""
    at = (slice(None),) * axis + (row_place(index)[:out],)
    return grouped.at[at].get(mode="promise_in_bounds")


def to_group_order(values: jax.Array, index: Index, axis: int) -> jax.Array:
    """The transpose of `to_output_order`; phantom rows are zero."""
    at = (slice(None),) * axis + (index.out_idx.reshape(-1),)
    if index.out_idx.size == values.shape[axis]:
        return values.at[at].get(mode="promise_in_bounds")
    return values.at[at].get(mode="fill", fill_value=0)


def _permutes_output(positions: int, in_features: int) -> bool:
    """Whether to bring the output into order rather than the kernel, because it is much smaller.

    On a CPU, forward and backward of 512x512x3x3 took 54 instead of 69 ms at 2x2 positions and batch 128, 163 instead
    of 169 ms at 4x4; at equal sizes (512x256x3x3 at 4x4) the kernel is the better one, 82 against 92 ms.

    Where the batch may be any (`jax.export`), it is the kernel: of weights that are constants of the program, XLA does
    that once, while it compiles.
    """
    return not is_symbolic_dim(positions) and 2 * positions <= in_features


def _product(
    x: jax.Array, kernel: jax.Array, geometry: ConvGeometry, order: _Order, precision: lax.PrecisionLike
) -> jax.Array:
    """x by the flattened kernel[in, features]; linear in both."""
    if geometry.is_matmul(x.shape[1:3]):
        form = "chwn,co->ohwn" if order.feature_major else "nhwc,co->nhwo"
        return jnp.einsum(form, x, kernel, precision=precision)
    if cpu_convolution.serves(x, kernel):
        return cpu_convolution.forward(x, kernel, geometry, order.feature_major, precision)
    kernel = kernel.reshape(*geometry.kernel_size, geometry.in_channels, -1)
    return convolve(x, kernel, geometry=geometry, feature_major=order.feature_major, precision=precision)


def _transposed(product: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], d: jax.Array) -> jax.Array:
    """The transpose of a product that is linear in an array of `shape`, at d; in d's dtype."""
    (result,) = jax.linear_transpose(product, jax.ShapeDtypeStruct(shape, d.dtype))(d)
    return result


@functools.cache  # one object for each order, so nothing recompiles
def dense_kernels(*, feature_major: bool) -> Kernels:
    """The dense product, in the form of `Kernels`.

    Args:
      feature_major: whether activations are [C, H, W, N], as those of all other implementations; else [N, H, W, C].
    """
    order = _Order(feature_major)

    def count(size: tuple[int, ...], geometry: ConvGeometry, activations: jax.Array) -> int:
        return activations.shape[order.batch] * math.prod(geometry.output_size(size[0], size[1]))

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
        kernel = unpack_grouped(blocks, index, geometry.in_features)
        if _permutes_output(count(x.shape[1:3], geometry, x), geometry.in_features):
            y = _product(x, kernel.astype(x.dtype), geometry, order, precision)
            y = to_output_order(y, index, out, order.features)
        else:
            kernel = to_output_order(kernel, index, out, 1).astype(x.dtype)
            y = _product(x, kernel, geometry, order, precision)
        return add_bias(y, bias, order.features)

    def input_gradient(
        dy: jax.Array,
        blocks: jax.Array,
        index: Index,
        *,
        geometry: ConvGeometry,
        input_size: tuple[int, int],
        precision: lax.PrecisionLike = None,
    ) -> jax.Array:
        out, batch = dy.shape[order.features], dy.shape[order.batch]
        kernel = unpack_grouped(blocks, index, geometry.in_features)
        if _permutes_output(count(input_size, geometry, dy), geometry.in_features):
            dy = to_group_order(dy, index, order.features)
        else:
            kernel = to_output_order(kernel, index, out, 1)
        kernel = kernel.astype(dy.dtype)
        if cpu_convolution.serves(dy, kernel) and not geometry.is_matmul(input_size):
            return cpu_convolution.input_gradient(dy, kernel, geometry, feature_major, input_size, precision)
        ends = (geometry.in_channels, batch)
        shape = (ends[0], *input_size, ends[1]) if feature_major else (ends[1], *input_size, ends[0])
        return _transposed(lambda x: _product(x, kernel, geometry, order, precision), shape, dy)

    def weight_gradient(
        x: jax.Array,
        dy: jax.Array,
        index: Index,
        *,
        geometry: ConvGeometry,
        dtype: jnp.dtype,
        precision: lax.PrecisionLike = None,
    ) -> jax.Array:
        dy = dy.astype(x.dtype)
        permutes_output = _permutes_output(count(x.shape[1:3], geometry, x), geometry.in_features)
        if permutes_output:
            dy = to_group_order(dy, index, order.features)
        if cpu_convolution.serves(x, dy) and not geometry.is_matmul(x.shape[1:3]):
            gradient = cpu_convolution.weight_gradient(x, dy, geometry, feature_major, precision)
        else:
            shape = geometry.in_features, dy.shape[order.features]
            gradient = _transposed(lambda kernel: _product(x, kernel, geometry, order, precision), shape, dy)
        if not permutes_output:
            gradient = to_group_order(gradient, index, 1)
        return pack_grouped(gradient, index).astype(dtype)

    return Kernels(forward, input_gradient, weight_gradient)
