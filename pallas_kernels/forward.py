"""Pallas kernel: Y[rows of g] = panel of g @ gathered X + bias, for every row group g (SpMM).

One program owns one row group and a tile of positions of one output row, and walks over the panel:

    for k in columns of the panel, `tiles.columns` at a time:
        acc[R, positions] += entries[k, :]^T @ x[row of column in_idx[k], positions]

All blocks of a group share its rows, so the loop does not care where a block ends and any C will do. Programs that
work side by side own different groups of the same positions: a row gathered by one is in the L2 cache for the others.
A bias is added to `acc` before that is rounded and stored: one load a row, where a sum of its own would read and write
all of Y again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.interface import Index
from pallas_kernels.rows import ImageRows, quotient, remainder
from pallas_kernels.tiles import Tiles, padded_rows


def load_inputs(x_ref, in_idx_ref, k, end, row, positions, image: ImageRows):
    """Inputs of panel columns `k` (zero from `end` on) at positions of output row `row`: [k, positions]."""
    inside = k < end
    column = plgpu.load(in_idx_ref.at[k], mask=inside, other=0).astype(jnp.int32)
    # Clamped, as every index that comes from memory: a wrong one gives a wrong number, never foreign memory.
    source, down, shift = image.decode(jnp.clip(column, 0, image.geometry.in_features - 1))
    height = row * image.geometry.strides[0] + down
    if any(image.geometry.padding[0]):
        inside &= (height >= 0) & (height < image.height)
    at = positions[None, :] + shift[:, None]
    mask = inside[:, None] & (positions < image.out_length)[None, :]
    if not image.split and any(image.geometry.padding[1]):
        mask &= (at >= 0) & (at < image.length)
    return plgpu.load(x_ref.at[image.row(source, height)[:, None], at], mask=mask, other=0)


def load_rows(ref, k, end, rows: int):
    """Panel columns `k` of `entries`: [k, padded R]."""
    r = lax.broadcasted_iota(jnp.int32, (1, padded_rows(rows)), 1)
    mask = (k < end)[:, None] & (r < rows)
    return plgpu.load(ref.at[k[:, None], r], mask=mask, other=0)


def locate(tile, length: int, positions: int):
    """Tile number -> row, and the positions of the tile in a row of `length`."""
    per_row = pl.cdiv(length, positions)
    return quotient(tile, per_row), remainder(tile, per_row) * positions + jnp.arange(positions, dtype=jnp.int32)


def own_part(start_ref, num_groups: int, num_blocks: int, cols: int, image: ImageRows, tiles: Tiles):
    """What this program owns: group, output row, positions, and the panel columns `begin` to `end` of the group.

    Programs of consecutive numbers own different groups of the same positions.
    """
    program = pl.program_id(0)
    group = remainder(program, num_groups)
    row, positions = locate(quotient(program, num_groups), image.out_length, tiles.positions)
    begin, end = (jnp.clip(start_ref[group + i], 0, num_blocks) * cols for i in (0, 1))
    return group, row, positions, begin, end


def load_targets(out_idx_ref, group, rows: int, out: int):
    """The output rows of a group: [padded R]; `out` beyond R."""
    r = jnp.arange(padded_rows(rows), dtype=jnp.int32)
    return plgpu.load(out_idx_ref.at[group * rows + r], mask=r < rows, other=out)


def is_real(targets, out: int):
    """Which output rows exist: no phantom ones, and none that an index cannot mean."""
    return (targets >= 0) & (targets < out)


def at_outputs(ref, targets, row, positions, image: ImageRows, out: int):
    """Where a group's outputs are at positions of output row `row`, and which exist: [padded R, positions]."""
    mask = is_real(targets, out)[:, None] & (positions < image.out_length)[None, :]
    return ref.at[(targets * image.out_size[0] + row)[:, None], positions[None, :]], mask


def _kernel(
    start_ref,
    out_idx_ref,
    in_idx_ref,
    entries_ref,
    x_ref,
    *last_refs,
    image,
    tiles,
    num_groups,
    num_blocks,
    rows,
    cols,
    out,
    precision,
):
    *bias_ref, y_ref = last_refs  # without a bias there is no operand for it
    group, row, positions, begin, end = own_part(start_ref, num_groups, num_blocks, cols, image, tiles)

    def step(i, acc):
        k = begin + i * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
        inputs = load_inputs(x_ref, in_idx_ref, k, end, row, positions, image)
        weights = load_rows(entries_ref, k, end, rows)
        return acc + jnp.dot(weights.T, inputs, precision=precision, preferred_element_type=jnp.float32)

    acc = jnp.zeros((padded_rows(rows), tiles.positions), jnp.float32)
    acc = lax.fori_loop(0, quotient(end - begin + tiles.columns - 1, tiles.columns), step, acc)
    targets = load_targets(out_idx_ref, group, rows, out)
    if bias_ref:
        bias = plgpu.load(bias_ref[0].at[targets], mask=is_real(targets, out), other=0)
        acc += bias.astype(jnp.float32)[:, None]
    where, mask = at_outputs(y_ref, targets, row, positions, image, out)
    plgpu.store(where, acc.astype(y_ref.dtype), mask=mask)


def forward_kernel(
    x_rows, entries, index: Index, *, bias, image: ImageRows, tiles: Tiles, out: int, precision, interpret
):
    """x_rows[C * H * phases, length], entries[num_blocks * C, R], bias[out] or None -> y[out * OH, OW * N]."""
    (num_groups, rows), (num_blocks, cols) = index.out_idx.shape, index.in_idx.shape
    count = num_groups * image.out_size[0] * pl.cdiv(image.out_length, tiles.positions)
    kernel = functools.partial(
        _kernel,
        image=image,
        tiles=tiles,
        num_groups=num_groups,
        num_blocks=num_blocks,
        rows=rows,
        cols=cols,
        out=out,
        precision=precision,
    )
    last = () if bias is None else (bias,)
    return pl.pallas_call(
        kernel,
        grid=(count,),
        out_shape=jax.ShapeDtypeStruct((out * image.out_size[0], image.out_length), x_rows.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="shuffled_block_forward",
    )(index.group_start, index.out_idx.reshape(-1), index.in_idx.reshape(-1), entries, x_rows, *last)
