"""Which active weights to drop: exactly k of the smallest magnitude, then the block-aware rule.

Jiang, Hu, Song, NeurIPS 2022: a weight is only worth dropping where that frees structure, because a row or
a column of a block that stays half full must stay stored whatever else goes. So of the marked weights, those
stay dropped whose row of the block holds at least C/2 marks or whose column of the block at least R/2.

The selection needs neither a sort nor a dynamic shape. Floats of one sign order as their bits do, so the
k-th smallest value is found by bisection on the bits, most significant first, each step one counting pass
over the values. With 3-bit values 1, 3, 3, 6 and k = 2:

    try 100: one..three are below it (3 >= k)   -> bit 2 is 0
    try 010: only the 1 is below it (1 < k)     -> bit 1 is 1
    try 011: only the 1 is below it (1 < k)     -> bit 0 is 1     the threshold is 011 = 3

All values below the threshold are chosen, and as many equal to it, by index, as are still missing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Above the image of every float, NaN too, which is 0x7FC00000.
_EXCLUDED = 0x7FFFFFFF


def select_smallest(
    values: Float[Array | np.ndarray, "*dims"],
    k: Int[Array, ""] | int,
    *,
    where: Bool[Array | np.ndarray, "..."] | bool,
) -> Bool[Array, "*dims"]:
    """Marks the k smallest values among `where`; ties go to the smaller flat index.

    Args:
      values: float, any shape. -0.0 equals 0.0; NaN of either sign ranks above infinity.
      k: how many to mark; may be traced. Negative counts as 0, more than `where` holds as all of it.
      where: bool, broadcastable to `values`; False is never marked.

    Returns:
      bool, the shape of `values`, with exactly `clip(k, 0, where.sum())` True.
    """
    where = jnp.broadcast_to(where, values.shape)
    bits = jnp.where(where, _ordered_bits(jnp.asarray(values, jnp.float32)), _EXCLUDED)
    k = jnp.asarray(k, jnp.int32)
    threshold = _bisect(lambda candidate: jnp.sum(bits < candidate, dtype=jnp.int32), k)
    below = bits < threshold
    ties = where & (bits == threshold)
    missing = k - jnp.sum(below, dtype=jnp.int32)
    rank = jnp.cumsum(ties.ravel(), dtype=jnp.int32).reshape(ties.shape)
    return below | (ties & (rank <= missing))


def select_largest(
    values: Float[Array | np.ndarray, "*dims"],
    k: Int[Array, ""] | int,
    *,
    where: Bool[Array | np.ndarray, "..."] | bool,
) -> Bool[Array, "*dims"]:
    """Marks the k largest values among `where`; ties go to the smaller flat index. As `select_smallest`, but NaN
    ranks below minus infinity: a broken value is never chosen before a sound one, in either direction.
    """
    return select_smallest(-values, k, where=where)


def take_largest(
    values: Float[Array | np.ndarray, "*dims"], k: Int[Array, ""] | int, *, weights: Int[Array | np.ndarray, "*dims"]
) -> Int[Array, "*dims"]:
    """Takes k units from bins in order of decreasing value: whole bins, then a part of the last one.

    Values 5, 9, 5 of weights 2, 3, 4 and k = 6 give 2, 3, 1. `select_largest` is the case of weights 0 and 1.

    Args:
      values: float, any shape; ties go to the smaller flat index, NaN comes last.
      k: how many units to take; may be traced. Negative counts as 0, more than there are as all of them.
      weights: how many units each bin holds, >= 0.

    Returns:
      The units taken from each bin, `clip(k, 0, weights.sum())` together.
    """
    bits = _ordered_bits(-jnp.asarray(values, jnp.float32))
    k = jnp.asarray(k, jnp.int32)

    def units_below(bound: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.sum(jnp.where(bits < bound, weights, 0), dtype=jnp.int32)

    threshold = _bisect(units_below, k)
    tied = jnp.where(bits == threshold, weights, 0)
    before = jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(tied.shape) - tied
    part = jnp.clip(k - units_below(threshold) - before, 0, tied)
    return jnp.where(bits < threshold, weights, part)


def _bisect(count_below: Callable[[Int[Array, ""]], Int[Array, ""]], k: Int[Array, ""]) -> Int[Array, ""]:
    """The largest int32 below which there are fewer than k; the smallest int32 if k <= 0."""

    def try_bit(step: Int[Array, ""], threshold: Int[Array, ""]) -> Int[Array, ""]:
        # The bit is not yet set, so xor sets it; for the sign bit, step 0, it clears it: INT_MIN -> 0.
        candidate = threshold ^ jax.lax.shift_left(jnp.int32(1), 31 - step)
        return jnp.where(count_below(candidate) < k, candidate, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.int32(jnp.iinfo(jnp.int32).min))


def _ordered_bits(values: Float[Array, "*dims"]) -> Int[Array, "*dims"]:
    """The monotone image of float32 in int32: x < y exactly if its image is smaller. Never `_EXCLUDED`.

    Signed, because a CPU compares signed integers twice as fast as unsigned ones.
    """
    values = jnp.where(jnp.isnan(values), jnp.nan, values)  # one NaN, of positive sign: above infinity
    values = jnp.where(values == 0, 0.0, values)  # -0.0 has bits of its own
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    # Negative floats are negative integers already, but order backwards: flip all bits but the sign.
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def magnitude_drop(
    blocks: Float[Array | np.ndarray, "num_blocks R C"],
    k: Int[Array, ""] | int,
    *,
    real: Bool[Array | np.ndarray, "..."] | None = None,
) -> Bool[Array, "num_blocks R C"]:
    """Marks exactly the k active weights of smallest magnitude, ties by flat index.

    Args:
      blocks: the active weights.
      k: how many to mark; may be traced.
      real: broadcastable to `blocks`, False at the weights of phantom rows (`layout.real_rows`), which exist only
        in storage and are never marked. None if R divides `out`.
    """
    return select_smallest(jnp.abs(blocks), k, where=True if real is None else real)


def block_aware_drop(marked: Bool[Array | np.ndarray, "num_blocks R C"]) -> Bool[Array, "num_blocks R C"]:
    """Keeps a mark only where dropping can free structure (paper, section "block-aware drop").

    A mark survives if its row of the block holds at least C/2 marks, or its column of the block at least R/2.
    Odd sizes are exact: of C = 5 it takes 3, since 2 * 3 >= 5.
    """
    marked = jnp.asarray(marked)
    _, rows, cols = marked.shape
    in_row = jnp.sum(marked, axis=2, keepdims=True, dtype=jnp.int32)
    in_column = jnp.sum(marked, axis=1, keepdims=True, dtype=jnp.int32)
    return marked & ((2 * in_row >= cols) | (2 * in_column >= rows))
