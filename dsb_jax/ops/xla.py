"""The shuffled-block product in plain XLA, fast on a CPU: one small matrix product per piece of a panel.

A panel (the R rows of a group and all its columns) is cut into *pieces* of at most `piece` blocks. Two nested
loops run over batch tiles, small enough for the cache, and over pieces; each turn copies the columns that the
piece reads into one contiguous buffer and multiplies. With 16x16 blocks and pieces of two blocks:

    group_start = [0, 3, 3, 5]     piece   group   blocks
                                     0       0      0 1
                                     1       0      2 .      (`.` is masked: its weights are zero)
                                     2       2      3 4      (group 1 is empty: its rows stay zero)

Everything is sized by the number of blocks, never by `out * in`. Batched products over all groups, segment sums
over blocks and gathers with features innermost were measured at 3 to 30 times slower; copying column by column
with dynamic slices beats `lax.gather`, whose index arithmetic is done for every element.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry, Kernels
from pallas_kernels.reference import Index

TILE_BYTES = 2 * 2**20  # input tile of one turn of the batch loop; about the L2 cache of two cores
PIECE_COLUMNS = 128  # columns of one product; fewer pay more for dispatch, more waste work on masked ones


class _Pieces(NamedTuple):
    """The panels cut into pieces. `blocks` is int32[num_pieces, piece]; masked entries repeat block 0."""

    group: jax.Array
    blocks: jax.Array
    valid: jax.Array
    used: jax.Array  # number of pieces; the rest of the arrays is padding


class _Tiling(NamedTuple):
    """Static sizes. The input is laid out as [tiles, C, phases, rows, cols * tile]: stride phases apart."""

    tile: int
    num_tiles: int
    batch: int
    out_h: int
    out_w: int
    phases: tuple[int, int]
    rows: int
    cols: int

    @property
    def run(self) -> int:
        """Length of one gathered row: all output positions of a tile."""
        return self.out_h * self.out_w * self.tile


def _tiling(geometry: ConvGeometry, height: int, width: int, batch: int) -> _Tiling:
    out_h, out_w = geometry.output_size(height, width)
    (kernel_h, kernel_w), (stride_h, stride_w) = geometry.kernel_size, geometry.strides
    phases = min(kernel_h, stride_h), min(kernel_w, stride_w)
    rows, cols = out_h + (kernel_h - 1) // stride_h, out_w + (kernel_w - 1) // stride_w
    per_example = 4 * geometry.in_channels * math.prod(phases) * rows * cols
    most = min(batch, max(TILE_BYTES // per_example, -(-256 // (out_h * out_w)), 1))
    num_tiles = -(-batch // most)
    tile = -(-batch // num_tiles)
    return _Tiling(tile, num_tiles, batch, out_h, out_w, phases, rows, cols)


def _pieces(index: Index, columns: int) -> _Pieces:
    _, in_idx, group_start = index
    num_blocks, num_groups = in_idx.shape[0], group_start.shape[0] - 1
    mean = num_blocks / num_groups
    piece = max(1, math.ceil(mean / max(1, round(mean * columns / PIECE_COLUMNS))))
    counts = jnp.diff(group_start)
    ends = jnp.cumsum(-(-counts // piece))
    most = (num_blocks + num_groups * (piece - 1)) // piece
    ids = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    first_piece = (ends - (-(-counts // piece)))[group]
    block = (group_start[group] + (ids - first_piece) * piece)[:, None] + jnp.arange(piece, dtype=jnp.int32)[None]
    valid = (block < group_start[group + 1][:, None]) & (ids < ends[-1])[:, None]
    return _Pieces(group, jnp.where(valid, block, 0), valid, ends[-1])


def _to_tiles(x: jax.Array, geometry: ConvGeometry, tiling: _Tiling) -> jax.Array:
    """x[C, H, W, N] -> [tiles, C, phases, rows, cols * tile], zero-padded."""
    channels, height, width, batch = x.shape
    (top, _), (left, _) = geometry.padding
    stride_h, stride_w = geometry.strides
    grow_h = tiling.rows * stride_h - height - top
    grow_w = tiling.cols * stride_w - width - left
    spare = tiling.tile * tiling.num_tiles - batch
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, grow_h, 0), (left, grow_w, 0), (0, spare, 0)))
    x = x.reshape(channels, tiling.rows, stride_h, tiling.cols, stride_w, tiling.num_tiles, tiling.tile)
    x = x[:, :, : tiling.phases[0], :, : tiling.phases[1]].transpose(5, 0, 2, 4, 1, 3, 6)
    return x.reshape(tiling.num_tiles, channels, math.prod(tiling.phases), tiling.rows, tiling.cols * tiling.tile)


def _from_tiles(tiles: jax.Array, geometry: ConvGeometry, tiling: _Tiling, input_size: tuple[int, int]) -> jax.Array:
    """The transpose of `_to_tiles`: [tiles, C, phases, rows, cols * tile] -> [C, H, W, N]."""
    channels = tiles.shape[1]
    (top, _), (left, _) = geometry.padding
    stride_h, stride_w = geometry.strides
    x = tiles.reshape(tiling.num_tiles, channels, *tiling.phases, tiling.rows, tiling.cols, tiling.tile)
    spare_phases = (0, 0), (0, 0), (0, stride_h - tiling.phases[0]), (0, stride_w - tiling.phases[1])
    x = jnp.pad(x, (*spare_phases, (0, 0), (0, 0), (0, 0))).transpose(1, 4, 2, 5, 3, 0, 6)
    x = x.reshape(channels, tiling.rows * stride_h, tiling.cols * stride_w, tiling.num_tiles * tiling.tile)
    crop_h = input_size[0] + top - tiling.rows * stride_h
    crop_w = input_size[1] + left - tiling.cols * stride_w
    spare = tiling.batch - tiling.num_tiles * tiling.tile
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (-top, crop_h, 0), (-left, crop_w, 0), (0, spare, 0)))


def _rows_to_tiles(dy: jax.Array, out_idx: jax.Array, tiling: _Tiling) -> jax.Array:
    """dy[out, OH, OW, N] -> [tiles, num_groups, R, run], rows in the order of the groups, phantom rows zero."""
    spare = tiling.tile * tiling.num_tiles - tiling.batch
    dy = jnp.pad(dy, ((0, out_idx.size - dy.shape[0]), (0, 0), (0, 0), (0, spare)))
    dy = dy.reshape(*dy.shape[:3], tiling.num_tiles, tiling.tile).transpose(3, 0, 1, 2, 4)
    # Permuting whole runs is a copy; fused into the transpose it would be a gather of single elements.
    dy = lax.optimization_barrier(dy.reshape(tiling.num_tiles, -1, tiling.run))
    dy = dy.at[:, out_idx.reshape(-1)].get(mode="promise_in_bounds")
    return lax.optimization_barrier(dy.reshape(tiling.num_tiles, *out_idx.shape, tiling.run))


def _rows_from_tiles(y: jax.Array, out_idx: jax.Array, out: int, tiling: _Tiling) -> jax.Array:
    """The inverse of `_rows_to_tiles`: [tiles, num_groups, R, run] -> y[out, OH, OW, N]."""
    place = jnp.zeros(out_idx.size, jnp.int32).at[out_idx.reshape(-1)].set(jnp.arange(out_idx.size, dtype=jnp.int32))
    y = y.reshape(tiling.num_tiles, out_idx.size, tiling.run)
    y = lax.optimization_barrier(y.at[:, place[:out]].get(mode="promise_in_bounds"))
    y = y.reshape(tiling.num_tiles, out, tiling.out_h, tiling.out_w, tiling.tile).transpose(1, 2, 3, 0, 4)
    return y.reshape(out, tiling.out_h, tiling.out_w, -1)[..., : tiling.batch]


def _column_starts(columns: jax.Array, geometry: ConvGeometry, tiling: _Tiling) -> jax.Array:
    """Columns j = (kh, kw, c) -> int32[..., 4]: channel, phase, row and offset where their runs begin."""
    tap, channel = columns // geometry.in_channels, columns % geometry.in_channels
    kernel_h, kernel_w = tap // geometry.kernel_size[1], tap % geometry.kernel_size[1]
    (stride_h, stride_w), phase_w = geometry.strides, tiling.phases[1]
    phase = (kernel_h % stride_h) * phase_w + kernel_w % stride_w
    return jnp.stack([channel, phase, kernel_h // stride_h, (kernel_w // stride_w) * tiling.tile], axis=-1)


def _window(tiling: _Tiling) -> tuple[int, ...]:
    return (1, 1, 1, tiling.out_h, tiling.out_w * tiling.tile)


def _copy_columns(buffer: jax.Array, x: jax.Array, tile: jax.Array, starts: jax.Array, count: jax.Array,
                  tiling: _Tiling) -> jax.Array:  # fmt: skip
    """Copies the runs of `count` columns of one batch tile into `buffer[columns, out_h, out_w * tile]`."""

    def copy(j: jax.Array, buffer: jax.Array) -> jax.Array:
        start = (tile, starts[j, 0], starts[j, 1], starts[j, 2], starts[j, 3])
        run = lax.dynamic_slice(x, start, _window(tiling), allow_negative_indices=False)
        return lax.dynamic_update_slice(buffer, run[0, 0], (j, 0, 0), allow_negative_indices=False)

    return lax.fori_loop(0, count, copy, buffer)


def _piece_arrays(index: Index, columns: int, geometry: ConvGeometry, tiling: _Tiling):
    """Pieces, the starts of their columns int32[num_pieces, piece * C, 4], and how many columns each has."""
    pieces = _pieces(index, columns)
    cols = index[1][pieces.blocks].reshape(pieces.blocks.shape[0], -1)
    return pieces, _column_starts(cols, geometry, tiling), pieces.valid.sum(axis=1) * columns


def forward(x: jax.Array, blocks: jax.Array, index: Index, *, out: int, geometry: ConvGeometry,
            precision: lax.PrecisionLike = None) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.interface.Kernels`."""
    out_idx = index[0]
    num_groups, rows = out_idx.shape
    tiling = _tiling(geometry, x.shape[1], x.shape[2], x.shape[3])
    pieces, starts, counts = _piece_arrays(index, blocks.shape[2], geometry, tiling)
    masked = jnp.where(pieces.valid[:, :, None, None], blocks[pieces.blocks], 0).astype(x.dtype)
    weights = masked.transpose(0, 2, 1, 3).reshape(masked.shape[0], rows, -1)
    tiles = _to_tiles(x, geometry, tiling)

    def turn(tile: jax.Array, i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, buffer = carry
        # Columns left over from an earlier piece meet zero weights.
        buffer = _copy_columns(buffer, tiles, tile, starts[i], counts[i], tiling)
        panel = buffer.reshape(-1, tiling.run)
        at = (tile, pieces.group[i], 0, 0)
        add = jnp.dot(weights[i], panel, precision=precision, preferred_element_type=jnp.float32)
        old = lax.dynamic_slice(y, at, (1, 1, rows, tiling.run), allow_negative_indices=False)
        return lax.dynamic_update_slice(y, old + add[None, None], at, allow_negative_indices=False), buffer

    y = jnp.zeros((tiling.num_tiles, num_groups, rows, tiling.run), jnp.float32)
    buffer = jnp.zeros((starts.shape[1], *_window(tiling)[3:]), x.dtype)
    y, _ = _each_turn(tiling, pieces.used, turn, (y, buffer))
    return _rows_from_tiles(y.astype(x.dtype), out_idx, out, tiling)


def input_gradient(
    dy: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`. Deterministic: the columns are added one after the other."""
    rows = blocks.shape[1]
    tiling = _tiling(geometry, *input_size, dy.shape[3])
    pieces, starts, counts = _piece_arrays(index, blocks.shape[2], geometry, tiling)
    masked = jnp.where(pieces.valid[:, :, None, None], blocks[pieces.blocks], 0).astype(dy.dtype)
    weights = masked.transpose(0, 1, 3, 2).reshape(masked.shape[0], -1, rows)
    d_rows = _rows_to_tiles(dy, index[0], tiling)

    def turn(tile: jax.Array, i: jax.Array, dx: jax.Array) -> jax.Array:
        panel = lax.dynamic_slice(
            d_rows, (tile, pieces.group[i], 0, 0), (1, 1, rows, tiling.run), allow_negative_indices=False
        )
        partial = jnp.dot(weights[i], panel[0, 0], precision=precision, preferred_element_type=jnp.float32)
        partial = partial.reshape(-1, *_window(tiling)[3:])

        def add(j: jax.Array, dx: jax.Array) -> jax.Array:
            at = (tile, starts[i, j, 0], starts[i, j, 1], starts[i, j, 2], starts[i, j, 3])
            old = lax.dynamic_slice(dx, at, _window(tiling), allow_negative_indices=False)
            new = lax.dynamic_slice(partial, (j, 0, 0), (1, *partial.shape[1:]), allow_negative_indices=False)
            return lax.dynamic_update_slice(dx, old + new[None, None], at, allow_negative_indices=False)

        return lax.fori_loop(0, counts[i], add, dx)

    shape = (tiling.num_tiles, geometry.in_channels, math.prod(tiling.phases), tiling.rows, tiling.cols * tiling.tile)
    dx = _each_turn(tiling, pieces.used, turn, jnp.zeros(shape, jnp.float32))
    return _from_tiles(dx.astype(dy.dtype), geometry, tiling, input_size)


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    dtype: jnp.dtype,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """See `pallas_kernels.interface.Kernels`."""
    out_idx, in_idx, _ = index
    num_blocks, columns = in_idx.shape
    rows = out_idx.shape[1]
    tiling = _tiling(geometry, x.shape[1], x.shape[2], x.shape[3])
    pieces, starts, counts = _piece_arrays(index, columns, geometry, tiling)
    tiles, d_rows = _to_tiles(x, geometry, tiling), _rows_to_tiles(dy, out_idx, tiling)

    def turn(tile: jax.Array, i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_pieces, buffer = carry
        buffer = _copy_columns(buffer, tiles, tile, starts[i], counts[i], tiling)
        panel = buffer.reshape(-1, tiling.run)
        d_panel = lax.dynamic_slice(
            d_rows, (tile, pieces.group[i], 0, 0), (1, 1, rows, tiling.run), allow_negative_indices=False
        )[0, 0]
        add = lax.dot_general(
            d_panel, panel, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        old = lax.dynamic_slice(d_pieces, (i, 0, 0), (1, *d_pieces.shape[1:]), allow_negative_indices=False)
        return lax.dynamic_update_slice(d_pieces, old + add[None], (i, 0, 0), allow_negative_indices=False), buffer

    d_pieces = jnp.zeros((pieces.group.shape[0], rows, starts.shape[1]), jnp.float32)
    buffer = jnp.zeros((starts.shape[1], *_window(tiling)[3:]), x.dtype)
    d_pieces, _ = _each_turn(tiling, pieces.used, turn, (d_pieces, buffer))
    d_pieces = d_pieces.reshape(-1, rows, pieces.blocks.shape[1], columns).transpose(0, 2, 1, 3)
    target = jnp.where(pieces.valid, pieces.blocks, num_blocks).reshape(-1)  # masked entries are dropped
    d_blocks = jnp.zeros((num_blocks, rows, columns), jnp.float32)
    return d_blocks.at[target].set(d_pieces.reshape(-1, rows, columns), mode="drop").astype(dtype)


def _each_turn(tiling: _Tiling, count: jax.Array, turn, carry):
    """Runs `turn(tile, piece, carry)` for every batch tile and every piece."""
    return lax.fori_loop(
        0, tiling.num_tiles, lambda tile, c: lax.fori_loop(0, count, lambda i, c: turn(tile, i, c), c), carry
    )


XLA = Kernels(forward, input_gradient, weight_gradient)
