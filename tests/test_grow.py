"""Laws of growing: exactly min(k, candidates), only candidates, in the order that each criterion promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.grow import grow_block_gradient, grow_gradient, grow_norm, grow_random

law = settings(deadline=None, max_examples=25)
CASES = [((16, 24), (4, 4)), ((14, 23), (4, 2)), ((23, 6), (8, 4))]  # whole, ragged, and rows run out last
jit_norm = jax.jit(grow_norm, static_argnames="block_shape")
CRITERIA = ["norm", "block_gradient", "gradient", "random", "random position"]


@functools.cache
def jit_grow(criterion, block_shape):
    """key, k, candidate, out_idx -> grown, compiled once for each criterion and shape."""

    def grow(key, k, candidate, out_idx):
        out, in_ = candidate.shape
        if criterion == "norm":
            dy, x = jax.random.uniform(key, (out,)), jax.random.uniform(key, (in_,))
            return grow_norm(dy, x, k, candidate=candidate, block_shape=block_shape)
        if criterion == "block_gradient":
            norm = jax.random.uniform(key, (out_idx.shape[0], in_))
            return grow_block_gradient(norm, k, candidate=candidate, out_idx=out_idx)
        if criterion == "gradient":
            return grow_gradient(jax.random.normal(key, (out, in_)), k, candidate=candidate)
        granularity = "position" if criterion == "random position" else "column"
        return grow_random(key, k, candidate=candidate, out_idx=out_idx, granularity=granularity)

    return jax.jit(grow)


def random_candidates(seed, shape, rows_per_group):
    rng = np.random.default_rng(seed)
    candidate = rng.random(shape) < rng.choice([0.05, 0.5, 0.95])
    groups = -(-shape[0] // rows_per_group)
    out_idx = np.append(rng.permutation(shape[0]), np.arange(shape[0], groups * rows_per_group))
    return candidate, out_idx.reshape(groups, rows_per_group).astype(np.int32)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("shape", "block_shape"), CASES[:2])
@law
@given(seed=st.integers(0, 2**16), share=st.sampled_from([-0.1, 0.0, 0.03, 0.3, 0.9, 1.0, 1.2]))
def test_grows_exactly_k_candidates(criterion, shape, block_shape, seed, share):
    candidate, out_idx = random_candidates(seed, shape, block_shape[0])
    k = int(share * candidate.sum())
    grown = np.asarray(jit_grow(criterion, block_shape)(jax.random.key(seed), k, candidate, out_idx))
    assert grown.sum() == np.clip(k, 0, candidate.sum())
    assert not (grown & ~candidate).any()


def strip_by_strip(dy_norm, x_norm, k, candidate, block_shape):
    """`grow_norm` in loops: extend the rectangle by the strip that keeps its proportions, block by block."""
    (out, in_), (rows, cols) = candidate.shape, block_shape
    row_order, col_order = np.argsort(-dy_norm, kind="stable"), np.argsort(-x_norm, kind="stable")
    num_rows, num_cols = -(-out // rows), -(-in_ // cols)
    positions, p, q = [], 0, 0
    while p < num_rows or q < num_cols:
        if q == num_cols or (p < num_rows and p * in_ <= q * out):
            strip, p = [(p, b) for b in range(q)], p + 1
        else:
            strip, q = [(a, q) for a in range(p)], q + 1
        for a, b in strip:
            for i in row_order[a * rows : (a + 1) * rows]:
                positions += [(i, j) for j in col_order[b * cols : (b + 1) * cols] if candidate[i, j]]
    grown = np.zeros_like(candidate)
    for i, j in positions[:k]:
        grown[i, j] = True
    return grown


@pytest.mark.parametrize(("shape", "block_shape"), CASES)
@law
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_norm_grows_strip_by_strip(shape, block_shape, seed, share):
    candidate, out_idx = random_candidates(seed, shape, block_shape[0])
    k, key = int(share * candidate.sum()), jax.random.key(seed)
    dy, x = (np.asarray(jax.random.uniform(key, (n,))) for n in shape)
    grown = jit_grow("norm", block_shape)(key, k, candidate, out_idx)
    np.testing.assert_array_equal(grown, strip_by_strip(dy, x, k, candidate, block_shape))


def test_norm_by_hand():
    # Rows by norm: 3, 1, 0, 2. Columns: 0, 2, 1, 3. The first 2x2 block is rows 3, 1 by columns 0, 2, of which
    # (3, 2) is active already: three candidates. At equal times the second strip is the next block row: rows 0, 2.
    candidate = jnp.ones((4, 4), bool).at[3, 2].set(False)
    dy_norm, x_norm = jnp.array([2.0, 3.0, 1.0, 4.0]), jnp.array([9.0, 3.0, 5.0, 1.0])
    grown = jit_norm(dy_norm, x_norm, 5, candidate=candidate, block_shape=(2, 2))
    expected = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(grown, expected)


def test_norm_grows_a_square_of_blocks_when_all_is_free():
    rank = -jnp.arange(64.0)
    grown = jit_norm(rank, rank, 9 * 64, candidate=jnp.ones((64, 64), bool), block_shape=(8, 8))
    np.testing.assert_array_equal(grown, np.pad(np.ones((24, 24), bool), (0, 40)))


@law
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_block_gradient_grows_whole_columns_in_order(seed, share):
    shape, rows = (14, 23), 4
    candidate, out_idx = random_candidates(seed, shape, rows)
    key, k = jax.random.key(seed), int(share * candidate.sum())
    norm = np.asarray(jax.random.uniform(key, (out_idx.shape[0], shape[1])))
    grown = np.asarray(jit_grow("block_gradient", (rows, 2))(key, k, candidate, out_idx))
    left, expected = k, np.zeros(shape, bool)
    for pair in np.argsort(-norm.ravel(), kind="stable"):
        g, j = divmod(pair, shape[1])
        members = [i for i in out_idx[g] if i < shape[0] and candidate[i, j]][:left]
        expected[members, j] = True
        left -= len(members)
    np.testing.assert_array_equal(grown, expected)


def test_gradient_by_hand():
    gradient = jnp.array([[1.0, -9.0, 2.0], [-3.0, 3.0, 0.0]])
    candidate = jnp.array([[True, False, True], [True, True, True]])
    grown = grow_gradient(gradient, 2, candidate=candidate)
    np.testing.assert_array_equal(grown, [[False, False, False], [True, True, False]])


def test_random_follows_its_key():
    candidate, out_idx = random_candidates(0, (16, 24), 4)
    candidate[:] = True
    one, same, other = (grow_random(jax.random.key(s), 64, candidate=candidate, out_idx=out_idx) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    panels = np.asarray(one)[out_idx]
    assert (panels.all(axis=1) == panels.any(axis=1)).all()  # 64 is 16 whole columns of 4 rows


def test_errors_name_the_cure():
    candidate = jnp.ones((4, 4), bool)
    with pytest.raises(ValueError, match="'block' is unknown; give 'column' or 'position'"):
        grow_random(jax.random.key(0), 1, candidate=candidate, granularity="block")
    with pytest.raises(ValueError, match="pass out_idx"):
        grow_random(jax.random.key(0), 1, candidate=candidate)
