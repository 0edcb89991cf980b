"""From kernels over rows to an implementation: what every GPU implementation does around its kernels.

A GPU kernel takes activations as contiguous rows and weights as panel columns (`pallas_kernels.rows`). Here they are
brought into that form and back, limits are checked, and the input gradient's scratch is kept small.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry, Index, Kernels
from pallas_kernels.limits import unsupported_reason
from pallas_kernels.rows import ALIGNMENT, ImageRows, entries_of, from_rows, output_rows, to_rows

SCRATCH_BYTES = 256 * 2**20  # of the input gradient


class RowKernels(NamedTuple):
    """Three functions over rows; all take `image`, `cols` (C), `out` and `precision` by name, `forward` also `bias`.

    Attributes:
      forward: `(x_rows[C * H * phases, length], entries[num_blocks * C, R], index) -> y[out * OH, OW * N]`; `bias` is
        [out] or None.
      input_gradient: `(dy_rows[out * OH, OW * N], entries, index) -> dx_rows`.
      weight_gradient: `(x_rows, dy_rows, index) -> d_entries float32[num_blocks * C, R]`.
    """

    forward: Callable[..., jax.Array]
    input_gradient: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]


def _check(name: str, dtype: jnp.dtype, index: Index, out: int, image: ImageRows, precision: lax.PrecisionLike) -> None:
    block_shape, shape = (index[0].shape[1], index[1].shape[1]), (out, image.geometry.in_features)
    reason = unsupported_reason(
        dtype, block_shape, shape, image.geometry, (image.height, image.width), image.batch, precision
    )
    if reason is not None:
        raise NotImplementedError(f"no {name} kernel for {reason}; choose implementation='dense'.")


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
        _check(name, x.dtype, index, out, image, precision)
        entries = entries_of(blocks.astype(x.dtype))
        y = kernels.forward(
            to_rows(x, image),
            entries,
            index,
            bias=bias,
            image=image,
            cols=blocks.shape[2],
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
        out, batch = dy.shape[0], dy.shape[3]
        _check(name, dy.dtype, index, out, ImageRows(geometry, *input_size, batch), precision)
        entries = entries_of(blocks.astype(dy.dtype))

        def part(dy: jax.Array) -> jax.Array:
            image = ImageRows(geometry, *input_size, dy.shape[3])
            rows = kernels.input_gradient(
                output_rows(dy, image), entries, index, image=image, cols=blocks.shape[2], out=out, precision=precision
            )
            return from_rows(rows, image)

        scratch = entries.shape[0] * dy[0].size * dy.dtype.itemsize
        chunks = min(-(-scratch // SCRATCH_BYTES), -(-batch // ALIGNMENT))
        if chunks <= 1:
            return part(dy)
        size = -(-batch // (chunks * ALIGNMENT)) * ALIGNMENT
        chunks = -(-batch // size)
        dy = jnp.pad(dy, ((0, 0), (0, 0), (0, 0), (0, chunks * size - batch)))
        # One after the other, so that the scratch of one chunk is free for the next.
        dx = lax.map(part, jnp.moveaxis(dy.reshape(*dy.shape[:3], chunks, size), 3, 0))
        dx = jnp.moveaxis(dx, 0, 3)
        return dx.reshape(*dx.shape[:3], -1)[..., :batch]

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
        _check(name, x.dtype, index, dy.shape[0], image, precision)
        num_blocks, cols = index[1].shape
        d_entries = kernels.weight_gradient(
            to_rows(x, image),
            output_rows(dy.astype(x.dtype), image),
            index,
            image=image,
            cols=cols,
            out=dy.shape[0],
            precision=precision,
        )
        return d_entries.reshape(num_blocks, cols, -1).transpose(0, 2, 1).astype(dtype)

    return Kernels(forward, input_gradient, weight_gradient)
