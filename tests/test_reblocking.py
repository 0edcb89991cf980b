"""Laws of re-blocking: always a valid layout, planted structure found, never less than recorded or previous."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import BlockLayout, count_groups, ragged_blocks, validate
from dsb_jax.reblocking import cut_columns, reblock

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden"
law = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**16)
# Compiling is what these tests cost: several share the sizes of the second recorded case.
SHAPE, SHARED = (128, 64), {"block_shape": (16, 16), "num_blocks": 7}


def mask_of(layout):
    """The positions that a layout holds, by numpy."""
    out_idx, in_idx, start = jax.device_get((layout.out_idx, layout.in_idx, layout.group_start))
    mask = np.zeros((out_idx.size, layout.shape[1]), bool)  # phantom rows, too
    mask[np.repeat(out_idx, np.diff(start), axis=0)[:, :, None], in_idx[:, None, :]] = True
    return mask[: layout.shape[0]]


def retained(score, layout):
    """The share of a nonnegative score that lies on the layout, by numpy."""
    return (score * mask_of(layout)).sum(dtype=np.float64) / score.sum(dtype=np.float64)


def golden_score(case):
    weight, active, grow = np.abs(case["weight"]), case["mask_before_blocking"], case["grow"]
    score = weight * active
    return np.where(grow, score[score > 0].mean(), score)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded cases (shared/golden) are not beside this checkout")
@pytest.mark.parametrize(("name", "least"), [("case_02", 0.819), ("case_03", 0.809), ("case_04", 0.813)])
def test_retains_at_least_the_recorded_score(name, least):
    with np.load(GOLDEN / f"{name}.npz") as case:
        meta, score, recorded_mask = json.loads(str(case["meta"])), golden_score(case), case["new_mask"]
    recorded = meta["retained_score"]
    assert (score * recorded_mask).sum() / score.sum() == pytest.approx(recorded, abs=1e-5)  # we score as they did
    layout = reblock(score, block_shape=(meta["block_size"],) * 2, num_blocks=meta["num_blocks"])
    validate(layout)
    assert retained(score, layout) >= max(recorded, least)


def planted_layout(seed, shape, block_shape, num_blocks, *, even):
    """A random layout, made without compiling anything: blocks spread evenly, or some groups with many, some none."""
    rng = np.random.default_rng(seed)
    (out, in_), (rows, cols) = shape, block_shape
    groups, ragged = count_groups(out, rows), ragged_blocks(shape, block_shape, num_blocks)
    full, left = (groups, num_blocks) if ragged is None else (groups - 1, num_blocks - ragged)
    share = np.full(full, 1 / full) if even else rng.dirichlet(np.full(full, 0.5))
    count = np.minimum((share * left).astype(int), in_ // cols)
    while count.sum() < left:
        count[rng.choice(np.flatnonzero(count < in_ // cols))] += 1
    if ragged is not None:
        count = np.append(count, ragged)
    out_idx = np.append(rng.permutation(out), np.arange(out, groups * rows)).reshape(groups, rows)
    in_idx = np.concatenate([rng.permutation(in_)[: n * cols].reshape(n, cols) for n in count])
    start = np.append(0, np.cumsum(count))
    arrays = (jnp.asarray(array, jnp.int32) for array in (out_idx, in_idx, start))
    layout = BlockLayout(*arrays, shape, block_shape)
    validate(layout)
    return layout


@pytest.mark.parametrize(
    ("shape", "block_shape", "num_blocks"),
    [
        (SHAPE, *SHARED.values()),
        ((48, 9), (16, 8), 2),  # one block a group at most, and more than 4 rows a column: no similarities kept
        ((70, 72), (8, 8), 12),  # ragged: 6 of 8 rows
        ((130, 20), (8, 4), 8),  # ragged without blocks, and more than 4 rows a column
    ],
)
@law
@given(seed=seeds, even=st.booleans())
def test_finds_planted_blocks(shape, block_shape, num_blocks, seed, even):
    planted = planted_layout(seed, shape, block_shape, num_blocks, even=even)
    mask = mask_of(planted)
    score = mask * np.random.default_rng(seed).uniform(1e-3, 1, shape).astype(np.float32)
    found = reblock(score, block_shape=block_shape, num_blocks=num_blocks)
    validate(found)
    np.testing.assert_array_equal(mask_of(found), mask)


def rough_score(seed, shape):
    """Magnitudes of a normal distribution, thinned out to none at all, with ties, now and then broken."""
    rng = np.random.default_rng(seed)
    score = np.abs(rng.standard_normal(shape)) * (rng.random(shape) < rng.choice([0, 0.1, 1]))
    if rng.random() < 0.3:
        score = np.ceil(score)
    if rng.random() < 0.2:
        score[rng.random(shape) < 0.1] = rng.choice([np.nan, np.inf, -1])
    return score.astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "sizes", "least"),
    [(SHAPE, SHARED, 0), ((29, 30), {"block_shape": (8, 4), "num_blocks": 8}, 2)],
    ids=["whole", "ragged"],
)
@law
@given(seed=seeds)
def test_always_a_valid_layout_with_enough_blocks_in_each_group(shape, sizes, least, seed):
    layout = reblock(rough_score(seed, shape), **sizes, min_group_blocks=least)
    validate(layout)
    assert layout.num_blocks == sizes["num_blocks"]
    assert np.diff(layout.group_start).min() >= least


@law
@given(seed=seeds)
def test_never_retains_less_than_the_previous_grouping(seed):
    previous = planted_layout(seed, SHAPE, even=True, **SHARED)
    score = np.abs(np.random.default_rng(seed).standard_normal(SHAPE)).astype(np.float32)
    score += mask_of(previous) * np.float32(seed % 4)
    layout = reblock(score, previous=previous, **SHARED)
    validate(layout)
    columns = score[np.asarray(previous.out_idx)].sum(axis=1)
    kept = cut_columns(columns, previous.out_idx, shape=SHAPE, **SHARED)
    alone = reblock(score, **SHARED)
    assert retained(score, layout) >= max(retained(score, kept), retained(score, alone)) - 2e-6


def test_keeps_the_previous_grouping_when_nothing_is_gained():
    previous = planted_layout(0, SHAPE, even=True, **SHARED)
    layout = reblock(mask_of(previous).astype(np.float32), previous=previous, **SHARED)
    np.testing.assert_array_equal(layout.out_idx, previous.out_idx)


def best_blocks(column_score, shape, block_shape, num_blocks, least):
    """The worth of each kept block, by sorting: groups' own minimum first, then the best of the rest."""
    cols = block_shape[1]
    slots = shape[1] // cols
    columns = -np.sort(-column_score, axis=1)[:, : slots * cols]
    worth = columns.reshape(len(columns), slots, cols).sum(axis=2)
    ragged = ragged_blocks(shape, block_shape, num_blocks)
    own = worth if ragged is None else worth[:-1]
    rest = -np.sort(-own[:, least:].ravel())[: num_blocks - (ragged or 0) - own[:, :least].size]
    return own[:, :least].sum() + rest.sum() + (0 if ragged is None else worth[-1, :ragged].sum())


@pytest.mark.parametrize("shape", [(12, 14), (10, 14)])
@pytest.mark.parametrize("least", [0, 1])
@law
@given(seed=seeds, zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_cut_columns_keeps_the_best_blocks(shape, least, seed, zeros):
    rng = np.random.default_rng(seed)
    column_score = rng.integers(0, 4, (3, 14)) * (rng.random((3, 14)) >= zeros).astype(np.float32)
    out_idx = np.append(rng.permutation(shape[0]), np.arange(shape[0], 12)).reshape(3, 4)
    sizes = {"shape": shape, "block_shape": (4, 4), "num_blocks": 5}
    layout = cut_columns(column_score, out_idx, min_group_blocks=least, **sizes)
    validate(layout)
    group = np.repeat(np.arange(3), np.diff(layout.group_start))
    kept = column_score[group[:, None], layout.in_idx]
    assert kept.sum() == best_blocks(column_score, least=least, **sizes)
    assert (np.diff(kept, axis=1) <= 0).all()  # within a block scores descend


def test_cut_columns_by_hand():
    # Group 0 in order: columns 2, 0 | 3, 1, worth 9 + 4 and 1 + 0. Group 1: columns 1, 3 | 0, 2, worth 6 and 2.
    column_score = np.array([[4, 0, 9, 1], [1, 3, 1, 3]], np.float32)
    out_idx = np.array([[3, 0], [1, 2]], np.int32)
    layout = cut_columns(column_score, out_idx, shape=(4, 4), block_shape=(2, 2), num_blocks=3)
    assert layout.in_idx.tolist() == [[2, 0], [1, 3], [0, 2]]
    assert layout.group_start.tolist() == [0, 1, 3]
    assert layout.out_idx.tolist() == [[3, 0], [1, 2]]
    # Rows 3 and 0 hold columns 2 and 0, rows 1 and 2 hold all: 12 of the 16 positions.
    assert retained(np.ones((4, 4), np.float32), layout) == 12 / 16


def test_columns_that_must_stay_do_not_blur_the_others():
    # Four columns of 1e6 in each group; the optional ones differ by 1e-7 and the better ones are in group 1.
    optional = (1e-6 + 1e-7 * np.arange(12)).reshape(2, 6)
    column_score = np.concatenate([np.full((2, 4), 1e6), optional], axis=1).astype(np.float32)
    out_idx = np.arange(4, dtype=np.int32).reshape(2, 2)
    layout = cut_columns(column_score, out_idx, shape=(4, 10), block_shape=(2, 2), num_blocks=7)
    assert layout.group_start.tolist() == [0, 2, 7]
    assert layout.in_idx.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [9, 8], [7, 6], [5, 4]]


def test_the_same_under_jit_and_vmap():
    scores = np.abs(np.random.default_rng(0).standard_normal((2, 29, 30))).astype(np.float32)

    def run(score):
        return reblock(score, block_shape=(8, 4), num_blocks=8, min_group_blocks=2)

    together = jax.device_get(jax.jit(jax.vmap(run))(scores))
    for i, score in enumerate(scores):
        for a, b in zip(*map(jax.tree.leaves, (run(score), together)), strict=True):
            np.testing.assert_array_equal(a, b[i])


def test_errors_name_the_wrong_value_and_the_cure():
    score = np.ones((32, 30), np.float32)
    with pytest.raises(ValueError, match=r"num_blocks=99 does not fit .* give 1 to 28"):
        reblock(score, block_shape=(8, 4), num_blocks=99)
    with pytest.raises(ValueError, match=r"min_group_blocks=3 cannot be met: 9 blocks over 4 .* give 0 to 2"):
        reblock(score, block_shape=(8, 4), num_blocks=9, min_group_blocks=3)
    other = planted_layout(0, (32, 16), (8, 4), 9, even=True)
    with pytest.raises(ValueError, match=r"previous is a layout of \(32, 16\)"):
        reblock(score, block_shape=(8, 4), num_blocks=9, previous=other)
    with pytest.raises(ValueError, match=r"column_score is \[4, 16\]"):
        cut_columns(np.ones((4, 16), np.float32), other.out_idx, shape=(32, 30), block_shape=(8, 4), num_blocks=9)
