"""Which positions to grow: exactly as many as were dropped, chosen by one of four criteria.

Each function returns a mask of `min(k, candidates)` True positions, all of them candidates; k is traced, so that
one compilation serves a schedule.

- `grow_norm`: the block-wise criterion of Jiang, Hu, Song, NeurIPS 2022. Since |dW[i, j]| <= |dY_i| * |X_j|, it
  grows, in whole blocks, where the outputs of largest |dY_i| meet the inputs of largest |X_j|. It needs no weight
  gradient at all.
- `grow_block_gradient`: whole columns of panels, by the norm of their exact gradient.
- `grow_gradient`: single positions, by their exact gradient (RigL, Evci et al. 2020).
- `grow_random`: whole columns of panels, or single positions (SET, Mocanu et al. 2018).

How `grow_norm` extends its rectangle, for a 4x8 matrix of 2x2 blocks, hence 2 by 4 blocks in order of rank. Block
row p joins at time p * in, block column q at time q * out, so that the rectangle keeps the proportions of the
matrix. A block is in when its row and its column are; its level is the later of the two in the order of joining:

    order of joining:   row 0   column 0   column 1   row 1   column 2   column 3
    at time                 0          0          4       8          8         12
    number                  0          1          2       3          4          5

    level:            q = 0  1  2  3
            p = 0       [ 1  2  4  5 ]      every level is one strip: part of a row, or of a column, of blocks
            p = 1       [ 3  3  4  5 ]

Whole levels are grown while they fit, then whole blocks of the next level, then positions of the next block.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.select import select_largest, take_largest
from pallas_kernels.kernel_index import row_places


def grow_norm(
    dy_norm: Float[Array | np.ndarray, "out"],
    x_norm: Float[Array | np.ndarray, "in"],
    k: Int[Array, ""] | int,
    *,
    candidate: Bool[Array | np.ndarray, "out in"],
    block_shape: tuple[int, int],
) -> Bool[Array, "out in"]:
    """Grows k positions in whole blocks where large output gradients meet large inputs.

    b = k / (R * C) blocks' worth of candidates is about sqrt(out * b / in) blocks of rows by sqrt(in * b / out)
    blocks of columns; the rectangle is extended strip by strip until k candidates lie inside.

    Args:
      dy_norm: norm of the gradient of each output over the batch, any unit.
      x_norm: norm of each input over the batch, any unit.
      k: how many to grow; may be traced.
      candidate: True where a position may be grown.
      block_shape: `(R, C)`; the last block of a side that it does not divide is smaller.
    """
    candidate = jnp.asarray(candidate)
    (out, in_), (rows, cols) = candidate.shape, block_shape
    row_joins, col_joins = _join_order((out, in_), block_shape)
    row_order, col_order = jnp.argsort(-dy_norm), jnp.argsort(-x_norm)
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, jnp.sum(candidate, dtype=jnp.int32))

    # Candidates in each block of the matrix in order of rank. Sides are filled up so that whole blocks can be cut.
    ranked = _pad_side(candidate[row_order], 0, rows).reshape(-1, rows, in_).sum(axis=1, dtype=jnp.int32)
    ranked = _pad_side(ranked[:, col_order], 1, cols).reshape(ranked.shape[0], -1, cols)
    in_block = ranked.sum(axis=2, dtype=jnp.int32)

    levels = np.maximum(row_joins[:, None], col_joins[None])
    # A level is the strip of the row or column of blocks that joined last; its blocks are numbered along the other.
    rows_of_blocks, columns_of_blocks = (np.arange(joins.size, dtype=np.int32) for joins in (row_joins, col_joins))
    along = np.where(row_joins[:, None] > col_joins[None], columns_of_blocks, rows_of_blocks[:, None])
    level, k_level = _cut(jnp.zeros(row_joins.size + col_joins.size, jnp.int32).at[levels].add(in_block), k)
    strip = jnp.where(levels == level, in_block, 0)
    block, k_block = _cut(jnp.zeros(max(in_block.shape), jnp.int32).at[along].add(strip), k_level)

    # Whole blocks, looked up by the rank of each row and column.
    whole = (levels < level) | ((levels == level) & (along < block))
    row_block = jnp.zeros(out, jnp.int32).at[row_order].set(jnp.arange(out, dtype=jnp.int32) // rows)
    col_block = jnp.zeros(in_, jnp.int32).at[col_order].set(jnp.arange(in_, dtype=jnp.int32) // cols)
    grown = candidate & whole[row_block][:, col_block]
    # The one block that is cut.
    last = jnp.argmax((levels == level) & (along == block))
    p, q = last // col_joins.size, last % col_joins.size
    row_ids = row_order.at[p * rows + jnp.arange(rows)].get(mode="fill", fill_value=out)
    col_ids = col_order.at[q * cols + jnp.arange(cols)].get(mode="fill", fill_value=in_)
    here = (row_ids[:, None], col_ids[None])
    inside = candidate.at[here].get(mode="fill", fill_value=False)
    rank = jnp.cumsum(inside.ravel(), dtype=jnp.int32).reshape(inside.shape)
    return grown.at[here].set(inside & (rank <= k_block), mode="drop")


def _join_order(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """When each row and each column of blocks joins the rectangle: their numbers in one common order.

    Row p joins at time p * in, column q at q * out; rows before columns at equal times. Static: shapes decide.
    """
    (out, in_), (rows, cols) = shape, block_shape
    num_rows, num_cols = -(-out // rows), -(-in_ // cols)
    times = np.concatenate([np.arange(num_rows, dtype=np.int64) * in_, np.arange(num_cols, dtype=np.int64) * out])
    order = np.empty(times.size, np.int32)
    order[np.argsort(times, kind="stable")] = np.arange(times.size)
    return order[:num_rows], order[num_rows:]


def _pad_side(array: Array, axis: int, multiple: int) -> Array:
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, padding)


def _cut(counts: Int[Array, "n"], k: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first bin at which the running count reaches k, and how many of that bin are needed.

    With counts 3, 0, 4 and k = 5 the answer is bin 2, of which 2. At least k must be there in all.
    """
    total = jnp.cumsum(counts, dtype=jnp.int32)
    bin_ = jnp.sum(total < k, dtype=jnp.int32)
    return bin_, k - (total[bin_] - counts[bin_])


def grow_block_gradient(
    panel_norm: Float[Array | np.ndarray, "num_groups in"],
    k: Int[Array, ""] | int,
    *,
    candidate: Bool[Array | np.ndarray, "out in"],
    out_idx: Int[Array | np.ndarray, "num_groups R"],
) -> Bool[Array, "out in"]:
    """Grows whole columns of panels, (row group, column) pairs, in order of decreasing norm.

    All candidates of a pair are grown together; the last pair is cut, in the order of the group's rows, to give
    exactly k. Ties go to the smaller (group, column). Pairs without a candidate cost nothing.

    Args:
      panel_norm: norm of the weight gradient over the R rows of each (group, column), any unit.
      k: how many positions to grow; may be traced.
      candidate: True where a position may be grown.
      out_idx: the row groups; phantom rows, `>= out`, grow nothing.
    """
    out, in_ = candidate.shape
    panels = jnp.asarray(candidate).at[out_idx].get(mode="fill", fill_value=False)  # [num_groups, R, in]
    taken = take_largest(panel_norm, k, weights=panels.sum(axis=1, dtype=jnp.int32))
    rank = jnp.cumsum(panels, axis=1, dtype=jnp.int32)
    grown = (panels & (rank <= taken[:, None])).reshape(-1, in_)
    return grown[row_places(jnp.asarray(out_idx))[:out]]


def grow_gradient(
    dense_gradient: Float[Array | np.ndarray, "out in"],
    k: Int[Array, ""] | int,
    *,
    candidate: Bool[Array | np.ndarray, "out in"],
) -> Bool[Array, "out in"]:
    """Grows the k candidates of largest |gradient|, ties by flat index, as RigL does."""
    return select_largest(jnp.abs(dense_gradient), k, where=candidate)


def grow_random(
    key: jax.Array,
    k: Int[Array, ""] | int,
    *,
    candidate: Bool[Array | np.ndarray, "out in"],
    out_idx: Int[Array | np.ndarray, "num_groups R"] | None = None,
    granularity: str = "column",
) -> Bool[Array, "out in"]:
    """Grows k candidates at random.

    Args:
      key: a PRNG key; the same key grows the same positions.
      k: how many to grow; may be traced.
      candidate: True where a position may be grown.
      out_idx: the row groups; needed by `granularity="column"` only.
      granularity: "column" grows whole columns of panels, the last one cut; "position" single positions, as SET does.

    Raises:
      ValueError: if `granularity` is neither, or `out_idx` is missing where it is needed.
    """
    if granularity == "position":
        return select_largest(jax.random.uniform(key, candidate.shape, jnp.float32), k, where=candidate)
    if granularity != "column":
        raise ValueError(f"granularity={granularity!r} is unknown; give 'column' or 'position'.")
    if out_idx is None:
        raise ValueError("granularity='column' needs the row groups: pass out_idx, or granularity='position'.")
    noise = jax.random.uniform(key, (out_idx.shape[0], candidate.shape[1]), jnp.float32)
    return grow_block_gradient(noise, k, candidate=candidate, out_idx=out_idx)
