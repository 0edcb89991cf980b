"""Pallas kernels: dX[in_idx[b]] += blocks[b]^T @ dY[rows of b] (transposed SpMM), deterministic, in two passes.

    scatter   P[rank of k, :]  = entries[k, :] @ dY[rows of the group of k, :]      one row for each panel column k
    collect   dX[c, :] = sum over the taps of P[first[j]:first[j + 1], :] shifted by the tap, j = (tap, c)

The rows of P are in the order of the input columns that they are summed into (`KernelIndex.inverse`): the second pass
reads them one after the other, and looks nothing up but where each column begins. It keeps everything in registers,
without shared memory and barriers, and loads and stores 16 bytes a thread. Every element of P is written once and read
once, in a fixed order, so equal inputs give equal bits on any GPU. Atomic additions would need no scratch, but are not
deterministic and in float32 only.

P is larger than dY by C * num_blocks / out. Where that is too much, `over_rows` calls both passes for one part of the
batch after the other; they read and write the whole arrays at an offset.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.forward import is_real, load_rows, load_targets, locate, own_part
from pallas_kernels.interface import Index
from pallas_kernels.kernel_index import inverse
from pallas_kernels.rows import ImageRows, outer_positions, quotient, remainder
from pallas_kernels.tiles import Tiles, collected_positions


def _scatter_kernel(
    start_ref,
    out_idx_ref,
    rank_ref,
    entries_ref,
    dy_ref,
    *last_refs,
    image,
    whole,
    tiles,
    num_groups,
    num_blocks,
    rows,
    cols,
    out,
    precision,
):
    *part_ref, p_ref = last_refs  # where the part of the batch begins, if it is one
    group, row, positions, begin, end = own_part(start_ref, num_groups, num_blocks, cols, image, tiles)
    targets = load_targets(out_idx_ref, group, rows, out)
    inside = positions < image.out_length
    at = outer_positions(positions, image, whole, part_ref[0][0] if part_ref else None)
    where = dy_ref.at[(targets * image.out_size[0] + row)[:, None], at[None, :]]
    d_rows = plgpu.load(where, mask=is_real(targets, out)[:, None] & inside[None, :], other=0)

    def step(i, carry):
        k = begin + i * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
        weights = load_rows(entries_ref, k, end, rows)
        rank = plgpu.load(rank_ref.at[k], mask=k < end, other=0).astype(jnp.int32)
        # Beyond the panel a row that is not there: the interpreter would put back what the row of another column held.
        rank = jnp.where(k < end, jnp.clip(rank, 0, num_blocks * cols - 1), num_blocks * cols)
        partial = jnp.dot(weights, d_rows, precision=precision, preferred_element_type=jnp.float32)
        target = p_ref.at[(rank * image.out_size[0] + row)[:, None], positions[None, :]]
        plgpu.store(target, partial.astype(p_ref.dtype), mask=(k < end)[:, None] & inside[None, :])
        return carry

    lax.fori_loop(0, quotient(end - begin + tiles.columns - 1, tiles.columns), step, 0)


def _collect_kernel(first_ref, p_ref, *last_refs, image, whole, positions_of_program, num_entries):
    *others, dx_ref = last_refs
    part_ref = others[:1]  # then dX itself, whose other parts stay as they are
    per_row = pl.cdiv(image.length, positions_of_program)
    program = pl.program_id(0)
    target, tile = quotient(program, image.height * per_row), remainder(program, image.height * per_row)
    row, positions = locate(tile, image.length, positions_of_program)
    channel, phase = quotient(target, image.phases), remainder(target, image.phases)
    geometry, (out_h, _) = image.geometry, image.out_size
    (kernel_h, kernel_w), (stride_h, stride_w) = geometry.kernel_size, geometry.strides
    (top, _), (left, _) = geometry.padding
    taps_w = pl.cdiv(kernel_w, stride_w) if image.split else kernel_w  # of one phase, across

    def tap(t, acc):
        kh, i = quotient(t, taps_w), remainder(t, taps_w)
        kw, shift = (phase + i * stride_w, i) if image.split else (i, i - left)
        above = row + top - kh  # the output row times the stride
        out_row = quotient(jnp.maximum(above, 0), stride_h)
        inside = (above >= 0) & (above - out_row * stride_h == 0) & (out_row < out_h) & (kw < kernel_w)
        column = jnp.minimum((kh * kernel_w + kw) * geometry.in_channels + channel, geometry.in_features - 1)
        begin, end = (jnp.clip(first_ref[column + i].astype(jnp.int32), 0, num_entries) for i in (0, 1))
        source = positions - shift * image.padded_batch
        mask = (source >= 0) & (source < image.out_length)

        def step(k, acc):
            at = jnp.broadcast_to(k * out_h + out_row, source.shape)
            return acc + plgpu.load(p_ref.at[at, source], mask=mask, other=0).astype(jnp.float32)

        return lax.fori_loop(begin, jnp.where(inside, end, begin), step, acc)

    acc = jnp.zeros((positions_of_program,), jnp.float32)
    taps = kernel_h * taps_w
    acc = tap(jnp.int32(0), acc) if taps == 1 else lax.fori_loop(0, taps, tap, acc)
    rows = jnp.zeros((positions_of_program,), jnp.int32) + image.row(target, row)
    at = outer_positions(positions, image, whole, part_ref[0][0] if part_ref else None)
    plgpu.store(dx_ref.at[rows, at], acc.astype(dx_ref.dtype), mask=positions < image.length)


def input_gradient_kernels(
    dy_rows,
    entries,
    index: Index,
    *,
    image: ImageRows,
    whole: ImageRows,
    start: jax.Array | None,
    into: jax.Array | None,
    tiles: Tiles,
    out: int,
    precision,
    interpret,
):
    """dy_rows[out * OH, OW * N], entries[num_blocks * C, R] -> dx_rows[channels * H * phases, length].

    Of a part of the batch if `start` (int32[1], in units of `ALIGNMENT`) says where it begins: `image` is that of the
    part, `whole` of the arrays, and the result is `into` with the part written over.
    """
    (num_groups, rows), (num_blocks, cols) = index.out_idx.shape, index.in_idx.shape
    options = {
        "compiler_params": plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        "interpret": interpret,
    }
    count = num_groups * image.out_size[0] * pl.cdiv(image.out_length, tiles.positions)
    scatter = functools.partial(
        _scatter_kernel,
        image=image,
        whole=whole,
        tiles=tiles,
        num_groups=num_groups,
        num_blocks=num_blocks,
        rows=rows,
        cols=cols,
        out=out,
        precision=precision,
    )
    first, rank = inverse(index, image.geometry.in_features)
    part = () if start is None else (start,)
    scratch = jax.ShapeDtypeStruct((entries.shape[0] * image.out_size[0], image.out_length), dy_rows.dtype)
    p = pl.pallas_call(scatter, grid=(count,), out_shape=scratch, name="shuffled_block_scatter", **options)(
        index.group_start, index.out_idx.reshape(-1), rank.reshape(-1), entries, dy_rows, *part
    )
    positions = collected_positions(image.length, tiles.num_warps)
    collect = functools.partial(
        _collect_kernel, image=image, whole=whole, positions_of_program=positions, num_entries=entries.shape[0]
    )
    sources = image.geometry.in_channels * image.phases
    return pl.pallas_call(
        collect,
        grid=(sources * image.height * pl.cdiv(image.length, positions),),
        out_shape=jax.ShapeDtypeStruct((whole.num_rows, whole.length), dy_rows.dtype),
        input_output_aliases={} if into is None else {3: 0},
        name="shuffled_block_collect",
        **options,
    )(first, p, *part, *(() if into is None else (into,)))
