"""The shuffled-block layout: which weights of a matrix exist, as a pytree of integers.

Jiang, Hu, Song, "Exposing and Exploiting Fine-Grained Block Structures for Fast and Accurate Sparse
Training", NeurIPS 2022. The rows of `W[out, in]` are permuted and cut into row groups of R rows; a block
belongs to one row group and owns C input columns of its own, in any order. All blocks of a group share its
rows, so together they are one dense *panel*: R rows that read the same list of columns.

A worked 4x4 example with 2x2 blocks and two groups, of which the first holds two blocks:

    out_idx     = [[2, 0], [1, 3]]        group 0 holds rows 2 and 0, group 1 holds rows 1 and 3
    in_idx      = [[3, 1], [0, 2], [1, 2]]
    group_start = [0, 2, 3]               blocks 0 and 1 belong to group 0, block 2 to group 1

    to_mask:    column  0  1  2  3
       row 0           [1  1  1  1]       group 0: columns 3, 1, 0, 2
       row 1           [0  1  1  0]       group 1: columns 1, 2
       row 2           [1  1  1  1]       group 0
       row 3           [0  1  1  0]       group 1

    blocks[1, 0, 0] is W[out_idx[0][0], in_idx[1][0]] = W[2, 0].

Sizes that the block shape does not divide: `in` needs no padding, because a group may leave columns unused
(at most `in // C` blocks a group). If R does not divide `out`, row indices `out .. num_groups * R - 1` are
*phantom* rows: all of them lie in the last group, whose number of blocks is fixed (`ragged_blocks`), so
that the number of real weights is a constant of the layer, whatever the topology. Phantom weights are zero.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.interface import Index
from pallas_kernels.kernel_index import groups_of_blocks, narrow_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Shuffled-block sparsity pattern of one `[out, in]` matrix. See the module docstring for an example.

    Attributes:
      out_idx: int32[num_groups, R], the rows of each group; together a permutation of `range(num_groups * R)`.
      in_idx: uint16[num_blocks, C] (int32 if in > 65536; int32 always serves), the input columns of each block;
        distinct within a group.
      group_start: int32[num_groups + 1]; the blocks of group g are `group_start[g]:group_start[g + 1]`.
      shape: `(out, in)`, static.
      block_shape: `(R, C)`, static.
    """

    out_idx: jax.Array
    in_idx: jax.Array
    group_start: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def num_blocks(self) -> int:
        """Blocks of one layer: stacked layouts (`jax.vmap`, `nn.scan`) have further axes in front."""
        return self.in_idx.shape[-2]

    @property
    def num_groups(self) -> int:
        """Row groups of one layer."""
        return self.out_idx.shape[-2]

    @property
    def num_active(self) -> int:
        """Number of real (not phantom) weights: a static integer, the same before and after adapting."""
        return num_active(self.shape, self.block_shape, self.num_blocks)

    @property
    def index(self) -> Index:
        """As array-level implementations take it, with nothing derived."""
        return Index(self.out_idx, self.in_idx, self.group_start)

    @property
    def density(self) -> float:
        return self.num_active / (self.shape[0] * self.shape[1])


def column_dtype(num_columns: int) -> Any:
    """The dtype that column indices are stored in: 2 bytes where they serve, for they are most of a layout's bytes."""
    return narrow_dtype(num_columns - 1)


def count_groups(out: int, rows_per_group: int) -> int:
    """Number of row groups, the last of them ragged if R does not divide `out`."""
    return -(-out // rows_per_group)


def max_blocks(shape: tuple[int, int], block_shape: tuple[int, int]) -> int:
    """The most blocks that fit: `in // C` in each group."""
    return count_groups(shape[0], block_shape[0]) * (shape[1] // block_shape[1])


def ragged_blocks(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int) -> int | None:
    """The fixed number of blocks in the last group if R does not divide `out`, else None."""
    if shape[0] % block_shape[0] == 0:
        return None
    return round(num_blocks / count_groups(shape[0], block_shape[0]))


def num_active(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int) -> int:
    """Number of real weights that `num_blocks` blocks hold, phantom rows left out."""
    rows, cols = block_shape
    stored = num_blocks * rows * cols
    ragged = ragged_blocks(shape, block_shape, num_blocks)
    if ragged is None:
        return stored
    return stored - ragged * cols * (rows - shape[0] % rows)


def block_group(layout: BlockLayout) -> Int[Array, "num_blocks"]:
    """The group of each block."""
    return groups_of_blocks(layout.group_start, layout.num_blocks)


def block_rows(layout: BlockLayout) -> Int[Array, "num_blocks R"]:
    """The output rows of each block; phantom rows are `>= out`."""
    return jnp.asarray(layout.out_idx)[block_group(layout)]  # a layout from a file or `device_get` holds numpy arrays


def _positions(layout: BlockLayout) -> tuple[jax.Array, jax.Array]:
    return block_rows(layout)[:, :, None], layout.in_idx[:, None, :]


def pack(dense: Float[Array, "out in"], layout: BlockLayout) -> Float[Array, "num_blocks R C"]:
    """Reads the active positions of a dense matrix. Phantom rows read zero."""
    return dense.at[_positions(layout)].get(mode="fill", fill_value=0)


def unpack(blocks: Float[Array, "num_blocks R C"], layout: BlockLayout, *, fill: float = 0.0) -> Float[Array, "out in"]:
    """Writes blocks into a dense matrix that is `fill` elsewhere. `pack(unpack(b, l), l) == b` on real rows."""
    return jnp.full(layout.shape, fill, blocks.dtype).at[_positions(layout)].set(blocks, mode="drop")


def to_mask(layout: BlockLayout) -> Bool[Array, "out in"]:
    """True where a weight exists."""
    ones = jnp.ones((layout.num_blocks, *layout.block_shape), jnp.bool_)
    return jnp.zeros(layout.shape, jnp.bool_).at[_positions(layout)].set(ones, mode="drop")


def real_rows(layout: BlockLayout) -> Bool[Array, "num_blocks R 1"]:
    """False at the stored weights of phantom rows."""
    return (block_rows(layout) < layout.shape[0])[:, :, None]


def random_layout(
    key: jax.Array,
    shape: tuple[int, int],
    *,
    block_shape: tuple[int, int],
    num_blocks: int,
    channels: int | None = None,
) -> BlockLayout:
    """A random layout with blocks spread evenly over the groups (counts differ by one at the most).

    Args:
      key: a PRNG key.
      shape: `(out, in)`.
      block_shape: `(R, C)`.
      num_blocks: exactly that many.
      channels: None draws the columns of each group alone. With a number, columns are dealt: over all groups each
        channel, and each column, is read as often as any other, give or take one or two. It is the number of input
        channels of a convolution, whose columns are in the order (window, channel), or `in` of a linear layer.

    Raises:
      ValueError: if the block is larger than the matrix, `num_blocks` does not fit, or channels do not divide `in`.
    """
    check_sizes(shape, block_shape, num_blocks)
    if channels is not None and (channels < 1 or shape[1] % channels):
        raise ValueError(
            f"channels={channels} does not divide the {shape[1]} columns; give those of the layer's input."
        )
    (out, in_), (rows, cols) = shape, block_shape
    groups = count_groups(out, rows)
    ragged = ragged_blocks(shape, block_shape, num_blocks)
    full = groups if ragged is None else groups - 1
    spread = num_blocks - (ragged or 0)
    # All bits in one draw, and orders by sorting them: a draw takes long to compile, a sort does not.
    bits = jax.random.bits(key, (out + full + groups * in_,), jnp.uint32)
    phantom = jnp.arange(out, groups * rows, dtype=jnp.int32)
    out_idx = jnp.concatenate([_order(bits[:out]), phantom])
    # Which groups get one block more than the others is random too.
    counts = spread // max(full, 1) + (_order(bits[out : out + full]) < spread % max(full, 1)).astype(jnp.int32)
    if ragged is not None:
        counts = jnp.concatenate([counts, jnp.array([ragged], counts.dtype)])
    group_start = jnp.concatenate([jnp.zeros(1, counts.dtype), jnp.cumsum(counts, dtype=counts.dtype)]).astype(
        jnp.int32
    )
    # Row g of `orders` is a permutation of the columns; block s of the group takes its s-th run of C.
    bits = bits[out + full :].reshape(groups, in_)
    orders = _order(bits) if channels is None else _deal(bits, counts * cols, channels)
    orders = orders[:, : in_ // cols * cols].reshape(groups, in_ // cols, cols)
    ids = jnp.arange(num_blocks, dtype=jnp.int32)
    group = groups_of_blocks(group_start, num_blocks)
    in_idx = orders[group, ids - group_start[group]].astype(column_dtype(in_))
    return BlockLayout(out_idx.reshape(groups, rows), in_idx, group_start, (out, in_), (rows, cols))


def _order(bits: Int[Array, "... n"]) -> Int[Array, "... n"]:
    """Random bits -> random permutations of the last axis, int32."""
    positions = lax.broadcasted_iota(jnp.int32, bits.shape, bits.ndim - 1)
    return lax.sort((bits, positions), num_keys=1)[1]


def _deal(
    bits: Int[Array, "num_groups in"], wanted: Int[Array, "num_groups"], channels: int
) -> Int[Array, "num_groups in"]:
    """Orders of the columns, one for each group, of which group g reads the first `wanted[g]`.

    Group by group, the columns that were read least so far come first. The i-th column of a channel in the order of a
    group counts as if the channel had been read i times more, so that a group does not take all of one channel.
    """

    def deal(used: Int[Array, "window channels"], group: tuple[Array, Array]) -> tuple[Array, Array]:
        bits, wanted = group
        # The place of each column among those of its channel, by comparing all pairs: sorting takes longer to compile.
        (mine, others), (my_bits, other_bits) = ((a[:, None], a[None]) for a in (used, bits.reshape(used.shape)))
        place = ((mine > others) | ((mine == others) & (my_bits > other_bits))).sum(axis=1, dtype=jnp.int32)
        reads = (used.sum(axis=0, keepdims=True, dtype=jnp.int32) + place).reshape(-1)
        positions = jnp.arange(bits.size, dtype=jnp.int32)
        order = lax.sort((reads, bits, positions), num_keys=2)[2]
        now = used.reshape(-1).at[order].add((positions < wanted).astype(jnp.int32))
        return now.reshape(used.shape), order

    used = jnp.zeros((bits.shape[1] // channels, channels), jnp.int32)
    return lax.scan(deal, used, (bits, wanted))[1]


def layout_of_positions(active: Bool[Array, "out in"], count: int) -> BlockLayout:
    """The layout of 1x1 blocks at the `count` True positions: values and indices, a compressed sparse row matrix.

    `count` is static, and must be the number of True values.
    """
    out, in_ = active.shape
    flat = jnp.nonzero(active.reshape(-1), size=count, fill_value=0)[0]  # in the order of rows
    ends = jnp.cumsum(active.sum(axis=1, dtype=jnp.int32))
    return BlockLayout(
        jnp.arange(out, dtype=jnp.int32)[:, None],
        (flat % in_).astype(column_dtype(in_))[:, None],
        jnp.concatenate([jnp.zeros(1, jnp.int32), ends]).astype(jnp.int32),
        (out, in_),
        (1, 1),
    )


def check_sizes(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int) -> None:
    """Raises ValueError unless `num_blocks` blocks of `block_shape` fit a matrix of `shape`."""
    (out, in_), (rows, cols) = shape, block_shape
    for name, value in (("block_shape", rows), ("block_shape", cols), ("num_blocks", num_blocks)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise ValueError(f"{name} holds {value!r}, which is not a whole number; give integers.")
    if rows < 1 or cols < 1:
        raise ValueError(f"block_shape={rows}x{cols} has a side below 1; give positive sizes such as 16x16.")
    if rows > out or cols > in_:
        raise ValueError(
            f"block_shape={rows}x{cols} is larger than the {out}x{in_} (out x in) matrix; use a smaller block "
            "or keep this layer dense."
        )
    most = max_blocks(shape, block_shape)
    if not 1 <= num_blocks <= most:
        raise ValueError(
            f"num_blocks={num_blocks} does not fit a {out}x{in_} matrix of {rows}x{cols} blocks; give 1 to {most}."
        )


def check_arrays(layout: BlockLayout) -> None:
    """Checks shapes and dtypes, which are known while a function is traced, too.

    Raises:
      ValueError: with the first array that does not belong to a matrix of the layout's shape.
    """
    (out, in_), (rows, cols) = layout.shape, layout.block_shape
    groups = count_groups(out, rows)
    for name, array, shape, dtypes in (
        ("out_idx", layout.out_idx, (groups, rows), (np.int32,)),
        (
            "in_idx",
            layout.in_idx,
            (layout.in_idx.shape[0] if layout.in_idx.ndim else 0, cols),
            (column_dtype(in_), np.int32),
        ),
        ("group_start", layout.group_start, (groups + 1,), (np.int32,)),
    ):
        if array.shape != shape or array.dtype not in dtypes:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtypes[0])}{list(shape)} for a "
                f"{out}x{in_} matrix of {rows}x{cols} blocks; the layout does not belong to this layer."
            )


def validate(layout: BlockLayout) -> None:
    """Checks a concrete layout on the host, before any of its indices is used.

    Raises:
      ValueError: with the first broken rule: shapes, dtypes, a permutation, ranges, order, distinct columns.
    """
    (out, in_), (rows, cols) = layout.shape, layout.block_shape
    out_idx, in_idx, start = (np.asarray(x) for x in (layout.out_idx, layout.in_idx, layout.group_start))
    check_sizes((out, in_), (rows, cols), 1)
    check_arrays(layout)
    groups, num_blocks = count_groups(out, rows), in_idx.shape[0]
    check_sizes((out, in_), (rows, cols), num_blocks)
    if not np.array_equal(np.sort(out_idx, axis=None), np.arange(groups * rows)):
        raise ValueError(f"out_idx is not a permutation of 0..{groups * rows - 1}; the layout is damaged.")
    if in_idx.min() < 0 or in_idx.max() >= in_:
        bad = in_idx[(in_idx < 0) | (in_idx >= in_)][0]
        raise ValueError(f"in_idx holds {bad}, outside 0..{in_ - 1}; the layout is damaged.")
    counts = np.diff(start)
    if start[0] != 0 or start[-1] != num_blocks or counts.min() < 0 or counts.max() > in_ // cols:
        raise ValueError(
            f"group_start={start.tolist()} does not cut {num_blocks} blocks into {groups} groups of at most "
            f"{in_ // cols}; the layout is damaged."
        )
    ragged = ragged_blocks((out, in_), (rows, cols), num_blocks)
    if ragged is not None and (
        counts[-1] != ragged or out_idx[-1].max() < groups * rows - 1 or (out_idx[:-1] >= out).any()
    ):
        raise ValueError(f"the last group must hold the phantom rows and {ragged} blocks, not {counts[-1]}.")
    group = np.repeat(np.arange(groups), counts)
    cells = np.sort(group[:, None].astype(np.int64) * in_ + in_idx, axis=None)
    if (cells[1:] == cells[:-1]).any():  # np.unique, which hashes, takes ten times as long
        raise ValueError("in_idx repeats a column within a row group; the layout is damaged.")
