"""Laws of the layout: packing loses nothing, masks count what is stored, every broken rule is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.layout import (
    BlockLayout,
    block_group,
    block_rows,
    check_sizes,
    count_groups,
    max_blocks,
    num_active,
    pack,
    ragged_blocks,
    random_layout,
    real_rows,
    to_mask,
    unpack,
    validate,
)
from tests.conftest import make_layout

# (out, in), (R, C), num_blocks: whole; neither R dividing out nor C dividing in; columns; one group, full; the fewest
# and the most blocks.
SIZES = [
    ((8, 12), (4, 3), 5),
    ((13, 11), (5, 3), 7),
    ((9, 7), (4, 1), 11),
    ((7, 9), (7, 2), 4),
    ((9, 7), (4, 2), 1),
    ((9, 7), (4, 2), 9),
]
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def draw(shape, block_shape, num_blocks):
    """seed -> random layout; compiled once for each size."""

    def layout_of(seed):
        return random_layout(jax.random.key(seed), shape, block_shape=block_shape, num_blocks=num_blocks)

    jitted = jax.jit(layout_of)
    return lambda seed: jax.device_get(jitted(np.uint32(seed)))


@jax.jit
def compute(layout, blocks, dense):
    """All that the laws below speak of: compiling it once for each size is what they cost."""
    packed, unpacked = pack(dense, layout), unpack(blocks, layout)
    return {
        "packed": packed,
        "unpacked": unpacked,
        "packed again": pack(unpacked, layout),
        "unpacked again": unpack(packed, layout),
        "mask": to_mask(layout),
        "real": real_rows(layout),
        "group": block_group(layout),
        "rows": block_rows(layout),
    }


def facts(layout, blocks=None, dense=None):
    ones = np.ones((layout.num_blocks, *layout.block_shape), np.float32), np.ones(layout.shape, np.float32)
    arrays = (one if array is None else array for array, one in zip((blocks, dense), ones, strict=True))
    return jax.device_get(compute(layout, *arrays))


def mask_of(layout):
    """The mask by the definition: a block lies on the rows of its group and on its own columns."""
    mask, start = np.zeros(layout.shape, bool), np.asarray(layout.group_start)
    for group, rows in enumerate(np.asarray(layout.out_idx)):
        for columns in np.asarray(layout.in_idx)[start[group] : start[group + 1]]:
            mask[np.ix_(rows[rows < layout.shape[0]], columns)] = True
    return mask


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@given(seed=seeds)
def test_random_layouts_are_valid_even_and_follow_their_key(sizes, seed):
    shape, block_shape, num_blocks = sizes
    layout = draw(*sizes)(seed)
    validate(layout)
    assert (layout.shape, layout.block_shape, layout.num_blocks) == (shape, block_shape, num_blocks)
    counts = np.diff(layout.group_start)
    if ragged_blocks(shape, block_shape, num_blocks) is not None:
        assert counts[-1] == ragged_blocks(shape, block_shape, num_blocks)
        counts = counts[:-1]
    assert counts.max() - counts.min() <= 1
    for one, same in zip(jax.tree.leaves(layout), jax.tree.leaves(draw(*sizes)(seed)), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@given(seed=seeds)
def test_pack_and_unpack_are_inverse(sizes, seed):
    shape, block_shape, num_blocks = sizes
    layout, rng = draw(*sizes)(seed), np.random.default_rng(seed)
    blocks = rng.standard_normal((num_blocks, *block_shape), np.float32)
    dense = rng.standard_normal(shape, np.float32)
    found = facts(layout, blocks, dense)
    np.testing.assert_array_equal(found["packed again"], blocks * found["real"])
    np.testing.assert_array_equal(found["unpacked again"], dense * mask_of(layout))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@given(seed=seeds)
def test_mask_counts_the_active_weights(sizes, seed):
    shape, block_shape, num_blocks = sizes
    layout = draw(*sizes)(seed)
    found = facts(layout)
    np.testing.assert_array_equal(found["mask"], mask_of(layout))
    count = int(found["mask"].sum())
    assert count == layout.num_active == num_active(shape, block_shape, num_blocks)
    assert count == np.broadcast_to(found["real"], (num_blocks, *block_shape)).sum()
    assert layout.density == count / (shape[0] * shape[1])


@given(counts=st.tuples(*[st.integers(0, 4)] * 3).filter(lambda c: sum(c) == 4), seed=seeds)
def test_uneven_and_empty_groups(counts, seed):
    layout = make_layout(seed, (12, 12), (4, 3), counts)
    blocks = np.random.default_rng(seed).standard_normal((sum(counts), 4, 3), np.float32)
    found = facts(layout, blocks)
    np.testing.assert_array_equal(found["group"], np.repeat([0, 1, 2], counts))
    np.testing.assert_array_equal(found["rows"], np.repeat(layout.out_idx, counts, axis=0))
    for g, count in enumerate(counts):
        assert (found["mask"][layout.out_idx[g]].sum(axis=1) == 3 * count).all()
    np.testing.assert_array_equal(found["packed again"], blocks)


def test_the_worked_example():
    layout = BlockLayout(
        out_idx=np.array([[2, 0], [1, 3]], np.int32),
        in_idx=np.array([[3, 1], [0, 2], [1, 2]], np.int32),
        group_start=np.array([0, 2, 3], np.int32),
        shape=(4, 4),
        block_shape=(2, 2),
    )
    validate(layout)
    # W[i, j] = 10 i + j, so every entry names its position.
    dense = np.add.outer(10 * np.arange(4), np.arange(4)).astype(np.float32)
    blocks = np.array([[[23, 21], [3, 1]], [[20, 22], [0, 2]], [[11, 12], [31, 32]]], np.float32)
    found = facts(layout, blocks, dense)
    assert found["mask"].astype(int).tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]]
    assert found["group"].tolist() == [0, 0, 1]
    assert found["rows"].tolist() == [[2, 0], [2, 0], [1, 3]]
    assert (layout.num_blocks, layout.num_groups, layout.num_active, layout.density) == (3, 2, 12, 0.75)
    np.testing.assert_array_equal(found["packed"], blocks)
    assert found["packed"][1, 0, 0] == dense[2, 0]
    assert found["unpacked"].tolist() == [[0, 1, 2, 3], [0, 11, 12, 0], [20, 21, 22, 23], [0, 31, 32, 0]]


def test_phantom_rows_by_hand():
    # out = 5, R = 2: three groups, the last of one real row; 4 of at most 6 blocks, round(4 / 3) = 1 in the last.
    shape, block_shape = (5, 4), (2, 2)
    assert (count_groups(5, 2), max_blocks(shape, block_shape), ragged_blocks(shape, block_shape, 4)) == (3, 6, 1)
    assert num_active(shape, block_shape, 4) == 4 * 4 - 1 * 2 == 14
    layout = make_layout(0, shape, block_shape, (2, 1, 1))
    assert layout.out_idx[-1].tolist()[1] == 5
    found = facts(layout)
    assert found["real"][:, :, 0].tolist() == [[True, True]] * 3 + [[True, False]]
    # What lies in a phantom row is neither read nor written.
    assert found["unpacked"].sum() == 14
    assert found["packed"][-1].tolist() == [[1, 1], [0, 0]]


def test_a_pytree_of_integers():
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    leaves, tree = jax.tree.flatten(layout)
    assert [leaf.dtype for leaf in leaves] == [jnp.int32] * 3
    assert jax.tree.unflatten(tree, [None] * 3).shape == (8, 12)  # sizes are static
    shapes = jax.eval_shape(
        lambda key: random_layout(key, (8, 12), block_shape=(4, 3), num_blocks=3), jax.random.key(0)
    )
    assert shapes.in_idx.shape == layout.in_idx.shape


@pytest.mark.parametrize(("columns", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_columns_take_two_bytes_where_they_fit(columns, dtype):
    sizes = {"shape": (2, columns), "block_shape": (2, columns)}
    drawn = jax.eval_shape(functools.partial(random_layout, **sizes, num_blocks=1), jax.random.key(0))
    assert drawn.in_idx.dtype == dtype
    in_idx = np.random.default_rng(0).permutation(columns)[None].astype(dtype)
    layout = BlockLayout(np.array([[1, 0]], np.int32), in_idx, np.array([0, 1], np.int32), **sizes)
    validate(layout)
    assert layout.index.in_idx is layout.in_idx  # kernels read it as it is
    validate(dataclasses.replace(layout, in_idx=in_idx.astype(np.int32)))  # as given by hand


def test_packing_is_differentiable_and_keeps_dtypes():
    layout, rng = make_layout(0, (10, 12), (4, 3), (2, 0, 1)), np.random.default_rng(0)
    blocks, weight = rng.standard_normal((3, 4, 3), np.float32), rng.standard_normal((10, 12), np.float32)
    gradient = jax.jit(jax.grad(lambda b: (unpack(b, layout) * weight).sum()))(blocks)
    np.testing.assert_array_equal(gradient, facts(layout, blocks, weight)["packed"])
    halves = jax.eval_shape(compute, layout, *(array.astype(jnp.bfloat16) for array in (blocks, weight)))
    assert halves["unpacked"].dtype == halves["packed"].dtype == jnp.bfloat16


def damage(layout, field, change):
    array = np.array(getattr(layout, field))
    return dataclasses.replace(layout, **{field: jnp.asarray(change(array))})


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("out_idx", lambda a: a[:-1], r"out_idx is int32\[2, 4\], expected int32\[3, 4\] for a 12x12 matrix"),
        ("out_idx", lambda a: a.astype(np.int16), r"out_idx is int16\[3, 4\], expected int32"),
        ("in_idx", lambda a: a[:, :2], r"in_idx is int32\[5, 2\], expected uint16\[5, 3\]"),
        ("in_idx", lambda a: a.astype(np.float32), r"in_idx is float32\[5, 3\], expected uint16"),
        ("in_idx", lambda a: a[0, 0], r"in_idx is int32\[\], expected uint16\[0, 3\]"),
        ("group_start", lambda a: a[1:], r"group_start is int32\[3\], expected int32\[4\]"),
        ("in_idx", lambda a: a[:0], r"num_blocks=0 does not fit .*; give 1 to 12"),
        ("out_idx", lambda a: put((0, 0), a[1, 1])(a), r"out_idx is not a permutation of 0\.\.11"),
        ("out_idx", put((0, 0), -1), r"out_idx is not a permutation"),
        ("out_idx", put((0, 0), 12), r"out_idx is not a permutation"),
        ("in_idx", put((4, 2), 12), r"in_idx holds 12, outside 0\.\.11"),
        ("in_idx", put((0, 0), -1), r"in_idx holds -1, outside 0\.\.11"),
        ("in_idx", lambda a: put((0, 0), a[0, 1])(a), r"in_idx repeats a column within a row group"),
        ("in_idx", lambda a: put((0, 0), a[1, 2])(a), r"in_idx repeats a column within a row group"),
        ("group_start", put(0, 1), r"group_start=\[1, 3, 4, 5\] does not cut 5 blocks into 3 groups"),
        ("group_start", put(3, 4), r"group_start=\[0, 3, 4, 4\] does not cut"),
        ("group_start", put(1, 5), r"group_start=\[0, 5, 4, 5\] does not cut"),
        ("group_start", put((slice(1, 3),), 5), r"into 3 groups of at most 4"),
    ],
)  # fmt: skip
def test_validate_refuses_every_broken_rule(field, change, message):
    layout = make_layout(0, (12, 12), (4, 3), (3, 1, 1))
    with pytest.raises(ValueError, match=message):
        validate(damage(layout, field, change))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("group_start", put(2, 2)),  # two blocks in the ragged group instead of round(4 / 3)
        ("out_idx", lambda a: a[::-1]),  # phantom rows in the first group
        ("out_idx", lambda a: put(np.nonzero(a == 11), a[0, 0])(put((0, 0), 11)(a))),  # one of two moved away
        ("out_idx", lambda a: put(np.nonzero(a == 10), a[0, 0])(put((0, 0), 10)(a))),
    ],
)
def test_validate_refuses_a_wrong_ragged_group(field, change):
    layout = make_layout(0, (10, 12), (4, 3), (2, 1, 1))
    with pytest.raises(ValueError, match=r"the last group must hold the phantom rows and 1 blocks"):
        validate(damage(layout, field, change))


@pytest.mark.parametrize(
    ("shape", "block_shape", "num_blocks", "message"),
    [
        ((8, 8), (0, 4), 1, r"block_shape=0x4 has a side below 1; give positive sizes such as 16x16"),
        ((8, 8), (4, -1), 1, r"block_shape=4x-1 has a side below 1"),
        ((8, 8), (16, 4), 1, r"block_shape=16x4 is larger than the 8x8 \(out x in\) matrix; use a smaller block"),
        ((8, 8), (4, 9), 1, r"block_shape=4x9 is larger"),
        ((8, 8), (4, 4), 0, r"num_blocks=0 does not fit a 8x8 matrix of 4x4 blocks; give 1 to 4"),
        ((8, 8), (4, 4), 5, r"num_blocks=5 does not fit a 8x8 matrix of 4x4 blocks; give 1 to 4"),
        ((9, 7), (4, 2), 10, r"num_blocks=10 does not fit .* give 1 to 9"),
    ],
)
def test_impossible_sizes_are_named_with_the_cure(shape, block_shape, num_blocks, message):
    for refuse in (check_sizes, lambda s, b, n: random_layout(jax.random.key(0), s, block_shape=b, num_blocks=n)):
        with pytest.raises(ValueError, match=message):
            refuse(shape, block_shape, num_blocks)


@pytest.mark.parametrize("num_blocks", [1, 9])  # as in SIZES, so that nothing is compiled here
def test_the_limits_quoted_in_the_error_work(num_blocks):
    validate(draw((9, 7), (4, 2), num_blocks)(0))
