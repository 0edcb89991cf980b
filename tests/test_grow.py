"""Laws of growing: exactly min(k, candidates), only candidates, in the order that each criterion promises."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.grow import grow_block_gradient, grow_gradient, grow_norm, grow_random

law = settings(deadline=None, max_examples=25)
CASES = [((16, 24), (4, 4)), ((14, 23), (4, 2)), ((23, 6), (8, 4))]  # whole, ragged, and rows run out last
CRITERIA = ["norm", "block_gradient", "gradient", "random", "random position"]
# The ragged case for all; the whole one, too, for criteria that know of blocks or groups.
SIZES = [(name, CASES[1]) for name in CRITERIA] + [(name, CASES[0]) for name in ("norm", "block_gradient", "random")]


@functools.cache
def jit_grow(criterion, block_shape=None):
    """What the criterion looks at, k, candidate=, out_idx= -> grown; compiled once for each shape."""
    grow, arguments = {
        "norm": (functools.partial(grow_norm, block_shape=block_shape), ["candidate"]),
        "block_gradient": (grow_block_gradient, ["candidate", "out_idx"]),
        "gradient": (grow_gradient, ["candidate"]),
        "random": (grow_random, ["candidate", "out_idx"]),
        "random position": (functools.partial(grow_random, granularity="position"), ["candidate"]),
    }[criterion]
    jitted = jax.jit(grow)
    return lambda *args, **others: np.asarray(jitted(*args, **{name: others[name] for name in arguments}))


def looks_at(criterion, seed, shape, num_groups):
    """Random numbers of the shapes that a criterion looks at, or a key."""
    if criterion.startswith("random"):
        return [jax.random.key(seed)]
    rng, (out, in_) = np.random.default_rng(seed), shape
    shapes = {"norm": [(out,), (in_,)], "block_gradient": [(num_groups, in_)], "gradient": [shape]}[criterion]
    return [rng.random(size, np.float32) for size in shapes]


def random_candidates(seed, shape, rows_per_group):
    rng = np.random.default_rng(seed)
    candidate = rng.random(shape) < rng.choice([0.05, 0.5, 0.95])
    groups = -(-shape[0] // rows_per_group)
    out_idx = np.append(rng.permutation(shape[0]), np.arange(shape[0], groups * rows_per_group))
    return candidate, out_idx.reshape(groups, rows_per_group).astype(np.int32)


@pytest.mark.parametrize(("criterion", "sizes"), SIZES, ids=str)
@law
@given(seed=st.integers(0, 2**16), share=st.sampled_from([-0.1, 0.0, 0.03, 0.3, 0.9, 1.0, 1.2]))
def test_grows_exactly_k_candidates(criterion, sizes, seed, share):
    shape, block_shape = sizes
    candidate, out_idx = random_candidates(seed, shape, block_shape[0])
    k, numbers = int(share * candidate.sum()), looks_at(criterion, seed, shape, len(out_idx))
    grown = jit_grow(criterion, block_shape)(*numbers, k, candidate=candidate, out_idx=out_idx)
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
    candidate, _ = random_candidates(seed, shape, block_shape[0])
    k, (dy, x) = int(share * candidate.sum()), looks_at("norm", seed, shape, 0)
    grown = jit_grow("norm", block_shape)(dy, x, k, candidate=candidate)
    np.testing.assert_array_equal(grown, strip_by_strip(dy, x, k, candidate, block_shape))


def test_norm_by_hand():
    # Rows by norm: 3, 1, 0, 2. Columns: 0, 2, 1, 3. The first 2x2 block is rows 3, 1 by columns 0, 2, of which
    # (3, 2) is active already: three candidates. At equal times the second strip is the next block row: rows 0, 2.
    candidate = np.ones((4, 4), bool)
    candidate[3, 2] = False
    dy_norm, x_norm = np.array([[2, 3, 1, 4], [9, 3, 5, 1]], np.float32)
    grown = jit_grow("norm", (2, 2))(dy_norm, x_norm, 5, candidate=candidate)
    expected = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(grown, expected)


def test_norm_grows_a_square_of_blocks_when_all_is_free():
    rank = -np.arange(64, dtype=np.float32)
    grown = jit_grow("norm", (8, 8))(rank, rank, 9 * 64, candidate=np.ones((64, 64), bool))
    np.testing.assert_array_equal(grown, np.pad(np.ones((24, 24), bool), (0, 40)))


@law
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_block_gradient_grows_whole_columns_in_order(seed, share):
    shape, rows = (14, 23), 4
    candidate, out_idx = random_candidates(seed, shape, rows)
    k, (norm,) = int(share * candidate.sum()), looks_at("block_gradient", seed, shape, len(out_idx))
    grown = jit_grow("block_gradient", (rows, 2))(norm, k, candidate=candidate, out_idx=out_idx)
    left, expected = k, np.zeros(shape, bool)
    for pair in np.argsort(-norm.ravel(), kind="stable"):
        g, j = divmod(pair, shape[1])
        members = [i for i in out_idx[g] if i < shape[0] and candidate[i, j]][:left]
        expected[members, j] = True
        left -= len(members)
    np.testing.assert_array_equal(grown, expected)


def test_gradient_by_hand():
    gradient = np.array([[1, -9, 2], [-3, 3, 0]], np.float32)
    candidate = np.array([[True, False, True], [True, True, True]])
    grown = jit_grow("gradient")(gradient, 2, candidate=candidate)
    np.testing.assert_array_equal(grown, [[False, False, False], [True, True, False]])


def test_random_follows_its_key():
    shape, block_shape = CASES[0]
    candidate, out_idx = random_candidates(0, shape, block_shape[0])
    candidate[:] = True
    grow = functools.partial(jit_grow("random", block_shape), candidate=candidate, out_idx=out_idx)
    one, same, other = (grow(jax.random.key(s), 64) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    with jax.enable_x64(True):  # the draws are of 32 bits all the same
        np.testing.assert_array_equal(grow(jax.random.key(1), 64), one)
    panels = one[out_idx]
    assert (panels.all(axis=1) == panels.any(axis=1)).all()  # 64 is 16 whole columns of 4 rows


def test_errors_name_the_cure():
    candidate = np.ones((4, 4), bool)
    with pytest.raises(ValueError, match="'block' is unknown; give 'column' or 'position'"):
        grow_random(jax.random.key(0), 1, candidate=candidate, granularity="block")
    with pytest.raises(ValueError, match="pass out_idx"):
        grow_random(jax.random.key(0), 1, candidate=candidate)
