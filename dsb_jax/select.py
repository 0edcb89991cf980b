"""Selection of the k smallest or largest values, exactly k, in static shapes and with ties by index.

It needs neither a sort nor a dynamic shape. Floats of one sign order as their bits do, so a threshold
with exactly k values below it is found by bisection on the bits, most significant first, each step one counting
pass over the values. With 3-bit values 1, 3, 3, 6 and k = 2:

    try 100: 1, 3 and 3 are below it (3 > k)    -> bit 2 is 0
    try 010: only the 1 is below it (1 <= k)    -> bit 1 is 1
    try 011: only the 1 is below it (1 <= k)    -> bit 0 is 1     all below 011 = 3 are chosen, and one of the 3s

and goes on in the same way to the index below which equal values are chosen. It stops as soon as k are below.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Above the image of every float, NaN too, which is 0x7FC00000, and one below the largest integer.
_EXCLUDED = 0x7FFFFFFE


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
    below, _ = _bisect(bits, jnp.ones((), jnp.int32), jnp.asarray(k, jnp.int32))
    return where & below


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
    below, part = _bisect(bits, jnp.asarray(weights, jnp.int32), jnp.asarray(k, jnp.int32))
    return jnp.where(below, weights, part)


def _bisect(
    bits: Int[Array, "*dims"], weights: Int[Array, "..."], k: Int[Array, ""]
) -> tuple[Bool[Array, "*dims"], Int[Array, "*dims"]]:
    """Cuts bins, in order of their bits and then of their flat index, where k units lie below.

    Returns:
      Which bins lie below the cut, and how many units of the bin at the cut are missing to k, 0 at all others.
    """
    State = tuple[Array, Array, Array, Array]
    index = jnp.arange(bits.size, dtype=jnp.int32).reshape(bits.shape)
    index_bits = max(bits.size - 1, 1).bit_length()

    def below(bound: Int[Array, ""], first: Int[Array, ""]) -> Bool[Array, "*dims"]:
        return bits < bound + (index < first).astype(jnp.int32)  # that is: smaller, or equal and before `first`

    def try_bit(state: State) -> State:
        step, bound, first, count = state
        # The bit is not yet set, so xor sets it; for the sign bit, step 0, it clears it: INT_MIN -> 0.
        in_bound = step < 32
        bit = jax.lax.shift_left(jnp.int32(1), jnp.where(in_bound, 31, 31 + index_bits) - step)
        try_bound = jnp.minimum(bound ^ jnp.where(in_bound, bit, 0), _EXCLUDED)  # so that + 1 does not overflow
        try_first = first ^ jnp.where(in_bound, 0, bit)
        units = jnp.sum(jnp.where(below(try_bound, try_first), weights, 0), dtype=jnp.int32)
        fits = units <= k
        tried, best = (try_bound, try_first, units), (bound, first, count)
        bound, first, count = (jnp.where(fits, new, old) for new, old in zip(tried, best, strict=True))
        return step + 1, bound, first, count

    def unfinished(state: State) -> Array:
        step, _, _, count = state
        return (step < 32 + index_bits) & (count < k)

    start = jnp.int32(0), jnp.int32(jnp.iinfo(jnp.int32).min), jnp.int32(0), jnp.int32(0)
    _, bound, first, count = jax.lax.while_loop(unfinished, try_bit, start)
    at_the_cut = (bits == bound) & (index == first)
    return below(bound, first), jnp.where(at_the_cut, jnp.maximum(k - count, 0), 0)


def _ordered_bits(values: Float[Array, "*dims"]) -> Int[Array, "*dims"]:
    """The monotone image of float32 in int32: x < y exactly if its image is smaller. Never `_EXCLUDED`.

    Signed, because a CPU compares signed integers twice as fast as unsigned ones.
    """
    values = jnp.where(jnp.isnan(values), jnp.nan, values)  # one NaN, of positive sign: above infinity
    values = jnp.where(values == 0, 0.0, values)  # -0.0 has bits of its own
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    # Negative floats are negative integers already, but order backwards: flip all bits but the sign.
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
