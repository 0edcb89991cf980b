"""Feature-major activations as rows of contiguous memory, and which part of them a column of a panel reads.

A GPU kernel sees the input `x[C, H, W, N]` as `[C * H * phases, length]`, one row for each channel and image row, whose
`length = W * N` elements lie side by side. Output row oh of a 3x3 convolution has `OW * N` positions m, and
column j = (kh, kw, c) reads as many elements of one input row, shifted by whole image columns:

    x row (c, oh * stride_h + kh - top),   elements m + (kw - left) * N,   zero outside of 0 .. W * N - 1

so whatever is gathered is contiguous and, N being padded to a multiple of 8, aligned to 16 bytes. A horizontal stride
would break that; there the input is split into *phases* (even and odd image columns for stride 2) by one copy
beforehand, and zero-padded with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry

ALIGNMENT = 8  # elements; 16 bytes of bfloat16


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Static sizes of a convolution whose activations are such rows.

    Attributes:
      geometry: as given.
      height, width, batch: of the input.
      padded_batch: N rounded up to a multiple of `ALIGNMENT`.
    """

    geometry: ConvGeometry
    height: int
    width: int
    batch: int

    @property
    def padded_batch(self) -> int:
        return -(-self.batch // ALIGNMENT) * ALIGNMENT

    @property
    def out_size(self) -> tuple[int, int]:
        return self.geometry.output_size(self.height, self.width)

    @property
    def out_length(self) -> int:
        """Positions of one output row: OW * N."""
        return self.out_size[1] * self.padded_batch

    @property
    def split(self) -> bool:
        """Whether the image columns are split into phases."""
        return self.geometry.strides[1] > 1

    @property
    def phases(self) -> int:
        return min(self.geometry.kernel_size[1], self.geometry.strides[1]) if self.split else 1

    @property
    def columns(self) -> int:
        """Image columns of one row of one phase."""
        if not self.split:
            return self.width
        return self.out_size[1] + (self.geometry.kernel_size[1] - 1) // self.geometry.strides[1]

    @property
    def length(self) -> int:
        return self.columns * self.padded_batch

    @property
    def num_rows(self) -> int:
        return self.geometry.in_channels * self.height * self.phases

    def row(self, source: jax.Array, height: jax.Array) -> jax.Array:
        """Row of `to_rows`' array: `source` is `c * phases + p`; rows are ordered (channel, image row, phase)."""
        channel, phase = quotient(source, self.phases), remainder(source, self.phases)
        return (channel * self.height + height) * self.phases + phase

    def decode(self, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Column j of the matrix -> (channel and phase `c * phases + p`, row offset `kh - top`, shift in a row)."""
        (_, kernel_w), channels = self.geometry.kernel_size, self.geometry.in_channels
        (top, _), (left, _) = self.geometry.padding
        if self.geometry.kernel_size == (1, 1):  # one tap, of phase 0
            zero = jnp.zeros_like(column)
            return column, zero - top, zero if self.split else zero - left * self.padded_batch
        tap = quotient(column, channels)
        channel, kernel_row, kernel_col = column - tap * channels, quotient(tap, kernel_w), remainder(tap, kernel_w)
        if not self.split:
            return channel, kernel_row - top, (kernel_col - left) * self.padded_batch
        stride = self.geometry.strides[1]
        phase, shift = remainder(kernel_col, stride), quotient(kernel_col, stride) * self.padded_batch
        return channel * self.phases + phase, kernel_row - top, shift


def outer_positions(positions: jax.Array, image: ImageRows, whole: ImageRows, start: jax.Array | None) -> jax.Array:
    """Positions of a row of a part of the batch -> positions of the same row of the whole batch.

    Args:
      positions: `column * N + n`, where N is the padded batch of `image`.
      image: of the part.
      whole: of the whole batch.
      start: int32[], where the part begins, in units of `ALIGNMENT`, so that a compiler sees what divides it; None
        if the part is the whole.
    """
    if start is None:
        return positions
    size = image.padded_batch
    return quotient(positions, size) * whole.padded_batch + start * ALIGNMENT + remainder(positions, size)


def quotient(a: jax.Array, b: int) -> jax.Array:
    """`a // b` for a >= 0: truncating, one instruction, where floor division takes six and hides what it divides."""
    return a if b == 1 else lax.div(a, jnp.full_like(a, b))


def remainder(a: jax.Array, b: int) -> jax.Array:
    """`a % b` for a >= 0."""
    return jnp.zeros_like(a) if b == 1 else lax.rem(a, jnp.full_like(a, b))


def to_rows(x: jax.Array, image: ImageRows) -> jax.Array:
    """x[C, H, W, N] -> [C * H * phases, length]; a reshape, but for a horizontal stride or a batch to be padded."""
    x = pad_batch(x, image)
    if image.split:
        stride, left = image.geometry.strides[1], image.geometry.padding[1][0]
        right = image.columns * stride - image.width - left
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (left, right, 0), (0, 0, 0)))
        x = x.reshape(*x.shape[:2], image.columns, stride, image.padded_batch)[:, :, :, : image.phases]
        x = x.transpose(0, 1, 3, 2, 4)
    return x.reshape(image.num_rows, image.length)


def from_rows(rows: jax.Array, image: ImageRows) -> jax.Array:
    """The transpose of `to_rows`: [C * H * phases, length] -> [C, H, W, N]."""
    channels, batch = image.geometry.in_channels, image.padded_batch
    x = rows.reshape(channels, image.height, image.phases, image.columns, batch)
    if image.split:
        stride, left = image.geometry.strides[1], image.geometry.padding[1][0]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, stride - image.phases), (0, 0), (0, 0))).transpose(0, 1, 3, 2, 4)
        x = x.reshape(channels, image.height, image.columns * stride, batch)
        right = image.columns * stride - image.width - left
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (-left, -right, 0), (0, 0, 0)))
    return x.reshape(channels, image.height, image.width, batch)[..., : image.batch]


def pad_batch(x: jax.Array, image: ImageRows) -> jax.Array:
    """[..., N] -> [..., padded_batch]."""
    spare = image.padded_batch - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]) if spare else x


def output_rows(dy: jax.Array, image: ImageRows) -> jax.Array:
    """dy[out, OH, OW, N] -> [out * OH, OW * N]."""
    return pad_batch(dy, image).reshape(-1, image.out_length)


def entries_of(blocks: jax.Array) -> jax.Array:
    """blocks[num_blocks, R, C] -> [num_blocks * C, R]: one row for each column of a panel."""
    return blocks.transpose(0, 2, 1).reshape(-1, blocks.shape[1])
