"""Pallas kernels: dX[in_idx[b]] += blocks[b]^T @ dY[rows of b] (transposed SpMM), deterministic, in two passes.

    scatter   P[k, :]  = entries[k, :] @ dY[rows of the group of k, :]      one row for each column of a panel
    collect   dX[c, :] = sum of P[k, :] over the panel columns k that read channel c, each shifted by its tap

Every element of P is written once and read once, in a fixed order, so equal inputs give equal bits on any GPU. The
scratch P is larger than dY by C * num_blocks / out; `over_rows` cuts the batch where that is too much. Atomic additions
need no scratch, but are not deterministic and in float32 only.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.forward import at_outputs, load_rows, load_targets, locate, own_part
from pallas_kernels.rows import ImageRows, quotient, remainder
from pallas_kernels.tiles import Tiles

COLLECTED = 16  # panel columns that the second pass adds in one step


def _scatter_kernel(
    start_ref, out_idx_ref, entries_ref, dy_ref, p_ref, *, image, tiles, num_groups, rows, cols, out, precision
):
    group, row, positions, begin, end = own_part(start_ref, num_groups, cols, image, tiles)
    where, mask = at_outputs(dy_ref, load_targets(out_idx_ref, group, rows, out), row, positions, image, out)
    d_rows = plgpu.load(where, mask=mask, other=0)

    def step(i, carry):
        k = begin + i * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
        weights = load_rows(entries_ref, k, end, rows)
        partial = jnp.dot(weights, d_rows, precision=precision, preferred_element_type=jnp.float32)
        target = p_ref.at[(k * image.out_size[0] + row)[:, None], positions[None, :]]
        inside = (k < end)[:, None] & (positions < image.out_length)[None, :]
        plgpu.store(target, partial.astype(p_ref.dtype), mask=inside)
        return carry

    lax.fori_loop(0, quotient(end - begin + tiles.columns - 1, tiles.columns), step, 0)


def _collect_kernel(first_ref, order_ref, in_idx_ref, p_ref, dx_ref, *, image, tiles):
    per_row = pl.cdiv(image.length, tiles.positions)
    program = pl.program_id(0)
    target, tile = quotient(program, image.height * per_row), remainder(program, image.height * per_row)
    row, positions = locate(tile, image.length, tiles.positions)
    begin, end = first_ref[target], first_ref[target + 1]
    stride = image.geometry.strides[0]

    def step(i, acc):
        at = begin + i * COLLECTED + jnp.arange(COLLECTED, dtype=jnp.int32)
        inside = at < end
        k = plgpu.load(order_ref.at[at], mask=inside, other=0)
        column = plgpu.load(in_idx_ref.at[k], mask=inside, other=0)
        _, down, shift = image.decode(column)
        above = row - down  # the output row times the stride
        out_row = quotient(above, stride)
        inside &= (above >= 0) & (above - out_row * stride == 0) & (out_row < image.out_size[0])
        source = positions[None, :] - shift[:, None]
        mask = inside[:, None] & (source >= 0) & (source < image.out_length)
        part = plgpu.load(p_ref.at[(k * image.out_size[0] + out_row)[:, None], source], mask=mask, other=0)
        return acc + part.astype(jnp.float32).sum(axis=0)

    acc = jnp.zeros((tiles.positions,), jnp.float32)
    acc = lax.fori_loop(0, quotient(end - begin + COLLECTED - 1, COLLECTED), step, acc)
    rows = jnp.zeros((tiles.positions,), jnp.int32) + image.row(target, row)
    plgpu.store(dx_ref.at[rows, positions], acc.astype(dx_ref.dtype), mask=positions < image.length)


def columns_by_source(in_idx: jax.Array, image: ImageRows) -> tuple[jax.Array, jax.Array]:
    """The inverse index: panel columns in the order of the (channel, phase) that they read.

    Returns:
      first: int32[channels * phases + 1], where the panel columns of each begin in `order`.
      order: int32[num_blocks * C].
    """
    source, _, _ = image.decode(in_idx.reshape(-1))
    order = jnp.argsort(source, stable=True).astype(jnp.int32)
    ids = jnp.arange(image.geometry.in_channels * image.phases + 1, dtype=source.dtype)
    return jnp.searchsorted(source[order], ids).astype(jnp.int32), order


def input_gradient_kernels(
    dy_rows, entries, index, *, image: ImageRows, tiles: Tiles, cols: int, out: int, precision, interpret
):
    """dy_rows[out * OH, OW * N], entries[num_blocks * C, R] -> dx_rows[channels * H * phases, length]."""
    out_idx, in_idx, group_start = index
    num_groups, rows = out_idx.shape
    options = {
        "compiler_params": plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        "interpret": interpret,
    }
    count = num_groups * image.out_size[0] * pl.cdiv(image.out_length, tiles.positions)
    scatter = functools.partial(
        _scatter_kernel,
        image=image,
        tiles=tiles,
        num_groups=num_groups,
        rows=rows,
        cols=cols,
        out=out,
        precision=precision,
    )
    scratch = jax.ShapeDtypeStruct((entries.shape[0] * image.out_size[0], image.out_length), dy_rows.dtype)
    p = pl.pallas_call(scatter, grid=(count,), out_shape=scratch, name="shuffled_block_scatter", **options)(
        group_start, out_idx.reshape(-1), entries, dy_rows
    )
    first, order = columns_by_source(in_idx, image)
    sources = image.geometry.in_channels * image.phases
    count = sources * image.height * pl.cdiv(image.length, tiles.positions)
    collect = functools.partial(_collect_kernel, image=image, tiles=tiles)
    dx = jax.ShapeDtypeStruct((image.num_rows, image.length), dy_rows.dtype)
    return pl.pallas_call(collect, grid=(count,), out_shape=dx, name="shuffled_block_collect", **options)(
        first, order, in_idx.reshape(-1), p
    )
