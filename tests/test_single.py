"""RigL and SET: single weights in storage, what is dropped and grown, one update by hand each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import (
    BlockLayout,
    block_group,
    layout_of_positions,
    pack,
    to_mask,
    unpack,
    validate,
)
from dsb_jax.methods import SET, LayerState, RigL
from dsb_jax.methods.single import random_positions
from pallas_kernels.kernel_index import groups_of_blocks

T_END = 100
MAKERS = {"rigl": RigL, "set": SET}
OUT, IN, COUNT = 7, 12, 25
seeds = st.integers(0, 2**16)
law = settings(max_examples=6)


@functools.cache
def update_of(name, **options):
    """The update, compiled; state and report as numpy arrays."""
    jitted = jax.jit(MAKERS[name](**{"update_end_step": T_END, **options}).update)
    return lambda key, step, *others: jax.device_get(jitted(key, np.int32(step), *others))


@functools.cache
def draw():
    jitted = jax.jit(lambda seed: random_positions(jax.random.key(seed), (OUT, IN), num_blocks=COUNT))
    return lambda seed: jax.device_get(jitted(seed))


def positions_of(mask):
    """The layout of single weights at the True positions, by numpy."""
    rows, columns = np.nonzero(mask)
    start = np.searchsorted(rows, np.arange(len(mask) + 1)).astype(np.int32)
    out_idx, in_idx = np.arange(len(mask), dtype=np.int32)[:, None], columns[:, None].astype(np.uint16)
    return BlockLayout(out_idx, in_idx, start, mask.shape, (1, 1))


def spread(values, layout):
    """The values of single weights at their positions, zero elsewhere, by numpy."""
    dense = np.zeros(layout.shape, values.dtype)
    rows = np.repeat(layout.out_idx[:, 0], np.diff(layout.group_start))
    dense[rows, layout.in_idx[:, 0]] = values.ravel()
    return dense


def mask_of(layout):
    return spread(np.ones(layout.num_blocks, bool), layout)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(mask, count):
    """The layout of these positions, its mask, and 1, 2, .. unpacked and packed again."""
    layout = layout_of_positions(mask, count)
    return layout, to_mask(layout), pack(unpack(jnp.arange(1.0, count + 1)[:, None, None], layout), layout)


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 13), (2, 24)])
def test_a_layout_of_positions_holds_exactly_these(seed, count):
    mask = np.zeros(24, bool)
    mask[np.random.default_rng(seed).permutation(24)[:count]] = True
    mask = mask.reshape(4, 6)
    layout, found, values = jax.device_get(there_and_back(mask, count))
    validate(layout)
    assert layout.in_idx.dtype == np.uint16
    for array, expected in zip(jax.tree.leaves(layout), jax.tree.leaves(positions_of(mask)), strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(values.ravel(), np.arange(1, count + 1))
    assert layout.num_active == count


def test_groups_of_many_blocks_are_those_of_few():
    """Above a size the groups are found in another way."""
    layout = positions_of(np.random.default_rng(0).permutation(300 * 200).reshape(300, 200) < 20000)
    assert layout.num_blocks * layout.num_groups > 2**22
    rows = np.repeat(np.arange(300), np.diff(layout.group_start))
    np.testing.assert_array_equal(jax.jit(block_group)(layout), rows)
    few = jax.jit(groups_of_blocks, static_argnums=1)(np.array([0, 2, 2, 3], np.int32), 3)
    np.testing.assert_array_equal(few, [0, 0, 2])


@pytest.mark.parametrize("name", MAKERS)
@given(seed=seeds, step=st.sampled_from([0, 30, 99, T_END]))
@law
def test_update_drops_the_weakest_and_grows_as_many(name, seed, step):
    rng = np.random.default_rng(seed)
    layout = draw()(seed)
    validate(layout)
    values = rng.standard_normal((COUNT, 1, 1)).astype(np.float32)
    gradient = rng.standard_normal((OUT, IN)).astype(np.float32)
    state = LayerState(values, layout)
    (moved, new, _), report = update_of(name)(jax.random.key(seed), step, state, gradient if name == "rigl" else None)
    validate(new)
    before, after = mask_of(layout), mask_of(new)
    k = int(np.round(np.float32(0.15 * (1 + np.cos(np.pi * step / T_END))) * COUNT)) if step < T_END else 0
    weights = spread(values, layout)
    active = np.flatnonzero(before)
    kept = np.sort(active[np.argsort(np.abs(weights.ravel()[active]), kind="stable")[k:]])
    assert after.ravel()[kept].all()
    assert after.sum() == COUNT
    grown = np.setdiff1d(np.flatnonzero(after), kept)
    assert report.requested == report.accepted == grown.size == k
    assert report.turnover == pytest.approx((after & ~before).sum() / COUNT)
    assert report.collateral == 0
    assert report.empty_groups == (after.sum(axis=1) == 0).sum()
    if name == "rigl":
        others = np.setdiff1d(np.arange(OUT * IN), kept)
        np.testing.assert_array_equal(grown, np.sort(others[np.argsort(-np.abs(gradient.ravel()[others]))[:k]]))
    else:
        assert not before.ravel()[grown].any()
    # Kept weights are bit-identical, weights that were not there are zero.
    np.testing.assert_array_equal(spread(moved, new), np.where(after & before, weights, 0))


def by_hand(weights):
    """The state that holds the weights that are not zero."""
    weights = np.array(weights, np.float32)
    return LayerState(weights[weights != 0].reshape(-1, 1, 1), positions_of(weights != 0))


def test_rigl_by_hand():
    # Half of 4: -1 and 2 go. Of what is not kept, (1, 1) has the largest gradient; then comes (0, 2), which regrows.
    state = by_hand([[5, 0, -1], [2, 0, 7]])
    gradient = np.array([[99, 1, 3], [2, -4, 99]], np.float32)
    update = update_of("rigl", update_end_step=10, drop_fraction=0.5)
    (moved, new, _), report = update(jax.random.key(0), 0, state, gradient)
    assert mask_of(new).astype(int).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert moved.ravel().tolist() == [5, -1, 0, 7]
    assert [float(value) for value in report[:5]] == [2, 2, 0.25, 0, 0]


def test_set_by_hand():
    # One of five goes, 0.5, and the only inactive position grows, whatever the key.
    state = by_hand([[5, 0], [-1, 7], [0.5, 3]])
    update = update_of("set", update_end_step=10, drop_fraction=0.2)
    for seed in range(3):
        (moved, new, _), report = update(jax.random.key(seed), 0, state, None)
        assert mask_of(new).astype(int).tolist() == [[1, 1], [1, 1], [0, 1]]
        assert moved.ravel().tolist() == [5, 0, -1, 7, 3]
        assert [float(value) for value in report[:5]] == pytest.approx([1, 1, 0.2, 0, 0])


def test_set_follows_its_key():
    state = LayerState(np.ones((COUNT, 1, 1), np.float32), draw()(0))
    one, other = (update_of("set")(jax.random.key(s), 0, state, None)[0] for s in (0, 1))
    assert (mask_of(one.layout) != mask_of(other.layout)).any()
