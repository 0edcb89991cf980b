"""Columns dealt evenly: over the row groups of a first layout every input channel, and every column, has its turn."""

import jax
import numpy as np
import pytest

from dsb_jax.layout import random_layout, validate
from dsb_jax.methods import DSB, Static
from dsb_jax.spec import conv_spec, linear_spec


def reads(layout):
    """How many row groups read each column."""
    return np.bincount(np.asarray(layout.in_idx).ravel(), minlength=layout.shape[1])


SIZES = (  # shape, block shape, blocks, channels
    ((12, 36), (4, 2), 8, 4),  # 16 columns to deal of 36
    ((12, 36), (4, 2), 27, 4),  # 54 of them, one and a half rounds
    ((14, 21), (4, 3), 9, 7),  # a ragged last group
    ((5, 9), (1, 1), 30, 9),  # single weights of a linear layer
    ((8, 10), (4, 5), 4, 5),  # all of them
)


@pytest.mark.parametrize(("shape", "block_shape", "num_blocks", "channels"), SIZES)
def test_dealt_layouts(shape, block_shape, num_blocks, channels):
    draw = jax.jit(
        lambda key: random_layout(key, shape, block_shape=block_shape, num_blocks=num_blocks, channels=channels)
    )
    for seed in range(8):
        layout = draw(jax.random.key(seed))
        validate(layout)
        columns, by_channel = reads(layout), reads(layout).reshape(-1, channels).sum(axis=0)
        assert by_channel.max() - by_channel.min() <= 1
        assert columns.max() - columns.min() <= 2
        if columns.sum() >= channels:
            assert by_channel.min() > 0


def test_every_channel_is_read_where_a_random_layout_leaves_some_out():
    """A shortcut of WRN-22-2: 64 outputs, 32 channels, 16 of 16x4 blocks hold 8 columns for each of 4 groups."""
    how = {"shape": (64, 32), "block_shape": (16, 4), "num_blocks": 8}
    unread = [
        sum((reads(random_layout(jax.random.key(seed), **how, channels=channels)) == 0).sum() for seed in range(20))
        for channels in (32, None)
    ]
    assert unread[0] == 0
    assert unread[1] > 20  # of 640


def test_channels_come_before_the_columns_of_a_window():
    """Six columns of a 3x3 convolution with six channels: one of each channel, not six of one."""
    layout = random_layout(jax.random.key(0), (4, 54), block_shape=(4, 6), num_blocks=1, channels=6)
    assert sorted(np.asarray(layout.in_idx).ravel() % 6) == list(range(6))


def test_methods_deal_by_the_channels_of_a_layer():
    spec = conv_spec((3, 3), 4, 8).with_blocks((4, 2), 4)
    for method in (DSB(), Static()):
        layout = method.init(jax.random.key(0), np.ones((8, 36), np.float32), spec).layout
        assert (reads(layout).reshape(9, 4).sum(axis=0) == 2).all()
    other = DSB(columns="random").init(jax.random.key(0), np.ones((8, 36), np.float32), spec).layout
    same = random_layout(jax.random.key(0), (8, 36), block_shape=(4, 2), num_blocks=4)
    np.testing.assert_array_equal(other.in_idx, same.in_idx)


def test_what_is_refused():
    with pytest.raises(ValueError, match="channels=5 does not divide"):
        random_layout(jax.random.key(0), (8, 36), block_shape=(4, 2), num_blocks=4, channels=5)
    for method in (DSB, Static):
        with pytest.raises(ValueError, match="columns='even' is unknown; choose one of dealt, random"):
            method(columns="even")
    assert linear_spec(5, 3).c_in == 5
