"""Re-blocking: from a score for every position to the shuffled-block layout that keeps the most of it.

Jiang, Hu, Song, NeurIPS 2022 ("shuffled blocking"): group rows with similar patterns, order each group's columns
by their score, cut them into blocks, keep the best. The layout L maximises, approximately,

    retained(L) = sum(score * to_mask(L)) / sum(score).

The paper's public code groups rows by complete-linkage clustering on the host. Here, in static shapes and
`num_groups` sequential steps and a few more, whatever the data:

1. *Pattern*: the `num_active` best positions of the score. It is what an unstructured layer would keep; a score
   that is positive everywhere has no other pattern, and weighing rows by the score itself did worse.
2. *Seed and gather*, one step for each group: take the fullest free row, then the free rows most similar (cosine)
   to the sum of the group, of which the group holds 1, 2, 4 .. R while it forms, and once more when it is full.
3. *Swap*: fix the columns that each group keeps. Then a row adds to a group its score on that group's columns,
   whichever rows are its neighbours, so exchanging two rows changes the total by a known sum, and groups that are
   each other's best partner exchange at the same time. Choosing the columns anew and exchanging again never loses.
4. *Cut*: `cut_columns`, exactly `num_blocks` blocks, over the whole layer.

Deviations from the paper: groups are always balanced, the previous grouping can compete with the new one, and
`min_group_blocks` can keep row groups from starving.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsb_jax.layout import (
    BlockLayout,
    check_sizes,
    column_dtype,
    count_groups,
    num_active,
    ragged_blocks,
)
from dsb_jax.select import select_largest
from pallas_kernels.kernel_index import groups_of_blocks

# Measured on recorded, planted and random scores: doubling both changed no retained score by 0.001.
_SWAP_ROUNDS = 4
_SWAPS_PER_ROUND = 8
# The similarities of all pairs of rows are kept while they are no larger than this many score matrices.
_MAX_PAIRS_PER_ENTRY = 4
# A new grouping must retain more than the previous one by more than rounding, as a share of the total.
_ROUNDING = 1e-6


def reblock(
    score: Float[Array | np.ndarray, "out in"],
    *,
    block_shape: tuple[int, int],
    num_blocks: int,
    previous: BlockLayout | None = None,
    min_group_blocks: int = 0,
) -> BlockLayout:
    """The layout of `num_blocks` blocks that retains as much of a score as we can find.

    Args:
      score: how much each position is worth, >= 0, in any unit; negative and NaN count as 0. A traced or concrete
        array; called on a concrete one it is compiled once for its shape.
      block_shape: `(R, C)`.
      num_blocks: exactly that many, always.
      previous: a layout of the same sizes; its row groups are kept unless the new ones retain more.
      min_group_blocks: every row group keeps at least that many blocks, so that no output dies.

    Returns:
      A layout that passes `layout.validate`. Rows ascend within a group, scores of columns descend.

    Raises:
      ValueError: if the blocks do not fit the matrix, `min_group_blocks` cannot be met, or `previous` belongs to
        another layer.
    """
    shape, block_shape = (score.shape[0], score.shape[1]), (block_shape[0], block_shape[1])
    _check(shape, block_shape, num_blocks, min_group_blocks)
    if previous is not None and (previous.shape, previous.block_shape) != (shape, block_shape):
        raise ValueError(
            f"previous is a layout of {previous.shape} in {previous.block_shape} blocks, but the score is {shape} in "
            f"{block_shape} blocks; pass the layout of this layer, or None."
        )
    previous_out_idx = None if previous is None else previous.out_idx
    return _reblock(jnp.asarray(score), previous_out_idx, block_shape, num_blocks, min_group_blocks)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _reblock(
    score: Float[Array, "out in"],
    previous_out_idx: Int[Array, "num_groups R"] | None,
    block_shape: tuple[int, int],
    num_blocks: int,
    min_group_blocks: int,
) -> BlockLayout:
    shape = (score.shape[0], score.shape[1])
    score = jnp.where(score > 0, score, 0).astype(jnp.float32)
    phantoms = count_groups(shape[0], block_shape[0]) * block_shape[0] - shape[0]
    padded = jnp.concatenate([score, jnp.zeros((phantoms, shape[1]), jnp.float32)]) if phantoms else score

    def cut(out_idx: Int[Array, "num_groups R"]) -> tuple[BlockLayout, Float[Array, ""]]:
        columns = padded[out_idx].sum(axis=1)
        return _cut(columns, out_idx, shape, block_shape, num_blocks, min_group_blocks)

    grouped = _swap_rows(padded, _group_rows(score, block_shape, num_blocks), shape, block_shape, num_blocks)
    if previous_out_idx is None:
        return cut(grouped)[0]
    both, worth = jax.lax.map(cut, jnp.stack([previous_out_idx, grouped]))  # the cut is compiled once
    better = worth[1] > worth[0] + _ROUNDING * score.sum()
    return jax.tree.map(lambda each: each[better.astype(jnp.int32)], both)


def _group_rows(
    score: Float[Array, "out in"], block_shape: tuple[int, int], num_blocks: int
) -> Int[Array, "num_groups R"]:
    """Balanced groups of rows with similar patterns. Phantom rows, if any, end the last group."""
    (out, in_), rows = score.shape, block_shape[0]
    groups, last = count_groups(out, rows), out % rows
    pattern = select_largest(score, num_active((out, in_), block_shape, num_blocks), where=score > 0)
    pattern = pattern.astype(jnp.float32)
    size = pattern.sum(axis=1)  # positions in the pattern of each row
    unit = pattern * jnp.where(size > 0, jax.lax.rsqrt(jnp.maximum(size, 1.0)), 0)[:, None]
    empty = (size == 0).astype(jnp.float32)
    pairs = jnp.matmul(unit, unit.T, precision="highest") if out <= _MAX_PAIRS_PER_ENTRY * in_ else None

    def similarity(members: Int[Array, "n"], weight: Float[Array, "n"]) -> Float[Array, "out"]:
        """To the sum of the members, each of which counts by its weight."""
        if pairs is not None:
            cosines = (weight[:, None] * pairs[members]).sum(axis=0)
        else:
            cosines = jnp.matmul(unit, (weight[:, None] * unit[members]).sum(axis=0), precision="highest")
        return cosines + empty * (weight * empty[members]).sum()  # empty rows are alike, though their cosine is 0

    def gather(seed: Int[Array, ""], free: Array, count: int) -> Int[Array, "count"]:
        """`count` free rows like the seed: the group doubles until it is full, then is chosen once more."""

        def fill(i: Int[Array, ""], members: Int[Array, "count"]) -> Int[Array, "count"]:
            held = jnp.arange(count, dtype=jnp.int32) < jax.lax.shift_left(jnp.int32(1), jnp.int32(i))
            like = similarity(members, held.astype(jnp.float32))
            return jax.lax.top_k(jnp.where(free, like, -jnp.inf), count)[1].astype(jnp.int32)

        doublings = (count - 1).bit_length()
        return jax.lax.fori_loop(0, doublings + 1, fill, jnp.full(count, seed, jnp.int32))

    free = jnp.ones(out, jnp.bool_)
    if last:
        # The ragged group is chosen first: a full group would fill itself up with rows of it.
        seed = jnp.argmax(_ragged_fit(similarity, size, (out, in_), block_shape, num_blocks))
        members = gather(seed, free, last)
        free = free.at[members].set(False)
        phantom = jnp.arange(out, groups * rows, dtype=jnp.int32)
        ragged = jnp.concatenate([members, phantom])

    def add_group(g: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        free, out_idx = state
        members = gather(jnp.argmax(jnp.where(free, size, -1)), free, rows)
        return free.at[members].set(False), out_idx.at[g].set(members)

    full = groups - 1 if last else groups
    _, out_idx = jax.lax.fori_loop(0, full, add_group, (free, jnp.zeros((full, rows), jnp.int32)))
    return jnp.concatenate([out_idx, ragged[None]]) if last else out_idx


def _ragged_fit(
    similarity: Callable[[Int[Array, "n"], Float[Array, "n"]], Float[Array, "out"]],
    size: Float[Array, "out"],
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    num_blocks: int,
) -> Float[Array, "out"]:
    """How well each row would seed the ragged group of `out % R` rows.

    Such a row is like `out % R - 1` others and unlike any more, has as many positions as the group's fixed blocks
    hold, and, where whole groups share a pattern with it, `out % R` is what is left of the rows of that pattern.
    """
    (out, in_), (rows, cols) = shape, block_shape
    last, ragged = out % rows, ragged_blocks(shape, block_shape, num_blocks) or 0

    def fit(row: Int[Array, ""]) -> Float[Array, ""]:
        like = similarity(row[None], jnp.ones(1, jnp.float32))
        near, _ = jax.lax.top_k(like, rows)
        gap = near[:last].mean() - near[last:].mean()
        left_over = jnp.sum(like > 1 - 1e-5) % rows == last
        return gap - jnp.abs(size[row] - ragged * cols) / in_ + 1e-3 * left_over.astype(jnp.float32)

    return jax.lax.map(fit, jnp.arange(out), batch_size=min(out, 256))


def _swap_rows(
    score: Float[Array, "rows in"],
    out_idx: Int[Array, "num_groups R"],
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    num_blocks: int,
) -> Int[Array, "num_groups R"]:
    """Exchanges rows between groups while that raises the score on the groups' columns. Rows end up ascending.

    The columns are those of the best `num_blocks * C` (group, column) pairs: blocks cut to single columns, which
    needs no sort. One round of exchanges, with `worth[i, g]` = score of row i on the columns of group g:

        gain from i of g going to h:    worth[i, h] - worth[i, g], best over the rows of g:  leave[g, h]
        gain from g and h exchanging:   leave[g, h] + leave[h, g]
    """
    ids = jnp.arange(out_idx.shape[0])
    ragged = ragged_blocks(shape, block_shape, num_blocks)
    tiny = _ROUNDING * score.sum() / shape[0]

    def exchange(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out_idx, worth = carry
        there = worth[out_idx]  # [num_groups, R, num_groups]
        here = jnp.take_along_axis(there, ids[:, None, None], axis=2)
        move = jnp.where((out_idx < shape[0])[:, :, None], there - here, -jnp.inf)
        who, leave = jnp.argmax(move, axis=1), jnp.max(move, axis=1)
        gain = jnp.where(ids[:, None] == ids[None], -jnp.inf, leave + leave.T)
        partner = jnp.argmax(gain, axis=1)
        agreed = (partner[partner] == ids) & (gain[ids, partner] > tiny)
        mine, theirs = who[ids, partner], out_idx[partner, who[partner, ids]]
        return out_idx.at[ids, mine].set(jnp.where(agreed, theirs, out_idx[ids, mine])), worth

    def improve(_: Array, out_idx: Int[Array, "num_groups R"]) -> Int[Array, "num_groups R"]:
        columns = score[out_idx].sum(axis=1)
        if ragged is None:
            chosen = select_largest(columns, num_blocks * block_shape[1], where=columns > 0)
        else:
            is_last = ids[:, None] == ids[-1]
            chosen = select_largest(columns, (num_blocks - ragged) * block_shape[1], where=~is_last)
            chosen |= select_largest(columns, ragged * block_shape[1], where=is_last)
        worth = jnp.matmul(score, chosen.astype(jnp.float32).T, precision="highest")
        return jax.lax.fori_loop(0, _SWAPS_PER_ROUND, exchange, (out_idx, worth))[0]

    return jnp.sort(jax.lax.fori_loop(0, _SWAP_ROUNDS, improve, out_idx), axis=1)


def cut_columns(
    column_score: Float[Array | np.ndarray, "num_groups in"],
    out_idx: Int[Array | np.ndarray, "num_groups R"],
    *,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    num_blocks: int,
    min_group_blocks: int = 0,
) -> BlockLayout:
    """Orders each group's columns by their score, cuts them into blocks and keeps the best `num_blocks`.

    A block is worth the sum of its C column scores. Sums stay within a block, so scores of very different magnitude
    (1e6 for columns that must stay, 1e-6 for the others) order rightly among their own kind. Ties among columns go
    to the smaller index, ties among blocks to the block that stands earlier in its group, then to the earlier group:
    blocks worth nothing spread over the groups.

    Args:
      column_score: the worth of each (group, column), >= 0, in any unit; negative and NaN count as 0.
      out_idx: the row groups. If R does not divide `out`, the last one holds the phantom rows.
      shape: `(out, in)`.
      block_shape: `(R, C)`.
      num_blocks: exactly that many are kept, those of the ragged group (`layout.ragged_blocks`) included.
      min_group_blocks: every group keeps at least that many, its best.

    Raises:
      ValueError: if the blocks do not fit, `min_group_blocks` cannot be met, or the arrays are not of this shape.
    """
    shape, block_shape = (shape[0], shape[1]), (block_shape[0], block_shape[1])
    _check(shape, block_shape, num_blocks, min_group_blocks)
    groups = count_groups(shape[0], block_shape[0])
    if column_score.shape != (groups, shape[1]) or out_idx.shape != (groups, block_shape[0]):
        raise ValueError(
            f"column_score is {list(column_score.shape)} and out_idx {list(out_idx.shape)}; a {shape[0]}x{shape[1]} "
            f"matrix of {block_shape[0]}x{block_shape[1]} blocks needs {[groups, shape[1]]} and "
            f"{[groups, block_shape[0]]}."
        )
    layout, _ = _cut(jnp.asarray(column_score), jnp.asarray(out_idx), shape, block_shape, num_blocks, min_group_blocks)
    return layout


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _cut(
    column_score: Float[Array, "num_groups in"],
    out_idx: Int[Array, "num_groups R"],
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    num_blocks: int,
    min_group_blocks: int,
) -> tuple[BlockLayout, Float[Array, ""]]:
    """The layout, and the score that it retains."""
    groups, cols = out_idx.shape[0], block_shape[1]
    column_score = jnp.where(column_score > 0, column_score, 0).astype(jnp.float32)
    slots = min(shape[1] // cols, num_blocks)  # the most blocks that one group can keep
    best, order = jax.lax.top_k(column_score, slots * cols)
    worth = best.reshape(groups, slots, cols).sum(axis=2).T  # [slots, num_groups]: its flat order breaks ties
    granted = jnp.arange(slots)[:, None] < min_group_blocks
    ragged = ragged_blocks(shape, block_shape, num_blocks)
    contested = jnp.arange(groups) < (groups if ragged is None else groups - 1)
    kept = select_largest(jnp.where(granted, jnp.inf, worth), num_blocks - (ragged or 0), where=contested)
    # Within a group worth falls from slot to slot, so the kept blocks are the first ones: only their number matters.
    count = jnp.where(contested, jnp.sum(kept, axis=0, dtype=jnp.int32), ragged or 0)
    group_start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    ids = jnp.arange(num_blocks, dtype=jnp.int32)
    group = groups_of_blocks(group_start, num_blocks)
    order = order.reshape(groups, slots, cols).astype(jnp.int32)
    in_idx = order[group, ids - group_start[group]].astype(column_dtype(shape[1]))
    retained = jnp.where(jnp.arange(slots, dtype=jnp.int32)[:, None] < count[None], worth, 0).sum()
    return BlockLayout(jnp.asarray(out_idx, jnp.int32), in_idx, group_start, shape, block_shape), retained


def most_group_blocks(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int) -> int:
    """How many blocks every row group can have at the same time: the largest `min_group_blocks`."""
    groups, ragged = count_groups(shape[0], block_shape[0]), ragged_blocks(shape, block_shape, num_blocks)
    # The ragged group has a number of its own; the others share what is left.
    return num_blocks // groups if ragged is None else min(ragged, (num_blocks - ragged) // (groups - 1))


def _check(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int, min_group_blocks: int) -> None:
    check_sizes(shape, block_shape, num_blocks)
    most = most_group_blocks(shape, block_shape, num_blocks)
    if not 0 <= min_group_blocks <= most:
        raise ValueError(
            f"min_group_blocks={min_group_blocks} cannot be met: {num_blocks} blocks over "
            f"{count_groups(shape[0], block_shape[0])} row groups leave {most} for each; give 0 to {most} or more "
            "blocks."
        )
