"""What the products read beyond a layout: `KernelIndex`, made when the layout changes and never in a training step.

Everything here is a function of the three index arrays alone. What depends on geometry, image or batch size is
arithmetic inside of a call. An entry that is None is derived in the call by the same function: slower, never wrong.

A worked example: two groups of R = 2 rows, blocks of C = 2 columns out of 4.

    out_idx     [[2, 0], [1, 3]]                 row_place    [1, 2, 0, 3]     row 2 is the first in the order of groups
    in_idx      [[3, 1], [0, 2], [1, 2]]         block_group  [0, 0, 1]
    group_start [0, 2, 3]

    panel column k    0  1  2  3  4  5           inverse.first  [0, 1, 3, 5, 6]           column 1 is read by two panel
    reads column      3  1  0  2  1  2           inverse.rank   [[5, 1], [0, 3], [2, 4]]  columns, numbers 1 and 2
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.interface import Index

PIECE_COLUMNS = 256  # of one product on a CPU; fewer pay more for dispatch, more waste work on masked ones
CHUNK_COLUMNS = (32, 64, 128)  # panel columns of a program of the GPU's weight gradient


class Pieces(NamedTuple):
    """The panels cut into pieces of some blocks each, for a CPU. Used pieces come first.

    Attributes:
      group: int32[num_pieces].
      blocks: int32[num_pieces, piece]; -1 where a piece has fewer.
      place: int32[num_blocks], where each block is in `blocks`, flattened.
    """

    group: jax.Array
    blocks: jax.Array
    place: jax.Array


class Inverse(NamedTuple):
    """The panel columns (num_blocks * C of them) in the order of the input columns that they read.

    Attributes:
      first: [in + 1]; those that read column j have the numbers `first[j]:first[j + 1]`.
      rank: [num_blocks, C], the number of each; equal columns keep their order, so sums have one order, too.
    """

    first: jax.Array
    rank: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelIndex:
    """Derived arrays of one layer, or of a stack of equal ones; each is None if nobody asked for it.

    Numbers take 2 bytes where they fit (uint16), else 4 (int32; so do the pieces): the index is a part of what a sparse
    layer costs. Whoever replaces a layout replaces this, too (`dsb.with_index`), or sets it to None.

    Attributes:
      row_place: [num_groups * R], where each row is in the order of the groups.
      block_group: [num_blocks], the row group of each block.
      pieces: for a CPU.
      inverse: for the input gradient on a GPU.
      chunks: for the weight gradient on a GPU, one for each of `CHUNK_COLUMNS`; see `cut_panels`.
    """

    row_place: jax.Array | None = None
    block_group: jax.Array | None = None
    pieces: Pieces | None = None
    inverse: Inverse | None = None
    chunks: tuple[jax.Array, ...] | None = None

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of those that are there."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)


_ALL = ("row_place", "block_group")  # for the dense product, which every device has
_ENTRIES = {"cpu": (*_ALL, "pieces"), "gpu": (*_ALL, "inverse", "chunks")}


def entries_for(backend: str) -> tuple[str, ...]:
    """The entries that the implementations for a backend of jax read."""
    return _ENTRIES.get(backend, _ALL)


def derive(index: Index, in_features: int, entries: Sequence[str]) -> KernelIndex:
    """The entries of those names, anew from the three index arrays of one layer."""
    bare = index._replace(derived=None)
    makers: dict[str, Callable[[], Any]] = {
        "row_place": lambda: row_place(bare),
        "block_group": lambda: block_group(bare),
        "pieces": lambda: pieces(bare),
        "inverse": lambda: inverse(bare, in_features),
        "chunks": lambda: tuple(chunks(bare, columns) for columns in CHUNK_COLUMNS),
    }
    return KernelIndex(**{name: makers[name]() for name in entries})


def row_place(index: Index) -> jax.Array:
    """`KernelIndex.row_place`, derived if it is not there; likewise the following."""
    if index.derived is not None and index.derived.row_place is not None:
        return index.derived.row_place
    with jax.named_scope("kernel_index"):
        return row_places(index.out_idx).astype(narrow_dtype(index.out_idx.size))


def block_group(index: Index) -> jax.Array:
    if index.derived is not None and index.derived.block_group is not None:
        return index.derived.block_group
    with jax.named_scope("kernel_index"):
        num_blocks, num_groups = index.in_idx.shape[0], index.out_idx.shape[0]
        return groups_of_blocks(index.group_start, num_blocks).astype(narrow_dtype(num_groups))


def pieces(index: Index) -> Pieces:
    if index.derived is not None and index.derived.pieces is not None:
        return index.derived.pieces
    with jax.named_scope("kernel_index"):
        return cut_pieces(index)


def inverse(index: Index, in_features: int) -> Inverse:
    if index.derived is not None and index.derived.inverse is not None:
        return index.derived.inverse
    with jax.named_scope("kernel_index"):
        return invert(index.in_idx, in_features)


def chunks(index: Index, columns: int) -> jax.Array:
    if index.derived is not None and index.derived.chunks is not None and columns in CHUNK_COLUMNS:
        return index.derived.chunks[CHUNK_COLUMNS.index(columns)]
    with jax.named_scope("kernel_index"):
        return cut_panels(index.group_start, index.in_idx.size, index.in_idx.shape[1], columns)


def row_places(out_idx: jax.Array) -> jax.Array:
    """Where each row is in the order of the groups, int32[num_groups * R]: the inverse permutation of `out_idx`."""
    order = jnp.arange(out_idx.size, dtype=jnp.int32)
    return jnp.zeros(out_idx.size, jnp.int32).at[out_idx.reshape(-1)].set(order)


def groups_of_blocks(group_start: jax.Array, num_blocks: int) -> jax.Array:
    """The group of each block, int32[num_blocks], from where the groups begin."""
    if num_blocks * group_start.shape[0] > 2**22:  # of single weights; comparing each with all takes too long there
        groups = jnp.arange(group_start.shape[0] - 1, dtype=jnp.int32)
        return jnp.repeat(groups, jnp.diff(group_start), total_repeat_length=num_blocks)
    ids = jnp.arange(num_blocks, dtype=jnp.int32)
    return jnp.searchsorted(group_start, ids, side="right", method="compare_all").astype(jnp.int32) - 1


class _Cut(NamedTuple):
    """Every panel cut into parts of at most some width; parts never straddle two groups, and used ones come first.

    Attributes:
      group: int32[most].
      begin, end: int32[most]; equal where a part is not used.
      first: int32[num_groups], the number of each group's first part.
    """

    group: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array


def _cut(starts: jax.Array, width: int, most: int) -> _Cut:
    """Cuts panels that begin at starts[num_groups + 1], in the units of `width`."""
    counts = -(-jnp.diff(starts) // width)
    ends = jnp.cumsum(counts)
    first = ends - counts
    ids = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(ends, ids, side="right", method="compare_all").astype(jnp.int32)
    used, group = group < counts.size, jnp.minimum(group, counts.size - 1)
    begin = starts[group] + (ids - first[group]) * width
    return _Cut(group, begin, jnp.where(used, jnp.minimum(begin + width, starts[group + 1]), begin), first)


def cut_pieces(index: Index) -> Pieces:
    """The panels in pieces of some `PIECE_COLUMNS` columns, a whole number of blocks.

    With 3, 0 and 2 blocks in three groups and two blocks a piece: groups 0, 0, 2; blocks [0, 1], [2, -1], [3, 4].
    """
    (num_blocks, columns), num_groups = index.in_idx.shape, index.group_start.shape[0] - 1
    group_start = jnp.asarray(index.group_start)
    mean = num_blocks / num_groups
    piece = max(1, math.ceil(mean / max(1, round(mean * columns / PIECE_COLUMNS))))
    cut = _cut(group_start, piece, (num_blocks + num_groups * (piece - 1)) // piece)
    block = cut.begin[:, None] + jnp.arange(piece, dtype=jnp.int32)[None]
    of = groups_of_blocks(group_start, num_blocks)
    place = cut.first[of] * piece + jnp.arange(num_blocks, dtype=jnp.int32) - group_start[of]
    blocks = jnp.where(block < cut.end[:, None], block, -1)
    return Pieces(cut.group, blocks.astype(jnp.int32), place.astype(jnp.int32))


def invert(in_idx: jax.Array, in_features: int) -> Inverse:
    """`Inverse` of in_idx[num_blocks, C]; see the module docstring for an example."""
    columns = jnp.asarray(in_idx).reshape(-1)
    dtype = narrow_dtype(columns.size)
    order = jnp.argsort(columns, stable=True)
    rank = jnp.zeros(columns.size, dtype).at[order].set(jnp.arange(columns.size, dtype=dtype), unique_indices=True)
    counts = jnp.zeros(in_features, jnp.int32).at[columns].add(1)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return Inverse(first.astype(dtype), rank.reshape(in_idx.shape))


def cut_panels(group_start: jax.Array, num_entries: int, cols: int, columns: int) -> jax.Array:
    """Every panel cut into chunks of at most `columns` of its columns: [most, 3] of (group, begin, end).

    Chunks never straddle two groups, so their number depends on the topology; there is room for the most there can be,
    and the last ones may be empty (`end == begin`). Panels of 6, 0 and 3 columns in chunks of 4: (0, 0, 4), (0, 4, 6),
    (2, 6, 9), and two empty ones.
    """
    most = min(num_entries, num_entries // columns + group_start.shape[0] - 1)
    cut = _cut(jnp.asarray(group_start) * cols, columns, most)
    return jnp.stack(cut[:3], axis=1).astype(narrow_dtype(num_entries))


def narrow_dtype(largest: int) -> type:
    """The dtype of numbers from 0 to `largest`: 2 bytes where they serve."""
    return np.uint16 if largest < 2**16 else np.int32
