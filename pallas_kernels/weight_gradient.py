"""Pallas kernel: dblocks[b] = dY[rows of b] @ X[in_idx[b]]^T at the stored blocks (sampled dense-dense product).

One program owns a chunk of panel columns of one group and a part of the positions:

    for positions, `tiles.positions` at a time:
        acc[columns, R] += x[rows of the columns, positions] @ dY[rows of the group, positions]^T

Chunks never straddle two groups, so their number depends on the topology; the grid has room for the most there can be
(`pallas_kernels.kernel_index.cut_panels`), and programs beyond the last chunk do nothing. Few chunks would leave most
of a GPU idle, so the positions are split among several programs, whose sums are added afterwards in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.forward import at_outputs, load_inputs, load_targets, locate
from pallas_kernels.interface import Index
from pallas_kernels.kernel_index import chunks
from pallas_kernels.limits import MOST_ELEMENTS
from pallas_kernels.rows import ImageRows, quotient, remainder
from pallas_kernels.tiles import Tiles, padded_rows

PROGRAMS = 512  # wanted at least: about four for each multiprocessor of a large GPU
MOST_SPLITS = 32


def count_splits(num_chunks: int, weights: int, image: ImageRows, positions: int) -> int:
    """Among how many programs the positions of one chunk are split; each writes a part of `weights` numbers."""
    num_tiles = image.out_size[0] * pl.cdiv(image.out_length, positions)
    return max(1, min(MOST_SPLITS, num_tiles, -(-PROGRAMS // num_chunks), MOST_ELEMENTS // weights))


def _kernel(
    chunks_ref,
    out_idx_ref,
    in_idx_ref,
    x_ref,
    dy_ref,
    d_ref,
    *,
    image,
    tiles,
    rows,
    out,
    num_groups,
    num_chunks,
    num_splits,
    num_entries,
    precision,
):
    num_tiles = image.out_size[0] * pl.cdiv(image.out_length, tiles.positions)
    program = pl.program_id(0)
    chunk, split = remainder(program, num_chunks), quotient(program, num_chunks)
    group, begin, end = (chunks_ref[3 * chunk + i].astype(jnp.int32) for i in range(3))
    group, begin, end = (
        jnp.clip(group, 0, num_groups - 1),
        jnp.clip(begin, 0, num_entries),
        jnp.clip(end, 0, num_entries),
    )
    k = begin + jnp.arange(tiles.columns, dtype=jnp.int32)
    targets = load_targets(out_idx_ref, group, rows, out)
    each = pl.cdiv(num_tiles, num_splits)
    first = split * each
    last = jnp.where(end > begin, jnp.minimum(first + each, num_tiles), first)

    def step(t, acc):
        row, positions = locate(t, image.out_length, tiles.positions)
        inputs = load_inputs(x_ref, in_idx_ref, k, end, row, positions, image)
        where, mask = at_outputs(dy_ref, targets, row, positions, image, out)
        d_rows = plgpu.load(where, mask=mask, other=0)
        return acc + jnp.dot(inputs, d_rows.T, precision=precision, preferred_element_type=jnp.float32)

    acc = jnp.zeros((tiles.columns, padded_rows(rows)), jnp.float32)
    acc = lax.fori_loop(first, jnp.maximum(first, last), step, acc)
    r = jnp.arange(padded_rows(rows), dtype=jnp.int32)
    mask = (k < end)[:, None] & (r < rows)[None, :]
    plgpu.store(d_ref.at[(split * num_entries + k)[:, None], r[None, :]], acc, mask=mask)


def weight_gradient_kernel(
    x_rows, dy_rows, index: Index, *, image: ImageRows, tiles: Tiles, out: int, precision, interpret
):
    """x_rows[channels * H * phases, length], dy_rows[out * OH, OW * N] -> d_entries float32[num_blocks * C, R]."""
    (num_groups, rows), num_entries = index.out_idx.shape, index.in_idx.size
    table = chunks(index, tiles.columns)
    num_chunks = table.shape[0]
    num_splits = count_splits(num_chunks, num_entries * rows, image, tiles.positions)
    kernel = functools.partial(
        _kernel,
        image=image,
        tiles=tiles,
        rows=rows,
        out=out,
        num_groups=num_groups,
        num_chunks=num_chunks,
        num_splits=num_splits,
        num_entries=num_entries,
        precision=precision,
    )
    parts = pl.pallas_call(
        kernel,
        grid=(num_chunks * num_splits,),
        out_shape=jax.ShapeDtypeStruct((num_splits * num_entries, rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="shuffled_block_weight_gradient",
    )(table.reshape(-1), index.out_idx.reshape(-1), index.in_idx.reshape(-1), x_rows, dy_rows)
    return parts if num_splits == 1 else parts.reshape(num_splits, num_entries, rows).sum(axis=0)
