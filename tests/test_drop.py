"""Laws of dropping: exact counts, the reference order, the block-aware rule."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dsb_jax.drop import block_aware_drop, magnitude_drop
from dsb_jax.select import select_largest, select_smallest, take_largest

SHAPE = (5, 8)
law = settings(deadline=None, max_examples=60)
floats = npst.arrays(
    np.float32, SHAPE, elements=st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 1.0]), st.floats(width=32, allow_nan=False))
)
flags = npst.arrays(np.bool_, SHAPE)
counts = st.integers(-2, 45)


@jax.jit
def jit_smallest(values, k, where):
    return select_smallest(values, k, where=where)


@jax.jit
def jit_largest(values, k, where):
    return select_largest(values, k, where=where)


@jax.jit
def jit_take(values, k, weights):
    return take_largest(values, k, weights=weights)


jit_drop, jit_aware = jax.jit(magnitude_drop), jax.jit(block_aware_drop)


def reference(values, k, where):
    """The same by a stable sort, which breaks ties by flat index. XLA on a CPU takes subnormal floats for zero."""
    values = np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values)
    order = np.argsort(values.ravel(), kind="stable")
    chosen = [i for i in order if where.ravel()[i]][: max(k, 0)]
    mask = np.zeros(values.size, bool)
    mask[chosen] = True
    return mask.reshape(values.shape)


@law
@given(floats, counts, flags)
def test_select_is_a_stable_sort(values, k, where):
    np.testing.assert_array_equal(jit_smallest(values, k, where), reference(values, k, where))
    np.testing.assert_array_equal(jit_largest(values, k, where), reference(-values, k, where))


def test_nan_is_chosen_last_in_both_directions():
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0], np.float32)
    for select in (jit_smallest, jit_largest):
        assert select(values, 3, True).tolist() == [False, False, True, True, True]


@law
@given(floats, counts, npst.arrays(np.int32, SHAPE, elements=st.integers(0, 4)))
def test_take_largest_takes_whole_bins_in_order(values, k, weights):
    taken = np.asarray(jit_take(values, k, weights))
    assert taken.sum() == np.clip(k, 0, weights.sum())
    assert (taken >= 0).all()
    assert (taken <= weights).all()
    # Units listed one by one and chosen by the plain selection are the same units.
    units = np.repeat(np.arange(values.size), weights.ravel())
    chosen = reference(-values.ravel()[units], k, np.ones(units.size, bool))
    np.testing.assert_array_equal(taken.ravel(), np.bincount(units[chosen], minlength=values.size))


@law
@given(st.integers(0, 2**16), st.integers(0, 50))
def test_magnitude_drop_marks_exactly_k_real_weights(seed, k):
    blocks = np.random.default_rng(seed).standard_normal((3, 4, 4)).astype(np.float32)
    real = np.ones((3, 4, 1), bool)
    real[2, 3] = False
    marked = np.asarray(jit_drop(blocks, k, real=real))
    assert marked.sum() == min(k, 44)
    assert not marked[2, 3].any()
    kept = ~marked & np.broadcast_to(real, marked.shape)
    if marked.any() and kept.any():
        size = np.abs(blocks)
        assert size[marked].max() <= size[kept].min()
    assert np.asarray(jit_drop(blocks, k)).sum() == min(k, 48)


def test_block_aware_drop_by_hand():
    # C = 4: a row needs 2 marks. R = 4: a column needs 2 marks. Only the lone mark at (3, 3) frees nothing.
    marked = np.array([[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]], bool)
    expected = marked.copy()
    expected[0, 3, 3] = False
    np.testing.assert_array_equal(jit_aware(marked), expected)


@pytest.mark.parametrize(("marks", "survives"), [(2, False), (3, True)])
def test_half_of_an_odd_side_is_rounded_up(marks, survives):
    marked = np.zeros((1, 5, 5), bool)
    marked[0, 0, :marks] = True
    assert np.asarray(jit_aware(marked)).any() == survives


@law
@given(npst.arrays(np.bool_, (2, 3, 5)))
def test_block_aware_drop_keeps_marks_in_half_full_lines(marked):
    kept = np.asarray(jit_aware(marked))
    for b, r, c in np.ndindex(marked.shape):
        full = marked[b, r].sum() >= 5 / 2 or marked[b, :, c].sum() >= 3 / 2
        assert kept[b, r, c] == (marked[b, r, c] and full)
