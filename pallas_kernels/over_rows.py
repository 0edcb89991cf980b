"""From kernels over rows to an implementation: what every GPU implementation does around its kernels.

A GPU kernel takes activations as contiguous rows and weights as panel columns (`pallas_kernels.rows`). Here they are
brought into that form and back, limits are checked, and the input gradient's scratch is kept small.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry, Index, Kernels
from pallas_kernels.limits import unsupported_reason
from pallas_kernels.rows import ALIGNMENT, ImageRows, entries_of, from_rows, output_rows, to_rows

SCRATCH_BYTES = 256 * 2**20  # of the input gradient
WHOLE_TILES = 64  # parts of the batch of at least as many examples are whole multiples of it, as tiles are


class RowKernels(NamedTuple):
    """Three functions over rows; all take `image`, `out` and `precision` by name, `forward` also `bias`.

    Attributes:
      forward: `(x_rows[C * H * phases, length], entries[num_blocks * C, R], index) -> y[out * OH, OW * N]`; `bias` is
        [out] or None.
      input_gradient: `(dy_rows[out * OH, OW * N], entries, index) -> dx_rows`; `whole`, `start` and `into` tell the
        part of the batch.
      weight_gradient: `(x_rows, dy_rows, index) -> d_entries float32[num_blocks * C, R]`.
    """

    forward: Callable[..., jax.Array]
    input_gradient: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]


def _check(
    name: str,
    of: str,
    dtype: jnp.dtype,
    index: Index,
    out: int,
    image: ImageRows,
    precision: lax.PrecisionLike,
) -> None:
    block_shape, shape = (index.out_idx.shape[1], index.in_idx.shape[1]), (out, image.geometry.in_features)
    num_blocks, input_size = index.in_idx.shape[0], (image.height, image.width)
    reason = unsupported_reason(
        dtype, block_shape, num_blocks, shape, image.geometry, input_size, image.batch, precision, of
    )
    if reason is not None:
        raise NotImplementedError(f"no {name} kernel for {reason}; choose implementation='dense'.")


def part_of_batch(num_entries: int, whole: ImageRows, itemsize: int) -> int:
    """Examples of the parts that the input gradient cuts the batch into, so that its scratch is `SCRATCH_BYTES` or so.

    Args:
      num_entries: panel columns.
      whole: of the whole batch.
      itemsize: bytes of an activation.
    """
    each = num_entries * math.prod(whole.out_size) * itemsize
    most = max(ALIGNMENT, SCRATCH_BYTES // max(each, 1))
    if most >= whole.padded_batch:
        return whole.padded_batch
    parts = -(-whole.padded_batch // most)
    size = -(-whole.padded_batch // parts)
    step = ALIGNMENT if size < WHOLE_TILES else WHOLE_TILES
    return min(whole.padded_batch, -(-size // step) * step)


def over_rows(name: str, kernels: RowKernels) -> Kernels:
    """The implementation `name`; see `pallas_kernels.interface.Kernels`.

    Its functions raise NotImplementedError for what GPU kernels cannot serve (`pallas_kernels.limits`).
    """

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
        image = ImageRows(geometry, x.shape[1], x.shape[2], x.shape[3])
        _check(name, "forward", x.dtype, index, out, image, precision)
        entries = entries_of(blocks.astype(x.dtype))
        y = kernels.forward(
            to_rows(x, image),
            entries,
            index,
            bias=bias,
            image=image,
            out=out,
            precision=precision,
        )
        return y.reshape(out, *image.out_size, image.padded_batch)[..., : image.batch]

    def input_gradient(
        dy: jax.Array,
        blocks: jax.Array,
        index: Index,
        *,
        geometry: ConvGeometry,
        input_size: tuple[int, int],
        precision: lax.PrecisionLike = None,
    ) -> jax.Array:
        whole = ImageRows(geometry, *input_size, dy.shape[3])
        _check(name, "input_gradient", dy.dtype, index, dy.shape[0], whole, precision)
        entries, rows = entries_of(blocks.astype(dy.dtype)), output_rows(dy, whole)
        size = part_of_batch(entries.shape[0], whole, dy.dtype.itemsize)
        image = dataclasses.replace(whole, batch=size)

        def part(start: jax.Array | None, into: jax.Array | None) -> jax.Array:
            return kernels.input_gradient(
                rows, entries, index, image=image, whole=whole, start=start, into=into, out=dy.shape[0],
                precision=precision,
            )  # fmt: skip

        if size == whole.padded_batch:
            return from_rows(part(None, None), whole)

        def next_part(i: jax.Array, dx: jax.Array) -> jax.Array:
            # The last one ends with the batch, and computes some examples of the one before again.
            start = jnp.minimum(i * size, whole.padded_batch - size) // ALIGNMENT
            return part(start.astype(jnp.int32).reshape(1), dx)

        # One after the other, so that the scratch of one part is free for the next.
        dx = jnp.zeros((whole.num_rows, whole.length), dy.dtype)
        return from_rows(lax.fori_loop(0, -(-whole.padded_batch // size), next_part, dx), whole)

    def weight_gradient(
        x: jax.Array,
        dy: jax.Array,
        index: Index,
        *,
        geometry: ConvGeometry,
        dtype: jnp.dtype,
        precision: lax.PrecisionLike = None,
    ) -> jax.Array:
        image = ImageRows(geometry, x.shape[1], x.shape[2], x.shape[3])
        _check(name, "weight_gradient", x.dtype, index, dy.shape[0], image, precision)
        num_blocks, cols = index.in_idx.shape
        d_entries = kernels.weight_gradient(
            to_rows(x, image),
            output_rows(dy.astype(x.dtype), image),
            index,
            image=image,
            out=dy.shape[0],
            precision=precision,
        )
        return d_entries.reshape(num_blocks, cols, -1).transpose(0, 2, 1).astype(dtype)

    return Kernels(forward, input_gradient, weight_gradient)
